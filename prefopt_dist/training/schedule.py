"""The learning rate of each update."""

import math


def learning_rate(update: int, total: int, *, peak: float, shape: str, warmup_ratio: float) -> float:
    """The rate of the 0-based `update` of `total`: a linear warm-up, then linear, cosine or constant.

    No update has a rate of 0: the warm-up starts one step up, and the decay ends one step before 0.
    """
    warmup = math.ceil(warmup_ratio * total - 1e-9)  # 0.07 · 100 is a little more than 7
    if update < warmup:
        return peak * (update + 1) / warmup
    left = (total - update) / (total - warmup)
    if shape == "constant":
        return peak
    if shape == "linear":
        return peak * left
    assert shape == "cosine", shape
    return peak * 0.5 * (1.0 - math.cos(math.pi * left))
