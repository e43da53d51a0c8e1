"""Steps, tokens, operations and disk of a job, from the data's lengths or from the longest rows allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching import layout
from prefopt_dist.batching.layout import FROZEN_PASSES, TRAINING_PASSES, Cost, group_by_prompt, tokens_and_cost
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.order import Order, first_rows
from prefopt_dist.batching.packing import gathered_keys, packed_tokens
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import MISMATCHED, has_mismatched
from prefopt_dist.data.unit import Unit
from prefopt_dist.objectives import Objective
from prefopt_dist.planning.memory import MASTER_BYTES, MOMENTS_BYTES
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.reference.scoring_plan import prompt_groups
from prefopt_dist.reference.sequences import sequences_needed
from prefopt_dist.reference.store import ROW

MAX_ROWS = 20_000
"""Rows of an epoch that are read; the others are assumed to be alike."""
PADDED_STEPS = 8
"""Steps that are laid out to measure the padding of the path plain."""


@dataclass(frozen=True)
class Work:
    """The computation that a job does."""

    known: bool
    """Whether the lengths are the data's; else every row has the longest prompt and responses that are allowed"""
    steps: int | None
    """Number of steps; None where neither the data nor `train.max_steps` decides it"""
    step_tokens: float
    """Distinct tokens of a step, on average"""
    step_flop: float
    """FLOP of a forward pass over a step's tokens"""
    ahead_flop: float
    """FLOP of the pass before a step, which only KTO and losses that couple units have"""
    first_pass_tokens: int | None
    """Distinct tokens that the reference scores, evaluation included; None where the rows are not known or no
    reference is needed"""
    first_pass_flop: float
    sequences: int | None
    """Sequences that the reference store will hold; None where they are not known"""
    evaluation_flop: float
    """FLOP of all evaluations"""
    updates_flop: float = 0.0
    """FLOP of all updates of a reference that moves"""
    keys_per_token: float = 1.0
    """Most gathered keys per token of a micro-batch of training, in the steps that were read"""
    data_bytes: int | None = None
    """Disk space of the tokenised rows and of the copies of remote files; None where the rows are not known"""


def work_from_rows(
    config: Config,
    train: TokenisedRows,
    evals: Mapping[str, TokenisedRows],
    cost: Cost,
    objective: Objective,
    path: ComputePath = "shared",
) -> Work:
    """Return the job's work from its tokenised rows, with an empty reference store.

    Args:
        config: the run's configuration.
        train: the training rows.
        evals: the evaluation rows by the name of their set.
        cost: FLOP of the model's forward pass.
        objective: the loss.
        path: how micro-batches are computed.
    """
    per_step = config.train.global_batch_pairs
    order = Order.of_run(train.source, train.weights, config.run.seed, per_step)
    steps = order.total_steps(config.train.epochs, config.train.max_steps)
    sampled_steps = min(steps, order.steps_per_epoch, max(1, MAX_ROWS // per_step))
    tokens = flop = ahead = 0.0
    keys_per_token = most_keys_per_token(
        train, order, sampled_steps, objective.responses_of(train.responses), config.row_tokens, path
    )

    def forward(rows: TokenisedRows, indices: Iterable[int], first: int) -> tuple[int, float]:
        responses = objective.responses_of(rows.responses)
        units = [rows.unit(i, range(first, first + responses)) for i in indices]
        return tokens_and_cost(group_by_prompt(units, config.row_tokens, path), cost, path)

    for index in range(sampled_steps):
        step_rows = order.step(index).rows.tolist()
        step_tokens, step_flop = forward(train, step_rows, 0)
        tokens, flop = tokens + step_tokens, flop + step_flop
        if has_mismatched(train):
            ahead += forward(train, step_rows, MISMATCHED)[1]
        elif objective.couples_units:
            ahead += step_flop
    sets = [train, *evals.values()]
    scored = objective.needs_reference
    every = config.reference.update_every_steps
    due_first = first_rows(order, steps, every)
    scored_tokens, scored_flop, sequences = _scored(config, sets, cost, path, due_first) if scored else (0, 0.0, 0)
    evaluated = 0.0
    for rows in evals.values():
        for first in (0, MISMATCHED) if has_mismatched(rows) else (0,):
            evaluated += forward(rows, range(rows.n), first)[1] * (2 if objective.couples_units else 1)
    # An update scores what a step compares with the reference; the pass of a loss that couples units is the policy's.
    rescored = flop if objective.couples_units else flop + ahead
    return Work(
        known=True,
        steps=steps,
        step_tokens=tokens / sampled_steps,
        step_flop=flop / sampled_steps,
        ahead_flop=ahead / sampled_steps,
        first_pass_tokens=scored_tokens if scored else None,
        first_pass_flop=scored_flop,
        sequences=sequences if scored else None,
        evaluation_flop=_evaluations(config, steps) * evaluated,
        updates_flop=0.0 if every is None else max(0, steps - every) * rescored / sampled_steps,
        keys_per_token=keys_per_token,
    )


def most_keys_per_token(
    train: TokenisedRows, order: Order, steps: int, responses: int, budget: int, path: ComputePath = "shared"
) -> float:
    """Return the most gathered keys per token that a micro-batch can have, by the rows of the first steps.

    Args:
        train: the training rows.
        order: their order.
        steps: number of steps that may be read; no more than MAX_ROWS rows are.
        responses: responses of a unit.
        budget: tokens of a micro-batch.
        path: how they are computed; only on the path shared are keys gathered.
    """
    found = 1.0
    if path != "shared":
        return found
    for index in range(min(steps, order.steps_per_epoch)):
        rows = order.step(index).rows.tolist()
        if index and (index + 1) * len(rows) > MAX_ROWS:
            break
        found = max(found, layout.most_keys_per_token([train.unit(i, range(responses)) for i in rows], budget))
    return found


def padding(train: TokenisedRows, order: Order, steps: int, responses: int, budget: int, world_size: int) -> float:
    """Return the share of padding among the tokens that the first steps compute on the path plain.

    Args:
        train: the training rows.
        order: their order.
        steps: number of steps of the run; no more than PADDED_STEPS are laid out.
        responses: responses of a unit.
        budget: tokens of a micro-batch.
        world_size: number of ranks.
    """
    tokens = padded = 0
    for index in range(min(steps, PADDED_STEPS)):
        units = [train.unit(i, range(responses)) for i in order.step(index).rows.tolist()]
        for by_rank in layout.lay_out(units, world_size, budget, path="plain"):
            tokens += sum(packed_tokens(own, "packed") for own in by_rank)
            padded += sum(packed_tokens(own, "plain") for own in by_rank)
    return 1 - tokens / padded


def worst_case_work(config: Config, cost: Cost, objective: Objective, path: ComputePath = "shared") -> Work:
    """Return the work with every row as long as `data.max_length` allows, for data that cannot be read."""
    unit = longest_unit(config, objective)
    tokens, of_unit = tokens_and_cost([[unit]], cost, path)
    pairs = config.train.global_batch_pairs
    return Work(
        known=False,
        steps=config.train.max_steps,
        step_tokens=float(pairs * tokens),
        step_flop=pairs * of_unit,
        ahead_flop=pairs * of_unit if objective.needs_reference_point or objective.couples_units else 0.0,
        first_pass_tokens=None,
        first_pass_flop=0.0,
        sequences=None,
        evaluation_flop=0.0,
        keys_per_token=gathered_keys([unit], path) / tokens,
    )


def longest_unit(config: Config, objective: Objective, row: int = 0) -> Unit:
    """Return a unit as long as `data.max_length` allows, with two responses where the loss takes more.

    Its prompt differs from that of every other `row`, and its responses share no beginning.
    """
    responses = min(objective.responses, 2)  # beginnings of responses are not computed again
    prompt = config.data.max_prompt_length
    ids = np.arange(config.data.max_length - prompt, dtype=np.int32)
    return Unit(row, np.full(prompt, row, dtype=np.int32), tuple(ids + k for k in range(responses)))


def training_flop(work: Work, cost: Cost, recomputed: float, frozen: bool = False) -> float:
    """Return the FLOP of one step: the pass before it, forward, backward and recomputation.

    Args:
        work: the job's work.
        cost: FLOP of the model's forward pass.
        recomputed: share of the layers whose forward pass is recomputed, 0 to 1.
        frozen: whether the model's weights are frozen and have no gradients.
    """
    passes = FROZEN_PASSES if frozen else TRAINING_PASSES
    layers_flop = min(work.step_flop, cost.per_token * work.step_tokens)
    return work.ahead_flop + passes * work.step_flop + recomputed * layers_flop


def _scored(
    config: Config, sets: Sequence[TokenisedRows], cost: Cost, path: ComputePath, first: NDArray[np.int64] | None
) -> tuple[int, float, int]:
    """Return distinct tokens, FLOP and number of the sequences that the reference scores."""
    responses = max(rows.responses for rows in sets)  # a pair has two; a KTO row has its own and a mismatched one
    sequences = sequences_needed(sets, responses, first)
    tokens, flop = 0, 0.0
    for group in prompt_groups(sequences, sets, config.reference_row_tokens, path):
        of_group = tokens_and_cost([group], cost, path)
        tokens, flop = tokens + of_group[0], flop + of_group[1]
    return tokens, flop, len(sequences)


def _evaluations(config: Config, steps: int) -> int:
    """Return the number of evaluations of a run of `steps` steps."""
    every = config.eval.every_steps
    during_training = (steps - 1) // every if every else 0
    return during_training + config.eval.at_start + config.eval.at_end


@dataclass(frozen=True)
class Disk:
    """The most disk space that a job takes, in bytes."""

    checkpoint: int
    """One checkpoint: master weights and moments (12·Nₜ); the weights in the model's dtype are made from them"""
    checkpoints: int
    """All checkpoints during a save: those that are kept, and the new one before the oldest is deleted"""
    conversion: int
    """Resharding for another number of ranks: the whole master weights and moments (12·Nₜ)"""
    export: int
    """The Hugging Face folder (s·N; s·Nₜ where only adapters are written)"""
    store: int | None
    """The reference store, 40 bytes a sequence; None where the number of sequences is not known"""
    data: int | None = None
    """The tokenised rows and the copies of remote files, both in `run.cache`; None where they could not be read"""


def disk_needed(
    sizes: ModelSizes,
    keep: int,
    export_item: int,
    sequences: int | None,
    *,
    merged: bool = False,
    data: int | None = None,
) -> Disk:
    """Return the disk space that a job takes.

    Args:
        sizes: the model's sizes.
        keep: number of checkpoints that are kept.
        export_item: bytes of a number in the exported weights.
        sequences: number of sequences in the reference store; None where it is not known.
        merged: whether adapters are exported merged into their model.
        data: bytes of the data in the cache; None where they are not known.
    """
    states = (MASTER_BYTES + MOMENTS_BYTES) * sizes.trained
    return Disk(
        checkpoint=states,
        checkpoints=(keep + 1) * states,
        conversion=states,
        export=export_item * (sizes.parameters if merged else sizes.trained),
        store=None if sequences is None else ROW.itemsize * sequences,
        data=data,
    )
