"""Where an export may be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt_dist.checkpoint.export import MARKER, check_target
from prefopt_dist.errors import UserError


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path) -> None:
    check_target(tmp_path / "absent")
    check_target(tmp_path)
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match=r"export\.dir: .* is not an export of this job"):
        check_target(tmp_path)
    (tmp_path / MARKER).write_text("{}")
    check_target(tmp_path)
