"""The content of a run folder for the report, which is read during or after the run."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist.checkpoint.run_folder import SHOWN
from prefopt_dist.config.schema import Health
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, findings
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row


@dataclass(frozen=True)
class CheckpointFolder:
    """A committed checkpoint that still exists."""

    step: int
    committed: str
    gib: float


@dataclass(frozen=True)
class Record:
    """The content of a run folder at one time."""

    path: Path
    facts: dict[str, Any]
    """The content of run.json."""
    config: dict[str, Any]
    config_text: str
    """The text of config.yaml, in which secrets are masked."""
    rows: list[Row]
    checkpoints: list[CheckpointFolder]
    state: str
    """A short text: done, stopped with the reason, or the progress."""
    done: bool
    findings: list[HealthFinding]
    active: set[str]
    """The ids of the rules that have not recovered."""
    evaluation: dict[str, Any] | None
    """The content of evaluation.json."""
    inspection: dict[str, Any] | None
    """The content of inspection.json."""
    shown: list[dict[str, Any]]
    """The content of shown.json: rows of data.train as the model sees them."""
    samples: list[dict[str, Any]]
    """The content of answers.jsonl: prompts with their answers before and after training, and rewards if any."""

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.resolve().name

    @property
    def train(self) -> list[Row]:
        """Return the rows of training."""
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def evals(self) -> list[Row]:
        """Return the rows of evaluation."""
        return [row for row in self.rows if row["kind"] == "eval"]

    @property
    def answers(self) -> list[Row]:
        """Return the rows of answers, the start's own row first."""
        return [row for row in self.rows if row["kind"] == "answers"]

    @property
    def answered(self) -> Row | None:
        """Return the newest row that has the policy's answers beside the start's, or None."""
        return next((row for row in reversed(self.answers) if "answers/nats" in row), None)

    @property
    def judged(self) -> dict[str, Any] | None:
        """Return the entry `answers` of run.json with the verdict, or None.

        It is None too for a run that was continued after its verdict, which is about another model then.
        """
        entry: dict[str, Any] | None = self.facts.get("answers") if self.done else None
        return entry if entry is not None and "verdict" in entry else None

    @property
    def eval_sets(self) -> list[str]:
        """Return the names of the evaluated sets, '' for the unnamed one."""
        sets: dict[str, None] = {}
        for row in self.evals:
            for name in row:
                if name.startswith("eval/") and name.endswith("/loss"):
                    sets[name.removeprefix("eval/").removesuffix("loss").rstrip("/")] = None
        return list(sets)

    @property
    def total_steps(self) -> int | None:
        """Return the number of steps of the whole run; None where it has not begun training."""
        training = self.facts.get("training")
        return None if training is None else int(training["total_steps"])


def read_run(path: Path, key: str) -> Record:
    """Read a run folder.

    Args:
        path: the folder.
        key: the key of the configuration that names it, for the message of an error.

    Raises:
        UserError: the folder holds no run.
    """
    if not (path / "run.json").exists():
        raise UserError(f"{key}: {path} holds no run (it has no run.json). Name the folder of a run.")
    facts: dict[str, Any] = read_json(path / "run.json")
    config_text = (path / "config.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(config_text)
    rows = MetricsFile(path / "metrics.jsonl").rows()
    found: list[HealthFinding] = []
    active: set[str] = set()
    if "training" in facts:
        found, active = findings(rows, RunFacts(**facts["training"]), Health(**config.get("health", {})))
    done = (path / "DONE").exists()
    return Record(
        path=path,
        facts=facts,
        config=config,
        config_text=config_text,
        rows=rows,
        checkpoints=_checkpoints(path / "checkpoints"),
        state=_state(path, rows, done),
        done=done,
        findings=found,
        active=active,
        evaluation=_read_json_if_any(path / "evaluation.json"),
        inspection=_read_json_if_any(path / "inspection.json"),
        shown=_read_json_if_any(path / SHOWN) or [],
        samples=_read_json_lines(path / "answers.jsonl"),
    )


def _read_json_if_any(file: Path) -> Any:
    return read_json(file) if file.exists() else None


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    # Not `splitlines`, which also splits at other characters, such as U+2028 within an answer.
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.exists() else []


def _checkpoints(root: Path) -> list[CheckpointFolder]:
    checkpoints = []
    for folder in sorted(root.glob("step-????????")):
        with suppress(FileNotFoundError):  # a running job may remove a checkpoint meanwhile
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            checkpoints.append(CheckpointFolder(int(folder.name[5:]), _time(folder.stat().st_mtime), size / 2**30))
    return checkpoints


def _state(path: Path, rows: list[Row], done: bool) -> str:
    if done:
        return "done"
    if (path / "STOPPED").exists():
        return f"stopped: {(path / 'STOPPED').read_text().strip()}"
    if not rows:
        return "training has not begun"
    return f"not finished: its last row of metrics was written at {_time((path / 'metrics.jsonl').stat().st_mtime)}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
