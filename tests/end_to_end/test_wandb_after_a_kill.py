"""W&B offline: the newest folder holds every row once after a kill."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import wandb_reader

from prefopt_dist.monitoring.metrics_file import MetricsFile


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("WANDB_") or name == "RANK"]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests


def _row(file: MetricsFile, step: int, kind: str = "train", **metrics: float) -> None:
    file.append(kind, step, step / 10, step * 4, {f"{kind}/loss": 1 / (step + 1), **metrics})


_KILLED = """
import sys, time
from pathlib import Path
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.wandb_logger import WandbLogger
run = Path(sys.argv[1])
metrics = MetricsFile(run / "metrics.jsonl")
logger = WandbLogger(mode="offline", project="prefopt", name=None, group=None, tags=(), run_id="abc123",
                      folder=run, config={}, metrics=metrics)
for step in range(1, 401):
    metrics.append("train", step, step / 10, step * 4, {"train/loss": 1 / step})
    logger.sync()
until = time.monotonic() + 400
while not list(run.glob("wandb/offline-run-*/run-*.wandb")):
    if time.monotonic() > until:
        sys.exit("no .wandb file within 400 s")
    time.sleep(0.05)
time.sleep(1)
print("fed", flush=True)
time.sleep(600)
"""


def test_offline_the_newest_folder_holds_every_row_once_after_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    killed = subprocess.Popen([sys.executable, "-c", _KILLED, str(run)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    said = iter(killed.stdout.readline, "")
    assert any(line == "fed\n" for line in said)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    metrics = MetricsFile(run / "metrics.jsonl")
    metrics.truncate_to(300)  # the checkpoint's step
    (run / "wandb" / "offline-run-20200101_000000-other").mkdir()  # not of this run: stays
    logger = wandb_reader.logger(run, metrics)
    for step in range(301, 421):
        _row(metrics, step)
        logger.sync()
    _row(metrics, 420, "eval", **{"eval/odd": math.nan})
    logger.finish()
    logger.finish()  # again: nothing
    wandb.teardown()  # as the end of a process does: W&B's service may write for a moment after the run's end

    # Folders with a .wandb file: the killed process's service, dying late, may leave one without.
    (newest,) = {path.parent for path in (run / "wandb").glob("offline-run-*-abc123/*.wandb")}
    assert len(list((run / "wandb" / "superseded").glob("offline-run-*-abc123.0/*.wandb"))) == 1
    assert (run / "wandb" / "offline-run-20200101_000000-other").exists()
    # What `wandb sync RUN/wandb` would take: the folders that hold a .wandb file, one deep.
    assert {path.resolve().parent for path in (run / "wandb").glob("*/*.wandb")} == {newest.resolve()}
    ids, rows = wandb_reader.history(newest)
    assert ids == {"abc123"}
    truth = metrics.rows()
    assert len(truth) == 421
    assert [row["_step"] for row in rows] == list(range(421))
    for row, true in zip(rows, truth, strict=True):
        sent = {key: value for key, value in row.items() if not key.startswith("_")}
        del true["kind"]
        assert sent == pytest.approx(true, rel=0, abs=0, nan_ok=True)
