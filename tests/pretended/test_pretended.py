"""The CUDA paths on a pretended device: the flash call's arguments, no mixed devices, no host synchronisation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_parts
import pretended
import pytest
from models_for_tests import MODELS
from places import REPOSITORY

from benchmarks.gpu_table import last_run


@pytest.mark.slow
def test_parts_of_a_gpu_on_a_pretended_one(tmp_path: Path) -> None:
    """Attention and every family, after a compilation of half a minute on one core."""
    if pretended.missing():
        pytest.skip(f"{pretended.missing()}; would run attention and families on a pretended CUDA device")
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    environment = {k: v for k, v in gpu_parts.environment("cpu").items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, str(Path(pretended.__file__).parent / "pretended_parts.py"), str(tmp_path)],
        env=environment | pretended.environment(pretended.build()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    records = last_run(tmp_path / "results.jsonl")
    assert [r for r in records if r["ok"] is False] == []
    families = [r for r in records if r["part"] == "families"]
    assert len(families) == 2 * len(MODELS)
    assert [r["case"] for r in families if r["sync"]] == []
    # Else the pretended device would find nothing.
    found = json.loads((tmp_path / "found.json").read_text())
    assert "same device" in found["mixed"]
    assert "synchronizing" in found["sync"]
    assert found["launched"] > 1000
