"""Steps, tokens, time and disk of a job, from the data's lengths or from the longest allowed rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt_dist.batching.layout import FROZEN_PASSES, TRAINING_PASSES, Cost, group_by_prompt, tokens_and_cost
from prefopt_dist.batching.order import Order
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import MISMATCHED, UnpairedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.objectives import KTO, Objective
from prefopt_dist.planning.memory import MASTER_BYTES, MOMENTS_BYTES
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.reference.scoring_plan import sequences_needed
from prefopt_dist.reference.store import ROW

MAX_ROWS = 20_000
"""Of an epoch that are looked at; the rest is taken to be like them."""


@dataclass(frozen=True)
class Work:
    """What is to be computed."""

    known: bool
    """From the data; else every row has the longest prompt and the longest responses that the settings allow"""
    steps: int | None
    """None where neither the data nor train.max_steps say it"""
    step_tokens: float
    """Distinct tokens of a step, on average"""
    step_flop: float
    """Of a forward pass over them"""
    ahead_flop: float
    """Of the pass before a step; KTO's alone have one"""
    first_pass_tokens: int | None
    """Of what the reference scores, evaluation included; None where the rows are not known or none are scored"""
    first_pass_flop: float
    sequences: int | None
    """That the reference store will hold"""
    evaluation_flop: float
    """Of all evaluations"""


def work_from_rows(
    config: Config, train: TokenisedRows, evals: Mapping[str, TokenisedRows], cost: Cost, objective: Objective
) -> Work:
    """The job's work by its tokenised rows, with an empty reference store."""
    responses = objective.responses
    per_step = config.train.global_batch_pairs
    order = Order.of_run(train.source, train.weights, config.run.seed, per_step)
    steps = order.total_steps(config.train.epochs, config.train.max_steps)
    looked = min(steps, order.steps_per_epoch, max(1, MAX_ROWS // per_step))
    tokens = flop = ahead = 0.0

    def forward(rows: TokenisedRows, indices: Iterable[int], first: int) -> tuple[int, float]:
        units = [_unit(rows, i, range(first, first + responses)) for i in indices]
        return tokens_and_cost(group_by_prompt(units, config.train.micro_batch_tokens), cost)

    for index in range(looked):
        taken = order.step(index).rows.tolist()
        found = forward(train, taken, 0)
        tokens, flop = tokens + found[0], flop + found[1]
        if isinstance(train, UnpairedRows):
            ahead += forward(train, taken, MISMATCHED)[1]
    sets = [train, *evals.values()]
    scored = objective.needs_reference
    scored_tokens, scored_flop, sequences = _scored(config, sets, cost) if scored else (0, 0.0, 0)
    evaluated = 0.0
    for rows in evals.values():
        for first in (0, MISMATCHED) if isinstance(rows, UnpairedRows) else (0,):
            evaluated += forward(rows, range(rows.n), first)[1]
    return Work(
        known=True,
        steps=steps,
        step_tokens=tokens / looked,
        step_flop=flop / looked,
        ahead_flop=ahead / looked,
        first_pass_tokens=scored_tokens if scored else None,
        first_pass_flop=scored_flop,
        sequences=sequences if scored else None,
        evaluation_flop=_evaluations(config, steps) * evaluated,
    )


def worst_case_work(config: Config, cost: Cost, objective: Objective) -> Work:
    """Every row as long as data.max_length lets it be, where the data cannot be read."""
    responses = objective.responses
    prompt = config.data.max_prompt_length
    response = config.data.max_length - prompt
    tokens = prompt + responses * (response - 1)
    draw = np.arange(response, dtype=np.int32)
    unit = Unit(0, np.zeros(prompt, dtype=np.int32), tuple(draw + k for k in range(responses)))
    pairs = config.train.global_batch_pairs
    return Work(
        known=False,
        steps=config.train.max_steps,
        step_tokens=float(pairs * tokens),
        step_flop=pairs * cost.of([unit], tokens),
        ahead_flop=pairs * cost.of([unit], tokens) if isinstance(objective, KTO) else 0.0,
        first_pass_tokens=None,
        first_pass_flop=0.0,
        sequences=None,
        evaluation_flop=0.0,
    )


def training_flop(work: Work, cost: Cost, again: float, frozen: bool = False) -> float:
    """Of one step: the pass before it, forward, backward, and the share `again` of the layers' forward pass once more.

    frozen: without the weights' gradients.
    """
    passes = FROZEN_PASSES if frozen else TRAINING_PASSES
    return work.ahead_flop + passes * work.step_flop + again * min(work.step_flop, cost.per_token * work.step_tokens)


def _unit(rows: TokenisedRows, i: int, responses: Iterable[int]) -> Unit:
    return rows.unit(i, responses)


def _scored(config: Config, sets: Sequence[TokenisedRows], cost: Cost) -> tuple[int, float, int]:
    responses = max(rows.responses for rows in sets)  # a pair's two; KTO's own and mismatched one
    places = list(sequences_needed(sets, responses).values())
    units = [place.unit(sets, i) for i, place in enumerate(places)]
    tokens, flop = tokens_and_cost(group_by_prompt(units, config.reference_micro_batch_tokens), cost)
    return tokens, flop, len(places)


def _evaluations(config: Config, steps: int) -> int:
    every = config.eval.every_steps
    within = (steps - 1) // every if every else 0
    return within + config.eval.at_start + config.eval.at_end


@dataclass(frozen=True)
class Disk:
    """What stands on disk at most, in bytes."""

    checkpoint: int
    """One: master weights and moments (12·Nₜ); the model's own dtype is made of them again"""
    checkpoints: int
    """At a save: those that stay, and the new one before the oldest goes"""
    conversion: int
    """For another number of ranks: master weights and moments whole (12·Nₜ)"""
    export: int
    """The Hugging Face folder (s·N; s·Nₜ where adapters are written alone)"""
    store: int | None
    """The reference's scores, 40 bytes a sequence; None where the sequences are not known"""


def disk_needed(sizes: ModelSizes, keep: int, export_item: int, sequences: int | None, *, merged: bool = False) -> Disk:
    """keep: checkpoints that stay; merged: adapters are exported with their model."""
    states = (MASTER_BYTES + MOMENTS_BYTES) * sizes.trained
    return Disk(
        checkpoint=states,
        checkpoints=(keep + 1) * states,
        conversion=states,
        export=export_item * (sizes.parameters if merged else sizes.trained),
        store=None if sequences is None else ROW.itemsize * sequences,
    )
