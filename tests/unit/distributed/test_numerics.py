"""The environment that train.deterministic needs; end_to_end/test_deterministic.py has its effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds

from prefopt_dist.cli import main
from prefopt_dist.distributed import numerics
from prefopt_dist.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":16:8"), ("NCCL_ALGO", "Tree"), ("NCCL_NVLS_ENABLE", "1")]
)
def test_a_contradicting_environment_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    needed = numerics.DETERMINISTIC_ENVIRONMENT[name]
    with pytest.raises(UserError, match=rf"^train\.deterministic: {name} is '{value}' .* must be '{needed}'; unset"):
        numerics.check_deterministic_environment()


def test_the_check_before_the_ranks_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    worlds.write_run(run, tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert main(["train", str(run), "train.deterministic=true", "--check"]) == 2
    assert "train.deterministic: NCCL_ALGO is 'Tree'" in capsys.readouterr().err
