"""Cost of the diagnosis and the health rules per step: python -m benchmarks.monitoring.

It measures their CPU seconds on one thread for a step of the benchmark: the sums of each micro-batch, the numbers of a
row, and the rules in a run with 10,000 rows. Their share is relative to the step's time in benchmarks/results/cpu.json.
The tests on several ranks count the collectives and host reads of a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import Shape
from benchmarks.ours import tokenised
from benchmarks.world import Task
from prefopt_dist.batching.packing import pack
from prefopt_dist.config.schema import Health
from prefopt_dist.data.unit import Unit
from prefopt_dist.monitoring.health import RunFacts, Watch
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.objectives import DPO, Sequences
from prefopt_dist.training.diagnosis import Diagnosis

ROWS, PAIRS = 10_000, 8
REPEATS = 200
RESULTS = Path(__file__).parent / "results" / "cpu.json"


def main() -> int:
    """Print the table; return 1 where the share is 1 % or more."""
    torch.set_num_threads(1)
    shape = Shape(vocabulary=512, hidden=8, mlp=8, layers=1, heads=1, key_value_heads=1, head_size=8, tied=True)
    task = Task(shape, "ultrafeedback-like", PAIRS, 1, 0, "cpu", 0)
    rows = tokenised(task)
    units = [Unit(i, rows.prompt(i), (rows.response(i, 0), rows.response(i, 1))) for i in range(PAIRS)]
    batch = pack(units, 2)
    counts = batch.counts[batch.units]
    reference = -counts.double()
    sums = (reference + torch.randn(PAIRS, 2, dtype=torch.float64)).requires_grad_()
    objective = DPO(0.1)
    terms = objective(Sequences(sums, counts, reference))
    diagnosis = Diagnosis(objective, rows, torch.device("cpu"))
    micro_batch = _seconds(lambda: diagnosis.add(objective, terms, batch, reference))
    packed = diagnosis.take().tolist()
    row = _seconds(lambda: diagnosis.metrics(packed))
    rules = _rules(diagnosis.metrics(packed))
    print(f"a micro-batch's sums   {1e3 * micro_batch:7.3f} ms")
    print(f"a row's numbers        {1e3 * row:7.3f} ms")
    print(f"the rules, a row       {1e3 * rules:7.3f} ms   after {ROWS} rows, reading and parsing the row included")
    worst = 0.0
    for name, step, micro_batches in _steps():
        share = (micro_batches * micro_batch + row + rules) / step
        worst = max(worst, share)
        print(f"{name:45} {step:6.2f} s a step, {micro_batches} micro-batches: {share:.3%}")
    print("under 1%" if worst < 0.01 else "NOT under 1%")
    return 0 if worst < 0.01 else 1


def _seconds(what: Callable[[], Any]) -> float:
    """Return the CPU seconds of one call."""
    what()
    began = time.process_time()
    for _ in range(REPEATS):
        what()
    return (time.process_time() - began) / REPEATS


def _rules(found: dict[str, Any]) -> float:
    """Return the CPU seconds of the rules for one more row at the end of a long run."""
    draw = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsFile(Path(folder) / "metrics.jsonl")

        def append(step: int) -> None:
            values = {f"train/{name}": value for name, value in found.items()}
            values |= {"train/loss": 0.6, "train/rewards/accuracies": 0.7, "train/grad_norm": float(draw.rand())}
            values |= {"train/rewards/chosen": 0.1, "train/rewards/rejected": -0.1, "perf/memory_gib": 9.0}
            metrics.append("train", step, step / ROWS, PAIRS * step, values)

        for step in range(1, ROWS):
            append(step)
        watch = Watch(metrics, RunFacts(ROWS, 1, 0.693), Health(), [], lambda new, found: None)
        watch.look()
        spent = 0.0
        for step in range(ROWS, ROWS + 50):
            append(step)
            began = time.process_time()
            watch.look()
            spent += time.process_time() - began
        return spent / 50


def _steps() -> list[tuple[str, float, int]]:
    """Return name, CPU seconds and number of micro-batches of the steps that were measured."""
    found = []
    for mix, result in json.loads(RESULTS.read_text())["mixes"].items():
        for which, budget in (("ours", 8192), ("ours-small", 2048)):
            # One more than the tokens need, since groups do not fill a micro-batch.
            micro_batches = int(PAIRS * result["tokens_per_pair"] / budget) + 2
            found.append((f"{mix}, {budget} tokens", result["rows"][which]["step_seconds"], micro_batches))
    return found


if __name__ == "__main__":
    sys.exit(main())
