"""The CUDA paths on a pretended device: the flash call's arguments, no mixed devices, no host synchronisation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
from models_for_tests import MODELS
from places import REPOSITORY

from benchmarks.gpu_table import last_run


def run(script: str, out: Path) -> None:
    """Run a script of this folder to its end on the pretended device."""
    done = subprocess.run(
        [sys.executable, str(Path(pretended.__file__).parent / script), str(out)],
        env=pretended.whole_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_parts_of_a_gpu_on_a_pretended_one(tmp_path: Path) -> None:
    """Attention and every family, after a compilation of half a minute on one core."""
    if pretended.missing():
        pytest.skip(f"{pretended.missing()}; would run attention and families on a pretended CUDA device")
    run("pretended_parts.py", tmp_path)
    records = last_run(tmp_path / "results.jsonl")
    assert [r for r in records if r["ok"] is False] == []
    families = [r for r in records if r["part"] == "families"]
    assert len(families) == 2 * len(MODELS)
    assert [r["case"] for r in families if r["sync"]] == []
    # Else the pretended device would find nothing.
    found = json.loads((tmp_path / "found.json").read_text())
    assert "same device" in found["mixed"]
    assert "synchronizing" in found["sync"]
    # Soft-capped attention of Gemma 2 by blocks, and flash attention's one call for all segments without the cap.
    print(f"kernels of three layers: {found['gemma2']:,} with the cap, {found['flash']:,} without")
    assert 1000 < found["gemma2"] < 1300
    assert 500 < found["flash"] < 650


@pytest.mark.slow
def test_bytes_that_a_forward_pass_keeps(tmp_path: Path) -> None:
    """Five shapes of batches, by the flash kernel and by blocks, with no and with every layer recomputed."""
    if pretended.missing():
        pytest.skip(f"{pretended.missing()}; would count memory on a pretended CUDA device")
    file = tmp_path / "memory.json"
    run("pretended_memory.py", file)
    records = json.loads(file.read_text())
    assert len(records) == 2 * 2 * 5
    for r in records:
        r["deviation"] = r["estimated"] / r["kept"] - 1
        print(
            f"{r['family']}, {r['checkpointed']} of 4 recomputed, {r['batch']}: {r['kept'] / 2**20:.2f} MiB kept, "
            f"{r['deviation']:+.1%} estimated; peak {r['peak_of_backward'] / r['estimated_peak']:.2f} of the estimate"
        )
    assert [r for r in records if abs(r["deviation"]) > 0.1] == []
    # The gradients that live within a layer's backward pass are not in the estimate.
    assert [r for r in records if r["peak_of_backward"] > 1.1 * r["estimated_peak"]] == []
