"""What is said where torch finds no GPU: no CUDA, no driver, or one that is too old for torch's CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefopt_dist.distributed import driver, ranks
from prefopt_dist.errors import UserError

# In the form of NVIDIA's documentation; no driver was asked.
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "550.54.15"), (OPEN, "580.65.06"), ("?", None), (None, None)])
def test_the_loaded_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, version: str | None
) -> None:
    monkeypatch.setattr(driver, "VERSION_FILE", tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert driver.installed_driver() == version


@pytest.mark.parametrize(
    ("cuda", "version", "words"),
    [
        (None, "580.65.06", ["built without CUDA. Install a torch that is built for CUDA"]),
        ("13.0", None, ["no NVIDIA driver is loaded. Install one, 580 or newer for CUDA 13.0; in a container"]),
        ("13.0", "575.57.08", ["needs NVIDIA's driver 580 or newer, and 575.57.08 is loaded", "whl/cu126", "image"]),
        ("12.6", "470.1.2", ["needs NVIDIA's driver 525 or newer"]),
        ("13.0", "580.65.06", ["CUDA 13.0 with driver 580.65.06. See whether nvidia-smi"]),
        ("14.0", "600.1", ["See whether nvidia-smi"]),
    ],
)
def test_the_refusal_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, version: str | None, words: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(driver, "installed_driver", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PREFOPT_WANT_GPUS", "1")
    with pytest.raises(UserError) as caught:
        ranks.start()
    for word in [*words, "this job must compute on GPUs", "CUDA_VISIBLE_DEVICES= (empty)"]:
        assert word in str(caught.value)
