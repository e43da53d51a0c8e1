"""The benchmark of `inspect` finds what it planted."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import REPOSITORY


@pytest.mark.slow
def test_the_benchmark_finds_what_it_planted() -> None:
    command = [sys.executable, "-m", "benchmarks.inspect", "--pairs", "3004", "--words", "3"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "found: 12 contradictions, 4 duplicates, 4 empty_response, 3 eval_pairs, 3 eval_prompts, all that" in said
