"""The job's door for tests of mistakes: many calls of `main` in one process, and what each left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.comm.comm
import pytest
import torch
import worlds
from deepspeed.utils import groups

from prefopt_dist.cli import main
from prefopt_dist.distributed import ranks

LINES = 8
"""What 'one message of a few lines' means."""
HEARTBEATS = ".heartbeats"
"""Left after a crash, which here is a thread that raises: they tell who was where."""
PAIR = {"prompt": "the cat", "chosen_response": "sings", "rejected_response": "sleeps"}


@contextmanager
def one_process_group() -> Iterator[None]:
    """`main` joins one group of a single rank and stays in it, whatever its calls end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what `start` sets is taken back at the end
            patch.delenv(name)
        for name in ("WANDB_MODE", "PREFOPT_CACHE", "PREFOPT_STATUS_FILE"):
            patch.delenv(name, raising=False)
        end = ranks.end
        patch.setattr(ranks, "end", lambda: None)
        ranks.start()
        yield
        end()
        torch.set_flush_denormal(False)  # which `start` has turned on, in this thread alone
    # DeepSpeed would take the groups that are gone for its own.
    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = None


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file's content and every folder (None) below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or not path.is_symlink()
    }


class Door:
    """A world of a small model and 40 pairs, and runs in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.cache = folder / "cache"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def lines(self, name: str, *lines: Any) -> str:
        """A data file of these lines: bytes and strings as they are, all else as JSON."""
        rows = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in lines]
        (self.folder / name).write_bytes(b"".join(row + b"\n" for row in rows))
        return self.path(name)

    def model(self, name: str) -> Path:
        """A copy of the model folder, to be spoilt."""
        return Path(shutil.copytree(self.folder / "model", self.folder / name))

    def run(self, name: str = "run", **sections: dict[str, object]) -> Path:
        """A run's YAML; `sections` go over small defaults."""
        sections["run"] = {"cache": str(self.cache)} | sections.get("run", {})
        file = self.folder / f"{name}.yaml"
        worlds.write_run(
            file, self.folder / "model", self.folder / "pairs.jsonl", self.folder / "runs" / name, **sections
        )
        return file

    def ends(self, run: Path, *overrides: str, stage: str = "train") -> tuple[int, str]:
        """Exit status and stderr of one call."""
        self.capsys.readouterr()
        status = main([stage, str(run), *overrides])
        return status, self.capsys.readouterr().err

    def fails(
        self, words: Sequence[str], *overrides: str, stage: str = "train", early: bool = False, run: Path | None = None
    ) -> str:
        """The message of a call that must end with 2, say all `words` and leave nothing behind.

        early: `--check` must find it too, which is before a queue and before any rank.
        """
        run = run or self.run()
        message = self._refused(words, [*overrides], stage, run)
        if early:
            assert self._refused(words, [*overrides, "--check"], stage, run) == message
        return message

    def _refused(self, words: Sequence[str], arguments: list[str], stage: str, run: Path) -> str:
        before = tree(self.folder)
        status, said = self.ends(run, *arguments, stage=stage)
        assert status == 2, said
        assert said.startswith("error: ")
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        assert len(said.splitlines()) <= LINES, said
        for word in words:
            assert word in said, f"{word!r} is not in: {said}"
        self._nothing_left(before, tree(self.folder))
        return said

    def _nothing_left(self, before: dict[str, bytes | None], after: dict[str, bytes | None]) -> None:
        """All is as it was, but for the lock's word and whole tokenised data sets, which the next start reuses."""
        before, after = ({p: c for p, c in found.items() if HEARTBEATS not in p} for found in (before, after))
        new = after.keys() - before.keys()  # an earlier test's kill may have left a temporary file
        hidden = [path for path in new if Path(path).name.startswith(".") and Path(path).name != ".lock"]
        assert not hidden, hidden

        def told(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
            return {p: c for p, c in found.items() if p.split("/")[0] != "cache" and not p.endswith("/.lock")}

        assert told(after) == told(before)
        tokenised = {path for path in new if path.startswith("cache/tokenised/") and path.count("/") == 2}
        assert all(f"{folder}/manifest.json" in after for folder in tokenised)
        assert all(after.get(path, "gone") == content for path, content in before.items() if not path.endswith(".lock"))
