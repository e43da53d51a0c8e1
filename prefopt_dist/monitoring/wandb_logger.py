"""Weights & Biases, fed from `metrics.jsonl`; training never waits for it and never fails by it.

W&B's step of a row is the row's line index in the file, so its order there is the order here; `step`,
`epoch` and `pairs_seen` are values, and `step` is the axis of the charts. A thread of its own follows the
file: a server that hangs holds up neither the start nor a step.

Where the cursor stands at a start:
- online: at what the server has (`run.step`). Rows that a rollback made again are the same rows.
- offline: at 0. Every start opens a new offline folder, and a killed process's last rows may never have
  reached its folder, so the new one gets the whole run, and earlier ones go to `wandb/superseded/`. They
  must leave `wandb/`: `wandb sync` takes every folder there that holds a `.wandb` file, whatever its name.
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
from prefopt_dist.monitoring.diagnosis import BIN_EDGES
from prefopt_dist.monitoring.loggers import Sample
from prefopt_dist.monitoring.metrics_file import MetricsFile

if TYPE_CHECKING:
    import wandb

_INIT_SECONDS = 90.0
_FINISH_SECONDS = 120.0
_GRACE_SECONDS = 60.0
_BEAT_SECONDS = 5.0
BEST_OF = ("/loss", "/rewards/accuracies", "/rewards/margins")
_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "dryrun": "offline"}


class WandbLogger:
    """One W&B run over all starts of a run folder. Rank 0 alone builds it.

    The environment's `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_NAME`, `WANDB_RUN_GROUP` and `WANDB_TAGS` win
    over the arguments, as they do in W&B's own use; the run's id and folder are ours. The key is W&B's
    business: it is neither read nor written here.
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
        """`folder` is the run folder (W&B makes `wandb/` in it); `config` has its secrets masked already.

        What the run was made of (digests, versions) may stand in the config too: W&B can filter by it.
        """
        self._mode = _agreed_mode(mode)
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
        self._exit_code = 0
        self._patience = _INIT_SECONDS + _FINISH_SECONDS + _GRACE_SECONDS
        # A daemon: a crash of the training must not wait for it.
        self._thread = threading.Thread(target=self._work, name="wandb-feed", daemon=True)
        if self._mode != "disabled":
            self._thread.start()

    def feed(self) -> None:
        """Rows were appended: send them. Returns at once."""
        self._wake.set()

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """Have W&B tell the run's people, by mail or Slack as they chose. Returns at once.

        again: the server has it already; a new offline folder, which takes over from the earlier one, has not.
        """
        self._warnings += 1
        if not (again and self._mode == "online"):
            self._alerts.put((title, text))
            self._wake.set()

    def samples(self, samples: Sequence[Sample]) -> None:
        """A table beside the last row. Before `finish`, after the last row."""
        self._samples = list(samples)

    def verdict(self, word: str, text: str) -> None:
        """Into the summary, by which W&B's table of runs can be sorted and filtered. Before `finish`."""
        self._verdict = {"verdict": word, "verdict_text": text}

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left and close the W&B run; gives up, saying so, where W&B does not answer."""
        if self._mode == "disabled" or self._ending:
            return
        self._exit_code = exit_code
        self._ending = True
        self._wake.set()
        deadline = time.monotonic() + self._patience
        while self._thread.is_alive() and time.monotonic() < deadline:
            heartbeat.beat("waiting for W&B to take the last rows")  # patience is no hang
            self._thread.join(min(_BEAT_SECONDS, self._patience))
        if self._thread.is_alive():
            self._say_failed("it does not answer")

    def _work(self) -> None:
        try:
            run = self._open()
            self._follow(run)
            run.summary.update(self._summary())
            run.finish(exit_code=self._exit_code)
        except BaseException as fault:  # this thread is W&B's alone: whatever it throws ends here
            self._say_failed(f"{type(fault).__name__}: {(str(fault).splitlines() or ['no message'])[0]}")

    def _open(self) -> "wandb.Run":
        import wandb  # not at the top: it costs a second, and a broken W&B must not stop a run

        settings = wandb.Settings(**_settings())
        wandb.setup(settings)  # before the login, which would print otherwise
        if self._mode == "offline":
            self._set_aside_offline_folders()
        # prompt=False: a question on rank 0's terminal would be lost among the messages of a running job.
        elif not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; run `wandb login` or set WANDB_API_KEY, or WANDB_MODE=offline")
        run = wandb.init(
            id=self._run_id,
            dir=str(self._folder),
            mode="offline" if self._mode == "offline" else "online",
            resume="allow" if self._mode == "online" else None,  # offline W&B ignores it, with a warning
            config=self._config,
            settings=settings,
            **self._names,
        )
        self._patience = max(_FINISH_SECONDS, run.settings.finish_timeout) + _GRACE_SECONDS
        if self._mode == "online":
            self._set_aside_offline_folders()  # only now, as this run has taken over what they hold
            say(f"W&B: {run.url}")
        else:
            say(f"W&B: offline; upload with: wandb sync {run.settings.sync_dir}")
        run.define_metric("step")
        run.define_metric("pairs_seen")
        run.define_metric("*", step_metric="step")
        return run

    def _follow(self, run: "wandb.Run") -> None:
        """Send the rows from the cursor on, until the end is asked for and the file is read out."""
        known = run.step  # rows that the server has; 0 offline
        index = offset = 0
        while True:
            self._wake.clear()
            ending = self._ending  # before reading: what was appended before `finish` is then surely read
            rows, offset = self._metrics.rows_after(offset)
            for row in rows:
                if index >= known:
                    values = {key: _shown(value) for key, value in row.items() if key != "kind"}
                    run.log(values, step=index, commit=True)  # commit: the last row must not wait for a next
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
        """What W&B's own summary, each metric's last value, does not say: best evaluations, warnings, verdict."""
        rows = self._metrics.rows()
        best: dict[str, Any] = {}
        for row in rows:
            for name, value in row.items():
                # No value is better or worse than NaN: after one nothing would be the best any more.
                if row["kind"] == "eval" and name.endswith(BEST_OF) and not math.isnan(value):
                    better = min if name.endswith("loss") else max
                    best[f"best/{name}"] = better(best.get(f"best/{name}", value), value)
        return best | {"health/warnings": self._warnings} | self._verdict

    def _set_aside_offline_folders(self) -> None:
        folder = self._folder / "wandb"
        for earlier in sorted(folder.glob(f"offline-run-*-{self._run_id}")):
            # W&B's service outlives a killed process for a moment and may write its small files under the old
            # name again after the move: the rest may come by later, so the name is made unique by a number.
            aside = folder / "superseded"
            aside.mkdir(exist_ok=True)
            earlier.rename(aside / f"{earlier.name}.{len(list(aside.iterdir()))}")

    def _say_failed(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            told = mask_secrets(why)  # what a server or a proxy answers may repeat what it was asked with
            say(f"W&B: off for this start, training goes on and metrics.jsonl has every row ({told})")


def _shown(value: Any) -> Any:
    """A row's value as W&B takes it: counts of margins as its own histogram, which has an end on both sides."""
    if not isinstance(value, list):
        return value
    import wandb

    edges = (10 * BIN_EDGES[0], *BIN_EDGES, 10 * BIN_EDGES[-1])
    return wandb.Histogram(np_histogram=(value, edges))


def _table(samples: Sequence[Sample]) -> Any:
    """Without the columns of rewards where no sample has any."""
    import wandb

    rewarded = any(sample.reward_before is not None or sample.reward_after is not None for sample in samples)
    columns = list(Sample._fields if rewarded else Sample._fields[:3])
    return wandb.Table(columns=columns, data=[list(sample[: len(columns)]) for sample in samples])


def _agreed_mode(mode: str) -> str:
    assert mode in ("online", "offline", "disabled"), mode
    wanted = os.environ.get("WANDB_MODE")
    if wanted is None:
        return mode
    if wanted not in _MODES:
        # Not the configured mode: whoever sets the variable may want that nothing leaves the machine.
        say(f"W&B: disabled, as WANDB_MODE={wanted} is none of online, offline, disabled")
        return "disabled"
    if _MODES[wanted] != mode:
        say(f"W&B: WANDB_MODE={wanted} overrides tracking.wandb.mode={mode}")
    return _MODES[wanted]


def _settings() -> dict[str, Any]:
    """Ours, each unless the environment has it: no output, no console capture, no code, no git."""
    ours: dict[str, Any] = {
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
    return {key: value for key, value in ours.items() if f"WANDB_{key.upper()}" not in os.environ}
