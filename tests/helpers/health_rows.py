"""Rows of a run that is well, and what the health rules find in rows."""

from collections.abc import Callable, Sequence
from typing import Any

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health import HealthFinding, RunFacts, findings
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import BIN_EDGES

STEPS, G = 100, 64


FACTS = RunFacts(STEPS, 1, 0.693)


def histogram(margins: Sequence[float]) -> list[int]:
    """Counts of these margins."""
    counts = [0] * (len(BIN_EDGES) + 1)
    for margin in margins:
        counts[sum(margin >= edge for edge in BIN_EDGES)] += 1
    return counts


def train_row(step: int, **changes: Any) -> Row:
    """A row of a run that is well: it learns, its rewards part, its chosen responses keep their probability."""
    part = step / STEPS
    margins = [-0.3 + 0.1 * i * part for i in range(G)]
    row: Row = {
        "kind": "train",
        "step": step,
        "epoch": part,
        "pairs_seen": G * step,
        "train/loss": 0.693 - 0.4 * part,
        "train/rewards/accuracies": 0.5 + 0.35 * part,
        "train/rewards/chosen": 0.5 * part,
        "train/rewards/rejected": -1.0 * part,
        "train/rewards/margins_p10": -0.1 * part,
        "train/rewards/margins_p90": 3.0 * part,
        "train/rewards/margins_histogram": histogram(margins),
        "train/rewards/margins_by_length": 0.2,
        "train/rewards/accuracies_chosen_longer": 0.6 + 0.3 * part,
        "train/rewards/accuracies_chosen_shorter": 0.55 + 0.3 * part,
        "train/lengths/chosen_longer": 0.5,
        "train/lengths/chosen_shorter": 0.45,
        "train/logratio/chosen_per_token": 0.05 * part,
        "train/logratio/rejected_per_token": -0.1 * part,
        "train/logps/chosen_per_token": -1.0 + 0.05 * part,
        "train/reference/accuracies": 0.45,
        "train/reference/accuracies_per_token": 0.55,
        "train/saturated": 0.2 * part,
        "train/grad_norm": 1.0 + 0.1 * (step % 3),
        "perf/memory_gib": 10.0 + 0.01 * (step % 5),
        "perf/slowest_rank": step % 4,
        "perf/slowest_rank_seconds": 1.1,
        "perf/other_ranks_seconds": 1.0,
        "perf/slowest_rank_load": 1.0,
        "perf/step_seconds": 1.5,
    }
    return row | changes


def eval_row(step: int, loss: float, accuracy: float, name: str = "") -> Row:
    prefix = f"eval/{name}/" if name else "eval/"
    return {
        "kind": "eval",
        "step": step,
        "epoch": step / STEPS,
        "pairs_seen": G * step,
        f"{prefix}loss": loss,
        f"{prefix}rewards/accuracies": accuracy,
    }


def found(rows: Sequence[Row], facts: RunFacts = FACTS, **thresholds: float) -> list[HealthFinding]:
    return findings(rows, facts, Health(**thresholds))[0]


def run(change: Callable[[int], dict[str, Any]], last: int = STEPS) -> list[Row]:
    return [train_row(step, **change(step)) for step in range(1, last + 1)]
