"""Which evaluation is the best, and when there has been none better for too long."""

import math

import pytest

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.training.evaluation import best_step, refuse_unknown, stops


def rows(metric: str, *values: float) -> list[Row]:
    """Evaluations at steps 0, 10, 20 …, with training rows between them."""
    found: list[Row] = []
    for i, value in enumerate(values):
        found.append({"kind": "train", "step": 10 * i, metric: -1.0})
        found.append({"kind": "eval", "step": 10 * i, metric: value})
    return found


def test_a_loss_is_best_low_and_all_else_high() -> None:
    steps = range(0, 100, 10)
    assert best_step(rows("eval/loss", 0.7, 0.5, 0.6), "eval/loss", steps) == 10
    assert best_step(rows("eval/accuracies", 0.7, 0.5, 0.6), "eval/accuracies", steps) == 0
    assert best_step(rows("eval/loss", 0.7, 0.5, 0.6), "eval/loss", [0, 20]) == 20  # of those that have a checkpoint
    assert best_step(rows("eval/loss", 0.5, 0.5), "eval/loss", steps) == 0
    assert best_step(rows("eval/loss", math.nan, 0.9), "eval/loss", steps) == 10
    assert best_step(rows("eval/loss", 0.5), "eval/other", steps) is None


def test_it_stops_after_so_many_without_a_new_best() -> None:
    assert not stops(rows("eval/loss", 0.7, 0.5, 0.6), "eval/loss", 2)
    assert stops(rows("eval/loss", 0.7, 0.5, 0.6, 0.5), "eval/loss", 2)
    assert not stops(rows("eval/loss", 0.7, 0.5, 0.6, 0.49), "eval/loss", 2)
    assert stops(rows("eval/loss", 0.7, math.nan), "eval/loss", 1)
    assert not stops([], "eval/loss", 1)


def test_a_metric_that_no_evaluation_has_is_the_users_mistake() -> None:
    refuse_unknown("eval/loss", "checkpoint.keep_best", {"eval/loss": 1.0})
    with pytest.raises(UserError, match=r"checkpoint\.keep_best: got 'eval/los', .* eval/loss"):
        refuse_unknown("eval/los", "checkpoint.keep_best", {"eval/loss": 1.0})
