"""The DeepSpeed files that a run names."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import REPOSITORY

from prefopt_dist.errors import UserError
from prefopt_dist.setup import prepare_models


def test_deepspeeds_files_of_the_repository_serve_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "deepspeed_configs/policy_zero3.json"
    usual = prepare_models.zero_settings(str(REPOSITORY / name), "deepspeed.policy")
    monkeypatch.chdir(tmp_path)
    assert prepare_models.zero_settings(name, "deepspeed.policy") == usual
    for other in ("deepspeed_configs/mine.json", "deepspeed_configs/../pyproject.toml"):
        with pytest.raises(UserError, match="does not exist"):
            prepare_models.zero_settings(other, "deepspeed.policy")
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 3, "sub_group_size": 7}}')
    assert prepare_models.zero_settings(name, "deepspeed.policy")["zero_optimization"]["sub_group_size"] == 7
