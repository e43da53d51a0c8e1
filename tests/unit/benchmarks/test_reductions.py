"""The errors of sums over ranks that docs/performance.md states."""

from __future__ import annotations

from benchmarks.reductions import errors


def test_in_bfloat16_the_error_grows_with_the_ranks_and_in_float32_it_is_none() -> None:
    few, many = errors(2), errors(64)
    assert 1e-3 < few["bfloat16"] < 3e-3  # one rounding of 8 bits
    assert many["bfloat16"] > 3 * few["bfloat16"]
    assert max(few["float32"], many["float32"]) < 1e-7
