"""The run folder: one run, one job at a time, and what is written about it. Rank 0 alone uses this."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, differing, identity, to_yaml
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, write_atomic, write_json

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "wandb")


class RunFolder:
    """Holds the folder's lock while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._began = False
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
        held: dict[str, Any] = read_json(self.path / "run.json")["identity"]
        changed = differing(held, json.loads(json.dumps(identity(config))))
        if changed:
            raise UserError(
                f"run.dir: {self.path} holds another run:\n  "
                + "\n  ".join(changed)
                + "\nChoose another run.dir, or put these keys back to go on with the run."
            )

    def open(self, config: Config, *, world_size: int, begins: bool = True) -> None:
        """Takes the lock, checks the identity; where the stage `begins` or goes on with the run, notes the start.

        A stage that only looks at a run (begins False) needs one that exists and changes nothing of its record.
        """
        self.check_identity(config)
        if not begins and not (self.path / "run.json").exists():
            raise UserError(f"run.dir: {self.path} holds no run. Give the folder of one, or train first.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check_identity(config)  # again: another run may have begun and ended meanwhile
        except UserError:
            self.close()
            raise
        except OSError as e:
            raise UserError(f"run.dir: {self.path} cannot be written ({e.strerror}). Choose another folder.") from e
        if not begins or self.summary() is not None:
            self._facts = read_json(self.path / "run.json")
            return
        (self.path / "STOPPED").unlink(missing_ok=True)
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
        versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        start = {"world_size": world_size, "time": _now(), "step": None}
        self.note(versions=versions, starts=[*self._facts["starts"], start])

    def note(self, **facts: Any) -> None:
        """Puts facts into run.json."""
        self._facts |= facts
        write_json(self.path / "run.json", self._facts)

    def note_start_step(self, step: int) -> None:
        """The step from which this start goes on."""
        *earlier, this = self._facts["starts"]
        self.note(starts=[*earlier, this | {"step": step}])

    def stopped(self, why: str, step: int | None) -> None:
        """Leaves word that the run was stopped on request and can go on."""
        at = "in the first pass" if step is None else f"after step {step}, checkpoint committed"
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
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(self._lock, 500).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"run.dir: {self.path} is held by another job ({other}). Wait for it, stop it by creating "
                f"{self.path / 'STOP'}, or choose another run.dir."
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"host {socket.gethostname()}, process {os.getpid()}, since {_now()}".encode())

    def discard_unused(self) -> None:
        """After a mistake of the user in a run's very first start: as if it had not been, so it can be mended.

        Otherwise the mended configuration would be refused as another run.
        """
        if not self._began or self._lock is None or (self.path / "metrics.jsonl").exists():
            return
        for name in ("run.json", "config.yaml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
