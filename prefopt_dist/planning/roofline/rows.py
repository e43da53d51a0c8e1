"""The micro-batch that a roofline is computed for: one of the run's first step, or one of the longest rows allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt_dist.batching.layout import Cost, group_by_prompt, lay_out, tokens_and_cost
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.order import Order
from prefopt_dist.batching.packing import pack, packed_tokens
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.objectives import Objective
from prefopt_dist.planning.roofline.step import RowFacts
from prefopt_dist.planning.work import longest_unit


@dataclass(frozen=True)
class PlannedRow:
    """A micro-batch, and the operations of its forward pass at least."""

    facts: RowFacts
    forward_flop: float
    micro_batches: float
    """Micro-batches of a rank and step"""


def row_of_first_step(
    config: Config, train: TokenisedRows, cost: Cost, objective: Objective, path: ComputePath, ranks: int
) -> PlannedRow:
    """Return the first rank's first micro-batch of the first step.

    Args:
        config: the run's configuration.
        train: the training rows.
        cost: FLOP of the model's forward pass.
        objective: the loss.
        path: shared or packed.
        ranks: number of ranks.
    """
    order = Order.of_run(train.source, train.weights, config.run.seed, config.train.global_batch_pairs)
    responses = objective.responses_of(train.responses)
    units = [train.unit(i, range(responses)) for i in order.step(0).rows.tolist()]
    layout = lay_out(units, ranks, config.train.micro_batch_tokens, cost, path)
    return _planned(layout[0][0], responses, cost, path, config.train.micro_batch_tokens, len(layout))


def row_of_longest_units(config: Config, cost: Cost, objective: Objective, path: ComputePath, ranks: int) -> PlannedRow:
    """Return a full micro-batch of units that are as long as `data.max_length` allows.

    The arguments are those of `row_of_first_step`.
    """
    budget = config.train.micro_batch_tokens
    longest = longest_unit(config, objective)
    of_rank = max(1, round(config.train.global_batch_pairs / ranks))
    number = max(1, min(of_rank, budget // packed_tokens([longest], path)))
    units = [longest_unit(config, objective, i) for i in range(number)]
    return _planned(units, len(longest.responses), cost, path, budget, of_rank / number)


def _planned(
    units: Sequence[Unit], responses: int, cost: Cost, path: ComputePath, budget: int, micro_batches: float
) -> PlannedRow:
    batch = pack(units, responses, path)
    _, flop = tokens_and_cost(group_by_prompt(units, max(budget, batch.tokens), path), cost, path)
    return PlannedRow(RowFacts.of(batch), flop, micro_batches)
