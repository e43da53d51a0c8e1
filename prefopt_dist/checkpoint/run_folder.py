"""The run folder, which holds one run and the records of it, and is used by one job at a time.

Only rank 0 uses this module.
"""

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
from prefopt_dist.monitoring.console import say

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "wandb")
SHOWN = "shown.json"
"""The file with two rows of data.train as the model sees them, for `report`."""
START_FILES = ("run.json", "config.yaml", "STOPPED", "DONE", SHOWN)
"""The files that a start changes before it does any work."""


class RunFolder:
    """A run folder, whose lock is held while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")
        self._new_run = False
        self._before: dict[str, bytes | None] | None = None
        """Contents of files before this start, to restore them if it is discarded; None once it does work."""
        self._created: list[Path] = []
        """Folders that this start created."""
        self._facts: dict[str, Any] = {}

    @property
    def metrics(self) -> Path:
        """Return the path of metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return the content of run.json."""
        return self._facts

    def check_identity(self, config: Config) -> None:
        """Raise UserError where the folder holds another run; write nothing (the folder need not exist)."""
        if not (self.path / "run.json").exists():
            return
        facts = read_json(self.path / "run.json")
        held = facts.get("identity") if isinstance(facts, dict) else None
        if not isinstance(held, dict):
            raise UserError(
                f"run.dir: {self.path / 'run.json'} has no `identity`, which every run has there. Restore the file, or "
                "choose another run.dir."
            )
        changed = differing_keys(held, json.loads(json.dumps(identity(config))))
        if changed:
            raise UserError(
                f"run.dir: {self.path} holds another run:\n  "
                + "\n  ".join(changed)
                + "\nChoose another run.dir, or set these keys back to continue the run."
            )

    def open(self, config: Config, *, world_size: int, begins: bool = True, bare: bool = False) -> None:
        """Lock the folder, check the run's identity and, where the stage begins or continues the run, note the start.

        Args:
            config: the configuration.
            world_size: the number of ranks.
            begins: whether the stage begins or continues the run. Otherwise it only reads the run, which must exist,
                and leaves its record unchanged.
            bare: whether a stage that does not begin the run also works in a folder without one.

        Raises:
            UserError: the folder holds another run or no run, is locked by another job, or cannot be written.
        """
        self.check_identity(config)
        if not begins and not bare and not (self.path / "run.json").exists():
            raise UserError(f"run.dir: {self.path} holds no run. Name the folder of a run, or train first.")
        self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check_identity(config)  # again, because another run may have begun and ended meanwhile
        except UserError:
            self.close()
            raise
        except OSError as e:
            raise UserError(f"run.dir: {self.path} cannot be written ({e.strerror}). Choose another folder.") from e
        if bare and not (self.path / "run.json").exists():
            self._before, self._new_run = {}, True  # so that `discard_unused` removes everything
            return
        if begins and self.summary() is not None:  # the run is done, and the launcher must not find an earlier stop
            self.clear_earlier_stop()
        if not begins or self.summary() is not None:
            self._facts = read_json(self.path / "run.json")
            return
        self._begin(config, world_size)

    def reopen(self, config: Config, *, world_size: int) -> None:
        """Begin a finished run again, because more work is required of it (called after `open`)."""
        self._begin(config, world_size)

    def clear_earlier_stop(self) -> None:
        """Remove the files of an earlier stop (called after `open` by a stage that does not note its start)."""
        self._before = (self._before or {}) | {"STOPPED": _content(self.path / "STOPPED")}
        (self.path / "STOPPED").unlink(missing_ok=True)
        self._remove_earlier_request()

    def _remove_earlier_request(self) -> None:
        """Remove a STOP that is older than this start, and say so: a person may have meant this start."""
        file = self.path / "STOP"
        if file.exists():
            file.unlink(missing_ok=True)
            say(f"{file} was there before this start and is removed; to stop this start, create it again")

    def _begin(self, config: Config, world_size: int) -> None:
        self._before = {name: _content(self.path / name) for name in START_FILES}
        for name in ("STOPPED", "DONE"):
            (self.path / name).unlink(missing_ok=True)
        self._remove_earlier_request()
        write_atomic(self.path / "config.yaml", to_yaml(config))
        if (self.path / "run.json").exists():
            self._facts = read_json(self.path / "run.json")
        else:
            self._new_run = True
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
        """Put facts into run.json."""
        self._facts |= facts
        write_json(self.path / "run.json", self._facts)

    def note_start_step(self, step: int) -> None:
        """Note the step from which this start goes on; from now on the start counts as used."""
        self._before = None
        *earlier, this = self._facts["starts"]
        self.note(starts=[*earlier, this | {"step": step}])

    def write_stopped(self, why: str, step: int | None, where: str | None = None) -> None:
        """Write STOPPED: the run was stopped on request and can be continued.

        Args:
            why: the request.
            step: the step of the last checkpoint; None before the first one.
            where: the part of the work that was stopped, where it was not a training step.
        """
        parts = [] if step is None else [f"after step {step}, checkpoint committed"]
        at = ", ".join(parts if where is None else [*parts, where])
        write_atomic(self.path / "STOPPED", f"{why}; stopped {at}, {_now()}\n")

    def write_done(self, summary: str) -> None:
        """Write DONE with the summary, the last file of a finished run."""
        write_atomic(self.path / "DONE", summary + "\n")

    def summary(self) -> str | None:
        """Return the text of DONE, or None where the run is not finished."""
        file = self.path / "DONE"
        return file.read_text().rstrip() if file.exists() else None

    def _take_lock(self) -> None:
        """Lock the folder; the kernel releases the lock when the process ends, also after a kill."""
        other = self._lock.acquire()
        if other is not None:
            raise UserError(
                f"run.dir: {self.path} is held by another job ({other}). Wait for it, stop it by creating "
                f"{self.path / 'STOP'}, or choose another run.dir."
            )

    def discard_unused(self) -> None:
        """Undo this start where it has done no work yet (called after a mistake of the user).

        Otherwise the corrected configuration of a first start would be refused as another run.
        """
        if self._before is None or not self._lock.held:
            return
        for name, content in self._before.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                write_atomic(self.path / name, content)
        self._before = None
        if not self._new_run:
            return
        (self.path / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # a folder that is not empty stays
            for folder in self._created:
                folder.rmdir()

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # a run that needs the library is refused elsewhere
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
