"""The order of the rows is the same in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from places import REPOSITORY

from prefopt_dist.batching.order import Order


def order(*sizes: int, weights: tuple[float, ...] | None = None, seed: int = 0, g: int = 4) -> Order:
    source = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return Order(source, weights or (1.0,) * len(sizes), seed, g)


def test_order_is_the_same_in_another_process() -> None:
    here = order(40, 5, weights=(1.0, 2.5), seed=11).epoch(2).tolist()
    code = (
        "import numpy as np; from prefopt_dist.batching.order import Order; "
        "print(Order(np.repeat([0, 1], [40, 5]).astype(np.int32), (1.0, 2.5), 11, 9).epoch(2).tolist())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip().splitlines()[-1] == str(here)
