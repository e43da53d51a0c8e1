"""Faults for the tests, with this folder on PYTHONPATH, chosen by PREFOPT_TEST_FAULT.

`raise`: rank 1 raises at its third update. `slow`: a job's first start is slow in the first pass and in the training.
`slow-updates`: it is slow only in the training.
"""

import os
import time
from collections.abc import Callable

PASS_SECONDS = 10.0  # per micro-batch
UPDATE_SECONDS = 0.5


def slowed(function: Callable[..., object], seconds: float) -> Callable[..., object]:
    def slow(*arguments: object, **named: object) -> object:
        time.sleep(seconds)
        return function(*arguments, **named)

    return slow


fault = os.environ.get("PREFOPT_TEST_FAULT")
if fault == "raise" and os.environ.get("RANK") == "1":
    from prefopt_dist.training import step

    whole, updates = step.optimizer_step, []

    def update(*arguments: object) -> object:
        updates.append(1)
        if len(updates) == 3:
            raise RuntimeError("raised for the test")
        return whole(*arguments)  # type: ignore[arg-type]

    step.optimizer_step = update  # type: ignore[assignment]
elif fault in ("slow", "slow-updates") and "RANK" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from prefopt_dist.reference import first_pass
    from prefopt_dist.training import step

    if fault == "slow":
        first_pass._sums = slowed(first_pass._sums, PASS_SECONDS)  # type: ignore[assignment]
    step.optimizer_step = slowed(step.optimizer_step, UPDATE_SECONDS)  # type: ignore[assignment]
