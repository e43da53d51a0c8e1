"""The logger for Weights & Biases, which sends the rows of `metrics.jsonl`.

Training never waits for W&B and never fails because of it: a thread of its own follows the file, so a server that
hangs delays neither the start nor a step.

W&B's step of a row is the row's line index in the file, so the rows have the same order in both. `step`, `epoch` and
`pairs_seen` are values, and `step` is the axis of the charts.

The position of the cursor at a start:
- online: the number of rows that the server has (`run.step`). Rows that a rollback wrote again are the same rows.
- offline: 0. Every start opens a new offline folder, and the last rows of a killed process may not have reached its
  folder. The new folder therefore gets the whole run, and earlier ones are moved to `wandb/superseded/`. They must
  leave `wandb/`: `wandb sync` uploads every folder there that holds a `.wandb` file, under any name.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt_dist.config import mask_secrets
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.loggers import Sample
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import BIN_EDGES

if TYPE_CHECKING:
    import wandb

_INIT_SECONDS = 90.0
_FINISH_SECONDS = 120.0
_GRACE_SECONDS = 60.0
_BEAT_SECONDS = 5.0
BEST_OF = ("/loss", "/rewards/accuracies", "/rewards/margins")
_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "dryrun": "offline"}


class WandbLogger:
    """One W&B run for all starts of a run folder; only rank 0 builds it.

    The environment variables `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_NAME`, `WANDB_RUN_GROUP` and `WANDB_TAGS` override
    the arguments, as in W&B itself; the run's id and folder are always the arguments'. The API key is left to W&B: it
    is neither read nor written here.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        run_id: str,
        folder: Path,
        config: Mapping[str, Any],
        metrics: MetricsFile,
    ) -> None:
        """Start the thread that opens the W&B run and follows the metrics file.

        Args:
            mode: online, offline or disabled.
            project: W&B project.
            name: name of the W&B run.
            group: group of the W&B run.
            tags: tags of the W&B run.
            run_id: id of the W&B run, the same at every start.
            folder: the run folder, in which W&B creates `wandb/`.
            config: the configuration with masked secrets. It may also hold the run's fingerprint (digests, versions),
                by which W&B can filter runs.
            metrics: the file to follow.
        """
        self._mode = _effective_mode(mode)
        self._metrics = metrics
        self._folder = folder
        self._run_id = run_id
        given = {
            "WANDB_PROJECT": ("project", project),
            "WANDB_NAME": ("name", name),
            "WANDB_RUN_GROUP": ("group", group),
            "WANDB_TAGS": ("tags", list(tags)),
        }
        self._names: dict[str, Any] = {
            key: value for variable, (key, value) in given.items() if variable not in os.environ
        }
        self._config = dict(config)
        self._alerts: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._warnings = 0
        self._samples: list[Sample] = []
        self._verdict: dict[str, str] = {}
        self._wake = threading.Event()
        self._ending = False
        self._failed = False
        self._patience = _INIT_SECONDS + _FINISH_SECONDS + _GRACE_SECONDS
        # A daemon thread, because a crash of the training must not wait for it.
        self._thread = threading.Thread(target=self._work, name="wandb-logger", daemon=True)
        if self._mode != "disabled":
            self._thread.start()

    def sync(self) -> None:
        """Have the thread send the new rows; return at once."""
        self._wake.set()

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """Have W&B send an alert, by mail or Slack as its users chose; return at once.

        Args:
            title: the finding in a few words.
            text: the whole finding.
            again: whether an earlier start has sent it. The server has it then; a new offline folder, which replaces
                the earlier one, does not.
        """
        self._warnings += 1
        if not (again and self._mode == "online"):
            self._alerts.put((title, text))
            self._wake.set()

    def samples(self, samples: Sequence[Sample]) -> None:
        """Log the samples as a table beside the last row (called after the last row and before `finish`)."""
        self._samples = list(samples)

    def verdict(self, word: str, text: str) -> None:
        """Put the verdict into the summary, by which W&B sorts and filters runs (called before `finish`)."""
        self._verdict = {"verdict": word, "verdict_text": text}

    def finish(self) -> None:
        """Send what is left and close the W&B run; give up with a message where W&B does not answer."""
        if self._mode == "disabled" or self._ending:
            return
        self._ending = True
        self._wake.set()
        deadline = time.monotonic() + self._patience
        while self._thread.is_alive() and time.monotonic() < deadline:
            heartbeat.beat("waiting for W&B to take the last rows")  # the watchdog must not take this for a hang
            self._thread.join(min(_BEAT_SECONDS, self._patience))
        if self._thread.is_alive():
            self._report_failure("it does not answer")

    def _work(self) -> None:
        try:
            run = self._open()
            self._follow(run)
            run.summary.update(self._summary())
            run.finish(exit_code=0)
        except BaseException as fault:  # only W&B runs in this thread, and none of its errors may end the training
            self._report_failure(f"{type(fault).__name__}: {(str(fault).splitlines() or ['no message'])[0]}")

    def _open(self) -> "wandb.Run":
        import wandb  # here, because the import takes a second, and a broken W&B must not stop a run

        settings = wandb.Settings(**_settings())
        wandb.setup(settings)  # before the login, which would print messages otherwise
        if self._mode == "offline":
            self._set_aside_offline_folders()
        # prompt=False, because a question on rank 0's terminal would be lost among the messages of a running job.
        elif not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        run = wandb.init(
            id=self._run_id,
            dir=str(self._folder),
            mode="offline" if self._mode == "offline" else "online",
            resume="allow" if self._mode == "online" else None,  # W&B ignores it offline, with a warning
            config=self._config,
            settings=settings,
            **self._names,
        )
        self._patience = max(_FINISH_SECONDS, run.settings.finish_timeout) + _GRACE_SECONDS
        if self._mode == "online":
            self._set_aside_offline_folders()  # only now: this run has taken over their rows
            say(f"W&B: {run.url}")
        else:
            say(f"W&B: offline; upload the run with: wandb sync {run.settings.sync_dir}")
        run.define_metric("step")
        run.define_metric("pairs_seen")
        run.define_metric("*", step_metric="step")
        return run

    def _follow(self, run: "wandb.Run") -> None:
        """Send the rows from the cursor on, until `finish` is called and the file has been read to its end."""
        known = run.step  # the number of rows that the server has; 0 offline
        index = offset = 0
        while True:
            self._wake.clear()
            ending = self._ending  # taken before reading, so that all rows appended before `finish` are read
            rows, offset = self._metrics.rows_after(offset)
            for row in rows:
                if index >= known:
                    values = {key: _wandb_value(value) for key, value in row.items() if key != "kind"}
                    run.log(values, step=index, commit=True)  # commit: the last row must not wait for another one
                index += 1
            while not self._alerts.empty():
                title, text = self._alerts.get()
                run.alert(title=title, text=text, level="WARN")
            if ending:
                if self._samples:
                    run.log({"samples": _table(self._samples)}, step=index, commit=True)
                return
            self._wake.wait()

    def _summary(self) -> dict[str, Any]:
        """Return the best evaluations, the number of warnings and the verdict.

        W&B's own summary has only each metric's last value.
        """
        rows = self._metrics.rows()
        best: dict[str, Any] = {}
        for row in rows:
            for name, value in row.items():
                # NaN compares as neither better nor worse: once it was the best, no value could replace it.
                if row["kind"] == "eval" and name.endswith(BEST_OF) and not math.isnan(value):
                    better = min if name.endswith("loss") else max
                    best[f"best/{name}"] = better(best.get(f"best/{name}", value), value)
        return best | {"health/warnings": self._warnings} | self._verdict

    def _set_aside_offline_folders(self) -> None:
        folder = self._folder / "wandb"
        for earlier in sorted(folder.glob(f"offline-run-*-{self._run_id}")):
            # W&B's service lives a moment longer than a killed process and may write small files under the old name
            # again after the move. A later start then moves those too, so a number makes the name unique.
            superseded = folder / "superseded"
            superseded.mkdir(exist_ok=True)
            earlier.rename(superseded / f"{earlier.name}.{len(list(superseded.iterdir()))}")

    def _report_failure(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            reason = mask_secrets(why)  # the answer of a server or a proxy may repeat parts of the request
            say(f"W&B: off for this start ({reason}). Training goes on, and metrics.jsonl has every row.")


def _wandb_value(value: Any) -> Any:
    """Return a row's value as W&B takes it: counts of margins become its histogram, which needs outer edges."""
    if not isinstance(value, list):
        return value
    import wandb

    edges = (10 * BIN_EDGES[0], *BIN_EDGES, 10 * BIN_EDGES[-1])
    return wandb.Histogram(np_histogram=(value, edges))


def _table(samples: Sequence[Sample]) -> Any:
    """Return the samples as a W&B table, without the columns of rewards where no sample has a reward."""
    import wandb

    rewarded = any(sample.reward_before is not None or sample.reward_after is not None for sample in samples)
    columns = list(Sample._fields if rewarded else Sample._fields[:3])
    return wandb.Table(columns=columns, data=[list(sample[: len(columns)]) for sample in samples])


def _effective_mode(mode: str) -> str:
    assert mode in ("online", "offline", "disabled"), mode
    override = os.environ.get("WANDB_MODE")
    if override is None:
        return mode
    if override not in _MODES:
        # Disabled, not the configured mode: the variable may have been set to keep all data on this machine.
        say(f"W&B: disabled, as WANDB_MODE={override} is not online, offline or disabled")
        return "disabled"
    if _MODES[override] != mode:
        say(f"W&B: WANDB_MODE={override} overrides tracking.wandb.mode={mode}")
    return _MODES[override]


def _settings() -> dict[str, Any]:
    """Return W&B's settings for no output, console capture, code or git; the environment overrides each of them."""
    settings: dict[str, Any] = {
        "quiet": True,
        "silent": True,
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "save_code": False,
        "init_timeout": _INIT_SECONDS,
        "finish_timeout": _FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    return {key: value for key, value in settings.items() if f"WANDB_{key.upper()}" not in os.environ}
