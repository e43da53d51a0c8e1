"""The line about what a training will do."""

from pathlib import Path

import numpy as np
import pytest

from prefopt_dist.batching.order import Order
from prefopt_dist.commands import train
from prefopt_dist.config import load_config


@pytest.mark.parametrize(("every", "moves"), [(2, True), (5, False), (9, False)])
def test_an_update_that_the_run_does_not_reach_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, moves: bool
) -> None:
    """After the last step nothing is compared with the reference any more."""
    monkeypatch.setattr(train.ranks, "world_size", lambda: 2)
    file = tmp_path / "run.yaml"
    file.write_text("run: {dir: r}\nmodel: {name_or_path: m}\ndata: {train: d}\ntrain: {global_batch_pairs: 4}\n")
    config = load_config(str(file), [f"reference.update_every_steps={every}"])
    text = train._what_comes(config, Order.of_run(np.zeros(20, np.int32), (1.0,), 0, 4), 0, 5)
    assert f"new reference every {every} steps" in text
    assert ("the reference does not move, as the run ends before" in text) is not moves


TWO = np.repeat(np.arange(2, dtype=np.int32), (10, 30))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0, 1.0), ""),
        ((2.5, 0.5), "; an epoch takes 25 rows of the 10 of a.jsonl, 15 rows of the 30 of b.jsonl"),
    ],
)
def test_a_mixture_is_told_in_rows(weights: tuple[float, float], said: str) -> None:
    order = Order(TWO, weights, 0, 4)
    assert sum(taken for taken, _ in order.taken()) == order.rows_per_epoch == len(order.epoch(0))
    assert np.bincount(TWO[order.epoch(0)]).tolist() == [taken for taken, _ in order.taken()]
    assert train._mixture(order, ("a.jsonl", "b.jsonl")) == said
