"""The Markdown of a GPU's results, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_table

MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "gpus": 1,
    "memory": 80 * 2**30,
    "driver_and_power_limit": "580.1, 700 W",
    "torch": "2.13.0",
    "cuda": "13.0",
    "date": "2026-12-01",
}


def write(file: Path, *records: tuple[str, str, bool | None, dict[str, Any]]) -> Path:
    lines = [json.dumps({"part": part, "case": case, "ok": ok, **found}) for part, case, ok, found in records]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_what_was_measured_before_an_early_end_is_shown(tmp_path: Path) -> None:
    errors = {"out": 2e-3, "dq": 3e-3, "dk": 3e-3, "dv": 3e-3, "worst_segment": 4e-3}
    file = write(
        tmp_path / "results.jsonl",
        ("machine", "machine", None, MACHINE),
        ("kernel", "d 128, H/J 4, window None, long", True, errors),
        ("kernel", "d 64, H/J 4, window None, long", False, errors | {"dq": 0.5}),
        ("kernel", "end", True, {"seconds": 40.0}),
        ("memory", "training: 24 pairs", False, {"peak": 2 * 2**30, "planned": 2**30, "deviation": -0.5}),
        ("memory", "end", False, {"seconds": 100.0, "why": "ended after 100 s, its time"}),
    )
    text = gpu_table.page(file)
    assert "NVIDIA H100 80GB HBM3 (80 GiB; 1 in the machine; driver and power limit 580.1, 700 W)" in text
    assert "| attention beside float32 | 2 | 1 | 1 | 40 s |" in text
    assert "| memory beside the plan | 1 | 0 | 1 | ended early |" in text
    assert "| speed | not run |  |  |  |" in text
    assert "dq 5.0e-01" in text
    assert (
        "| memory, GiB | peak | planned | plan − peak | kept by forward | planned activations | reserved peak |" in text
    )
    assert "| training: 24 pairs | 2.00 | 1.00 | -50% | — | — | — |" in text
    assert "- memory beside the plan, end: ended after 100 s, its time" in text


def test_speed_and_profile(tmp_path: Path) -> None:
    speed = {"tokens_per_second": 51_234.5, "pairs_per_second": 64.0, "mfu": 0.41, "share_of_matrix_product": 0.5}
    profile = {"idle": 0.125, "shares": {"attention": 1.0}, "top": [{"name": "a|b", "share": 1.0, "calls": 3}]}
    file = write(
        tmp_path / "results.jsonl",
        ("machine", "machine", None, MACHINE),
        ("speed", "steps of 64 pairs", None, speed | {"peak_memory": 40 * 2**30}),
        ("speed", "profile of a step", None, profile),
    )
    text = gpu_table.page(file)
    assert "| steps of 64 pairs | 51,234 | 64.0 | 41.0% | 50.0% | 40.0 |" in text
    assert "profile of a step: the GPU's idle share 12.5%; of the kernels' time: attention 100.0%." in text
    assert "| `a/b` | 100.0% | 3 |" in text


def test_only_the_last_run_counts(tmp_path: Path) -> None:
    file = write(
        tmp_path / "results.jsonl",
        ("machine", "machine", None, MACHINE | {"gpu": "NVIDIA A100"}),
        ("kernel", "end", False, {"seconds": 1.0, "why": "ended with 1"}),
        ("machine", "machine", None, MACHINE),
    )
    text = gpu_table.page(file)
    assert "A100" not in text
    assert "Not as expected" not in text
