"""What a run folder says of its run; read while the run goes on or after it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist.config.schema import Health
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, findings
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint that is still there."""

    step: int
    committed: str
    gib: float


@dataclass(frozen=True)
class Record:
    """A run folder, read once."""

    path: Path
    facts: dict[str, Any]
    """run.json"""
    config: dict[str, Any]
    config_text: str
    """config.yaml, whose secrets are masked already"""
    rows: list[Row]
    checkpoints: list[Checkpoint]
    state: str
    """In a few words: done, stopped and why, or where it is"""
    done: bool
    found: list[HealthFinding]
    active: set[str]
    """Ids of the rules that have not recovered"""
    evaluation: dict[str, Any] | None
    """evaluation.json"""
    inspection: dict[str, Any] | None
    """inspection.json"""
    samples: list[dict[str, Any]]
    """answers.jsonl: prompts and their answers before and after, with rewards where there are any"""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def train(self) -> list[Row]:
        """The rows of training."""
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def evals(self) -> list[Row]:
        """The rows of evaluation."""
        return [row for row in self.rows if row["kind"] == "eval"]

    @property
    def answers(self) -> list[Row]:
        """The rows of answers, the start's own first."""
        return [row for row in self.rows if row["kind"] == "answers"]

    @property
    def answered(self) -> Row | None:
        """The newest row that tells the policy's answers from the start's."""
        return next((row for row in reversed(self.answers) if "answers/nats" in row), None)

    @property
    def judged(self) -> dict[str, Any] | None:
        """What run.json says of the answers; of a run that goes on again it is not true any more."""
        found: dict[str, Any] | None = self.facts.get("answers") if self.done else None
        return found if found is not None and "verdict" in found else None

    @property
    def eval_sets(self) -> list[str]:
        """Names of the evaluated sets; '' for the unnamed one."""
        sets: dict[str, None] = {}
        for row in self.evals:
            for name in row:
                if name.startswith("eval/") and name.endswith("/loss"):
                    sets[name.removeprefix("eval/").removesuffix("loss").rstrip("/")] = None
        return list(sets)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was to have; None where it never came to training."""
        told = self.facts.get("training")
        return None if told is None else int(told["total_steps"])


def read_run(path: Path, key: str) -> Record:
    """Reads a run folder; key: of the configuration, for the user's mistake."""
    if not (path / "run.json").exists():
        raise UserError(f"{key}: {path} holds no run. Give the folder of one.")
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
        found=found,
        active=active,
        evaluation=_optional(path / "evaluation.json"),
        inspection=_optional(path / "inspection.json"),
        samples=_lines(path / "answers.jsonl"),
    )


def _optional(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


def _lines(file: Path) -> list[dict[str, Any]]:
    # Not splitlines: it parts at other characters too, such as U+2028 within an answer.
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.exists() else []


def _checkpoints(root: Path) -> list[Checkpoint]:
    found = []
    for folder in sorted(root.glob("step-????????")):
        with suppress(FileNotFoundError):  # the run goes on, and removes older ones
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.append(Checkpoint(int(folder.name[5:]), _time(folder.stat().st_mtime), size / 2**30))
    return found


def _state(path: Path, rows: list[Row], done: bool) -> str:
    if done:
        return "done"
    if (path / "STOPPED").exists():
        return f"stopped: {(path / 'STOPPED').read_text().strip()}"
    if not rows:
        return "not yet in training"
    return f"not finished: its last row was written at {_time((path / 'metrics.jsonl').stat().st_mtime)}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
