"""On PYTHONPATH in the test of a crash: rank 1 raises at its third update."""

import os

if os.environ.get("PREFOPT_TEST_FAULT") and os.environ.get("RANK") == "1":
    from prefopt_dist.training import step

    whole, updates = step.update, []

    def update(*arguments: object) -> object:
        updates.append(1)
        if len(updates) == 3:
            raise RuntimeError("raised for the test")
        return whole(*arguments)  # type: ignore[arg-type]

    step.update = update  # type: ignore[assignment]
