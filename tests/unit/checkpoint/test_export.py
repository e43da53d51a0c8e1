"""Where an export may be written, and by which ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt_dist.checkpoint.export import MARKER, _make_empty, _make_staging, check_target
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path) -> None:
    check_target(tmp_path / "absent")
    check_target(tmp_path)
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match=r"export\.dir: .* is not an export of this job"):
        check_target(tmp_path)
    (tmp_path / MARKER).write_text("{}")
    check_target(tmp_path)


def test_a_folder_that_a_killed_job_left_on_another_disk_is_not_the_first_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 on a node of its own, where an earlier job has begun an export to the same path."""
    here, first_node = tmp_path / "here/.final.writing", tmp_path / "first-node/.final.writing"
    here.mkdir(parents=True)

    def on_rank_zero(function: Callable[[], Path | None]) -> Path | None:
        made = _make_empty(first_node) if not first_node.exists() else None
        return None if made is None else here / made.name

    monkeypatch.setattr(ranks, "run_on_rank_zero", on_rank_zero)
    monkeypatch.setattr(ranks, "all_gather", lambda sees: [True, sees])
    assert _make_staging(here) == [0]
