"""The run folder: one run, one job at a time, and what is written about it. Rank 0 alone uses this."""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, differing_keys, identity, to_yaml
from prefopt_dist.errors import UserError
from prefopt_dist.files import FileLock, read_json, write_atomic, write_json

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "wandb")
START_FILES = ("run.json", "config.yaml", "STOPPED", "DONE")
"""What a start changes before it does any work."""


class RunFolder:
    """Holds the folder's lock while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")
        self._began = False
        self._before: dict[str, bytes | None] | None = None
        self._made: list[Path] = []
        self._facts: dict[str, Any] = {}

    @property
    def metrics(self) -> Path:
        """metrics.jsonl"""
        return self.path / "metrics.jsonl"

    @property
    def facts(self) -> Mapping[str, Any]:
        """What run.json says."""
        return self._facts

    def check_identity(self, config: Config) -> None:
        """Refuses a folder that holds another run; writes nothing, the folder need not exist."""
        if not (self.path / "run.json").exists():
            return
        facts = read_json(self.path / "run.json")
        held = facts.get("identity") if isinstance(facts, dict) else None
        if not isinstance(held, dict):
            raise UserError(
                f"run.dir: {self.path / 'run.json'} says nothing of its run's identity, as that of every run does; "
                "put the file back, or choose another run.dir."
            )
        changed = differing_keys(held, json.loads(json.dumps(identity(config))))
        if changed:
            raise UserError(
                f"run.dir: {self.path} holds another run:\n  "
                + "\n  ".join(changed)
                + "\nChoose another run.dir, or put these keys back to go on with the run."
            )

    def open(self, config: Config, *, world_size: int, begins: bool = True, bare: bool = False) -> None:
        """Takes the lock, checks the identity; where the stage `begins` or goes on with the run, notes the start.

        A stage that only looks at a run (begins False) changes nothing of its record, and needs one that exists, unless
        a bare folder will do.
        """
        self.check_identity(config)
        if not begins and not bare and not (self.path / "run.json").exists():
            raise UserError(f"run.dir: {self.path} holds no run. Give the folder of one, or train first.")
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check_identity(config)  # again: another run may have begun and ended meanwhile
        except UserError:
            self.close()
            raise
        except OSError as e:
            raise UserError(f"run.dir: {self.path} cannot be written ({e.strerror}). Choose another folder.") from e
        if bare and not (self.path / "run.json").exists():
            self._before, self._began = {}, True  # after a mistake nothing stays
            return
        if begins and self.summary() is not None:  # done: the launcher would take an earlier stop for this start's
            self.starts_beside()
        if not begins or self.summary() is not None:
            self._facts = read_json(self.path / "run.json")
            return
        self._begin(config, world_size)

    def reopen(self, config: Config, *, world_size: int) -> None:
        """After `open`: more is asked of a run that was done, so it begins again and is not done until then."""
        self._begin(config, world_size)

    def starts_beside(self) -> None:
        """After `open`, of a stage that works here and leaves the run's record alone: word of an earlier stop goes."""
        self._before = (self._before or {}) | {"STOPPED": _content(self.path / "STOPPED")}
        for name in ("STOPPED", "STOP"):
            (self.path / name).unlink(missing_ok=True)

    def _begin(self, config: Config, world_size: int) -> None:
        self._before = {name: _content(self.path / name) for name in START_FILES}
        for name in ("STOPPED", "DONE"):
            (self.path / name).unlink(missing_ok=True)
        (self.path / "STOP").unlink(missing_ok=True)  # of an earlier start: it was meant for that one
        write_atomic(self.path / "config.yaml", to_yaml(config))
        if (self.path / "run.json").exists():
            self._facts = read_json(self.path / "run.json")
        else:
            self._began = True
            run_id = secrets.token_hex(4)
            self._facts = {
                "run_id": run_id,
                "wandb_id": run_id,
                "identity": identity(config),
                "starts": [],
                "data": {"train": None, "eval": None},
                "reference": None,
            }
        versions = {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        start = {"world_size": world_size, "time": _now(), "step": None}
        self.note(versions=versions, starts=[*self._facts["starts"], start])

    def note(self, **facts: Any) -> None:
        """Puts facts into run.json."""
        self._facts |= facts
        write_json(self.path / "run.json", self._facts)

    def note_start_step(self, step: int) -> None:
        """The step from which this start goes on; from here on it is no unused one."""
        self._before = None
        *earlier, this = self._facts["starts"]
        self.note(starts=[*earlier, this | {"step": step}])

    def stopped(self, why: str, step: int | None, where: str | None = None) -> None:
        """Leaves word that the run was stopped on request and can go on; where: outside of the steps."""
        parts = [] if step is None else [f"after step {step}, checkpoint committed"]
        at = ", ".join(parts if where is None else [*parts, where])
        write_atomic(self.path / "STOPPED", f"{why}; stopped {at}, {_now()}\n")

    def done(self, summary: str) -> None:
        """The last file of a finished run."""
        write_atomic(self.path / "DONE", summary + "\n")

    def summary(self) -> str | None:
        """What DONE says; None where the run is not finished."""
        file = self.path / "DONE"
        return file.read_text().rstrip() if file.exists() else None

    def _take_lock(self) -> None:
        """The kernel gives the lock back when the process ends, however it ends."""
        other = self._lock.take()
        if other is not None:
            raise UserError(
                f"run.dir: {self.path} is held by another job ({other}). Wait for it, stop it by creating "
                f"{self.path / 'STOP'}, or choose another run.dir."
            )

    def discard_unused(self) -> None:
        """After a mistake of the user before any step of this start: as if it had not been, so it can be mended.

        Otherwise the mended configuration of a first start would be refused as another run.
        """
        if self._before is None or not self._lock.held:
            return
        for name, content in self._before.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                write_atomic(self.path / name, content)
        self._before = None
        if not self._began:
            return
        (self.path / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # what is not empty stays
            for folder in self._made:
                folder.rmdir()

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.give_back()


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # a run that needs it is refused elsewhere
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
