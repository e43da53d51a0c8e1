"""What is called a spike: by hand, and the same after a resume."""

import math
import random

import pytest
import torch

from prefopt_dist.training.skipped_updates import FEWEST, WINDOW, SpikeDetector


def judged(spikes: SpikeDetector, norm: float) -> bool:
    """One step as training makes it: an update that is no spike and is finite is remembered."""
    spike = bool(spikes.judge(torch.tensor(norm)))
    if not spike and math.isfinite(norm):
        spikes.remember()
    return spike


def test_a_ratio_to_the_median() -> None:
    """Median 2 of 1, 2, 100: an earlier outlier does not hide the next."""
    spikes = SpikeDetector(3.0, [1.0, 2.0, 100.0] * 6)
    assert not judged(spikes, 6.0)
    assert judged(spikes, 6.1)
    assert spikes.why() == "the gradient norm 6.1 is 3.05 times the median of the last 19"
    assert spikes.norm == torch.tensor(6.1)


def test_nothing_is_a_spike_at_first() -> None:
    spikes = SpikeDetector(2.0)
    assert not any(judged(spikes, 10.0**i) for i in range(FEWEST))
    assert spikes.why() is None
    assert judged(spikes, 10.0**FEWEST)


def test_a_spike_is_none_that_others_are_measured_by() -> None:
    """However long it lasts: it is max_skipped_steps that ends it."""
    spikes = SpikeDetector(2.0, [1.0] * FEWEST)
    assert all(judged(spikes, 5.0) for _ in range(WINDOW))
    assert spikes.state() == [1.0] * FEWEST


def test_old_norms_are_forgotten() -> None:
    spikes = SpikeDetector(2.0, [100.0] * WINDOW)
    assert not any(judged(spikes, 1.0) for _ in range(WINDOW))
    assert spikes.state() == [1.0] * WINDOW
    assert judged(spikes, 3.0)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_is_not_finite_is_no_spike(norm: float) -> None:
    """DeepSpeed leaves it out, and the reason is another."""
    spikes = SpikeDetector(2.0, [1.0] * FEWEST)
    judged(spikes, norm)
    assert spikes.why() is None
    assert spikes.state() == [1.0] * FEWEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resume_judges_the_same(dtype: torch.dtype) -> None:
    """Around the limit, to the last bit, from any step."""
    draw = random.Random(0)
    whole = SpikeDetector(1.5)
    for step in range(3 * WINDOW):
        resumed = SpikeDetector(1.5, whole.state())
        norms = torch.tensor([draw.uniform(0.5, 2) for _ in range(8)], dtype=dtype)
        whole.judge(norms[0])
        if whole._limit is not None:
            norms[1], norms[2] = whole._limit, whole._limit.nextafter(torch.tensor(9.0, dtype=dtype))
            assert [bool(resumed.judge(n)) for n in norms[1:3]] == [False, True]
        assert [bool(whole.judge(n)) for n in norms] == [bool(resumed.judge(n)) for n in norms], step
        whole.judge(norms[0])
        whole.remember()


def test_norms_of_a_checkpoint_are_moved_once() -> None:
    """To the device and dtype of the norms that are judged, and not again at every step."""
    spikes = SpikeDetector(2.0, [1.0] * FEWEST)
    spikes.judge(torch.tensor(1.0))
    moved = list(spikes._norms)
    assert {n.dtype for n in moved} == {torch.float32}
    spikes.judge(torch.tensor(1.0))
    assert all(a is b for a, b in zip(moved, spikes._norms, strict=True))
