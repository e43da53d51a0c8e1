"""`train`: run the whole job: first pass where rows are missing, training, checkpoints, export; resumes by itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.layout import FROZEN_PASSES, TRAINING_PASSES
from prefopt_dist.batching.order import Order, first_rows
from prefopt_dist.checkpoint import load, save
from prefopt_dist.checkpoint.manifest import Manifest
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.template import template_name
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import StopRequested
from prefopt_dist.model import compiled_layers
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.fingerprint import refuse_if_changed
from prefopt_dist.model.fusion import Fusion
from prefopt_dist.monitoring.console import say
from prefopt_dist.objectives import Objective, factory
from prefopt_dist.objectives.factory import described
from prefopt_dist.planning.machine import device_peak
from prefopt_dist.planning.work import most_keys_per_token, padding
from prefopt_dist.reference.step0_check import RoundingTolerance
from prefopt_dist.setup import (
    choose_fusion,
    own_answers,
    prepare_answers,
    prepare_data,
    prepare_models,
    prepare_policy,
    prepare_reference,
)
from prefopt_dist.setup.check_resume import check_resume
from prefopt_dist.setup.export_run import best_checkpoint
from prefopt_dist.setup.finish_run import finish
from prefopt_dist.setup.open_run import open_log, requests_for, run_folder
from prefopt_dist.setup.own_answers import NotAnswered, OwnAnswers
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import HashedWeights, adapter_base
from prefopt_dist.training import loop
from prefopt_dist.training.job import Intervals, Job
from prefopt_dist.training.moving_reference import MovingReference
from prefopt_dist.training.stop import Requests


@dataclass(frozen=True)
class _Inputs:
    """Models, data and checkpoint that a start found."""

    models: Models
    objective: Objective
    train: TokenisedRows
    evals: dict[str, TokenisedRows]
    """Evaluation sets by name"""
    order: Order
    total_steps: int
    fusion: Fusion
    """How the policy's layers are fused in training"""
    reference: HashedWeights | None
    """None for a loss without a reference"""
    base: HashedWeights | None
    """The frozen weights of a run with adapters, with those of the adapter that it starts from"""
    facts: dict[str, Any]
    """What a resume must find unchanged"""
    checkpoint: Manifest | None
    """The newest sound checkpoint"""


@dataclass(frozen=True)
class _Start:
    """The start's values of data and prompts."""

    train: ScoredRows
    evals: dict[str, ScoredRows]
    answers: OwnAnswers | NotAnswered
    seconds: float
    """Time of the start's answers"""


def run(config: Config, asked: Requests | None = None) -> None:
    """Train (all ranks call it).

    Args:
        config: the resolved configuration.
        asked: requests to the rounds that this run is a part of; None: requests to this run.
    """
    with run_folder(config, begins=True) as folder:
        finished = ranks.run_on_rank_zero(folder.summary)
        if finished is not None:
            say(f"{config.run_dir} is done:\n{finished}")
            return
        requests = asked or requests_for(config)
        inputs = _load_inputs(config, folder)
        if ranks.rank() == 0:
            # Before any work on this path, so that a resume keeps it.
            folder.note(path=inputs.models.path, compile=inputs.fusion)
        start = _score_and_answer(config, folder, inputs, requests, in_rounds=asked is not None)
        if start is None:
            return
        job, state = _make_job(config, folder, inputs, start, requests)
        first = 0 if inputs.checkpoint is None else inputs.checkpoint.step
        if job.log is not None and first == 0 and isinstance(start.answers, OwnAnswers):
            seconds = {"perf/answers_seconds": start.seconds}
            job.log.write("answers", 0, None, start.answers.start_metrics() | seconds)
        say(_what_comes(config, job.order, first, job.total_steps) + _mixture(job.order, inputs.train.source_names))
        stopped_at = loop.train(job, first, state)
        if stopped_at is not None:
            zero3.release(job.engine)
            _stop(folder, job, stopped_at)
            return
        finish(config, folder, inputs.models, job, start.answers)


def _load_inputs(config: Config, folder: RunFolder) -> _Inputs:
    """Load all but the policy, and refuse a checkpoint of another run before the first pass, which may take hours."""
    found = load.find_newest(config.run_dir / "checkpoints")
    models = prepare_models.load_models(config)
    ranks.run_on_rank_zero(partial(choose_fusion.refuse_impossible, config, models))
    objective = factory.make_objective(config.loss, models.dtype)
    train = prepare_data.load_train(config, models, objective)
    evals = prepare_data.load_evals(config, models, objective)
    order, total_steps = prepare_data.plan_steps(config, train)
    fusion = _choose_fusion(config, folder, models, train, total_steps)
    reference = prepare_reference.reference_weights(config, models, objective)
    facts = {"reference_key": reference and reference.key, "data_digest": train.report.digest}
    base = adapter_base(config, models)
    if base is not None:
        facts["base_key"] = base.key
    saved = prepare_reference.adapter_start(config, models)
    if saved is not None:
        facts["start_key"], base = saved.key, saved
    check_resume(config, found, facts)
    return _Inputs(models, objective, train, evals, order, total_steps, fusion, reference, base, facts, found)


def _choose_fusion(config: Config, folder: RunFolder, models: Models, train: TokenisedRows, steps: int) -> Fusion:
    flop = choose_fusion.training_flop(config, models, train, steps, ranks.world_size())
    lacks = ranks.all_gather((socket.gethostname(), compiled_layers.lack(ranks.device())))
    lacking = next((f"{lack} (on {host})" for host, lack in lacks if lack is not None), None)
    choice = ranks.run_on_rank_zero(
        lambda: choose_fusion.choose(config, models, folder.facts, flop, ranks.device(), lacking)
    )
    say(choice.text())
    return choice.fusion


def _score_and_answer(
    config: Config, folder: RunFolder, inputs: _Inputs, requests: Requests, *, in_rounds: bool
) -> _Start | None:
    """Run the first pass where rows are missing, and let the start answer; None after a request to stop (all ranks)."""

    def stop_asked() -> bool:
        return requests.look().stop

    models, evals = inputs.models, inputs.evals
    where = "in the first pass"
    try:
        (scored, *others), first_pass = prepare_reference.score_reference(
            config,
            models,
            [inputs.train, *evals.values()],
            inputs.reference,
            stop_asked,
            first_rows(inputs.order, inputs.total_steps, config.reference.update_every_steps),
        )
        where, began = "while the start answers", time.perf_counter()
        first = next(iter(evals.values()), inputs.train)
        answers = prepare_answers.prepare(config, models, first, in_rounds=in_rounds)
        if isinstance(answers, OwnAnswers):
            answers.start.run(stop_asked)
        seconds = time.perf_counter() - began
    except StopRequested:
        if ranks.rank() == 0:
            folder.write_stopped(requests.reason(), None, where)
            requests.obeyed()
        say(f"stopped on request {where}; start again to go on")
        return None
    if isinstance(answers, NotAnswered):
        say(f"answers: none, so the run ends without a verdict on them: {answers.reason}")
    if ranks.rank() == 0:
        folder.note(
            data=prepare_data.data_facts(inputs.train, evals),
            chat_template=template_name(models.tokenizer, config.data.template, config.data.chat_template),
            reference=None if first_pass is None else first_pass.as_run_json(),
        )
    return _Start(scored, dict(zip(evals, others, strict=True)), answers, seconds)


def _make_job(
    config: Config, folder: RunFolder, inputs: _Inputs, start: _Start, requests: Requests
) -> tuple[Job, dict[str, Any] | None]:
    """Load the policy, and the checkpoint where there is one; return the job and the checkpoint's state (all ranks).

    Nobody but the job holds the engine, so that its end can free the engine's memory.
    """
    models, objective, answers = inputs.models, inputs.objective, start.answers
    responses = objective.responses_of(inputs.train.responses)
    read_keys = partial(most_keys_per_token, inputs.train, inputs.order, inputs.total_steps, responses)
    keys = ranks.run_on_rank_zero(lambda: read_keys(config.row_tokens, models.path))
    if models.path == "plain":
        measure = partial(padding, inputs.train, inputs.order, inputs.total_steps, responses)
        share = ranks.run_on_rank_zero(lambda: measure(config.train.micro_batch_tokens, ranks.world_size()))
        say(f"path plain: {share:.1%} of the tokens that the first steps compute are padding")
    engine, checkpointing = prepare_policy.load_policy(config, models, keys, inputs.fusion)
    if inputs.base is not None:
        ranks.run_on_all_ranks(partial(refuse_if_changed, inputs.base.states))
    if ranks.rank() == 0:
        folder.note(memory=checkpointing.as_run_json() | {"keys_per_token": keys})
    state: dict[str, Any] | None = None
    first = 0
    if inputs.checkpoint is not None:
        root = config.run_dir / "checkpoints"
        loaded = load.load(engine, root, inputs.checkpoint)
        first, state = loaded.step, loaded.state
        # A kill right after a commit leaves one too many, which after the last commit nothing else would remove.
        ranks.run_on_rank_zero(lambda: save.prune(root, config.checkpoint.keep, best_checkpoint(config)))
        say(f"resuming from {save.folder_name(first)}")
    ranks.run_on_rank_zero(lambda: own_answers.remove_outdated(folder, answers, first))
    moving = None
    if (every := config.reference.update_every_steps) is not None:
        moving = MovingReference.of(
            start.train,
            every=every,
            order=inputs.order,
            total_steps=inputs.total_steps,
            budget=config.reference_row_tokens,
            run_dir=config.run_dir,
        )
        moving.restore(first)
    in_between = None
    if isinstance(answers, OwnAnswers) and config.answers_every_steps is not None:
        in_between = partial(answers.intermediate_metrics, engine)
    job = Job(
        engine=engine,
        objective=objective,
        rounding=RoundingTolerance.of_model(models.policy.config, models.dtype),
        train=start.train if moving is None else moving.data,
        eval_sets=start.evals,
        order=inputs.order,
        total_steps=inputs.total_steps,
        intervals=_intervals(config),
        optim=config.optim,
        options=config.train,
        checkpoint=config.checkpoint,
        evaluation_tokens=config.reference_row_tokens,
        run_dir=config.run_dir,
        requests=requests,
        cost=forward_cost(models.policy.config),
        passes=TRAINING_PASSES if models.adapter is None else FROZEN_PASSES,
        peak=device_peak(),
        reference_is_start=objective.needs_reference and models.reference_is_start,
        facts=inputs.facts,
        log=open_log(config, folder, first, inputs.total_steps, objective) if ranks.rank() == 0 else None,
        answer=in_between,
        moving=moving,
    )
    return job, state


def _intervals(config: Config) -> Intervals:
    return Intervals(
        log=config.tracking.log_every_steps,
        evaluate=config.eval.every_steps,
        evaluate_at_start=config.eval.at_start,
        evaluate_at_end=config.eval.at_end,
        answer=config.answers_every_steps,
        save=config.checkpoint.every_steps,
    )


def _stop(folder: RunFolder, job: Job, step: int) -> None:
    """Record that the training was stopped after this step."""
    if job.log is not None:
        folder.write_stopped(job.requests.reason(), step)
        job.requests.obeyed()
        job.log.loggers.finish()  # last: a W&B that hangs must not hold the word back
    say(f"stopped after step {step} of {job.total_steps}; start again to go on")


def _what_comes(config: Config, order: Order, start: int, total: int) -> str:
    per_step, epochs = config.train.global_batch_pairs, config.train.epochs
    times = [("checkpoint", config.checkpoint.every_steps)]
    if config.data.eval:
        times.insert(0, ("evaluation", config.eval.every_steps))
    if (moves := config.reference.update_every_steps) is not None:
        times.append(("new reference", moves))
    every = [f"{what} every {steps} steps" if steps else f"{what} at the end" for what, steps in times]
    return (
        f"training: {described(config.loss)}, steps {start + 1} to {total} of {per_step} rows "
        f"({order.rows_per_epoch} an epoch, {epochs} {'epoch' if epochs == 1 else 'epochs'}) "
        f"on {ranks.world_size()} ranks; {'; '.join(every)}"
        + ("; the reference does not move, as the run ends before" if moves is not None and moves >= total else "")
    )


def _mixture(order: Order, sources: Sequence[str]) -> str:
    """Return what an epoch takes of each source, where it does not take every row once."""
    taken = order.taken()
    if all(rows == there for rows, there in taken):
        return ""
    named = [(name, *counts) for name, counts in zip(sources, taken, strict=True)]
    parts = [f"{rows} rows of the {there} of {name}" for name, rows, there in named]
    return f"; an epoch takes {', '.join(parts)}"
