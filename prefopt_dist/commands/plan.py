"""`plan`: estimate what the job needs, from the model's config.json and the data's lengths; needs no model weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.checkpoint.export_weights import PART_BYTES
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.data.remote import copied_bytes
from prefopt_dist.errors import NotHere, UserError
from prefopt_dist.files import write_json
from prefopt_dist.model.cost import forward_cost, uncounted_text
from prefopt_dist.model.folder import check_config, read_language_config, resolve
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.monitoring.console import say, show
from prefopt_dist.objectives import Objective
from prefopt_dist.objectives.factory import make_objective
from prefopt_dist.planning import work
from prefopt_dist.planning.export import export_plan
from prefopt_dist.planning.fit import Fit, Needs, check_fit, fits_with_offloading, longest_row
from prefopt_dist.planning.machine import Machine, planned_machine
from prefopt_dist.planning.network import network
from prefopt_dist.planning.report import PlanReport
from prefopt_dist.planning.rollouts import AnswersPlan, plan_answers
from prefopt_dist.planning.roofline.estimate import NotCounted, counted, estimate
from prefopt_dist.planning.roofline.rows import PlannedRow, row_of_first_step, row_of_longest_units
from prefopt_dist.planning.roofline.table import Roofline
from prefopt_dist.planning.work import disk_needed
from prefopt_dist.setup import check_sequence_parallel
from prefopt_dist.setup.answer_engines import sampling_plan
from prefopt_dist.setup.check_lora import adapter_of
from prefopt_dist.setup.check_loss import check_beginnings, check_moving_reference
from prefopt_dist.setup.checks import eval_sets
from prefopt_dist.setup.experts import check_balancing
from prefopt_dist.setup.memory_needs import job_needs
from prefopt_dist.setup.prepare_data import TRAIN, rows_for_loss, tokenised_folder, tokenised_train_folder
from prefopt_dist.setup.prepare_models import DTYPES
from prefopt_dist.setup.prove_path import choose_path


def run(config: Config) -> None:
    """Plan in one process, without a process group."""
    model = _language_model(config, "model.name_or_path", config.model.name_or_path)
    check_balancing(config, model)
    scored = [("model.name_or_path", model)]
    if config.reference.name_or_path is not None:
        key = "reference.name_or_path"
        scored.append((key, _language_model(config, key, config.reference.name_or_path)))
    for of_key, one in scored:
        check_beginnings(config, one, of_key)
    path, lines = choose_path(config, scored, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for line in lines:
        say(line)
    check_sequence_parallel.check(config, scored, path)
    objective = make_objective(config.loss, DTYPES[config.model.dtype])
    check_moving_reference(config, objective)
    machine = planned_machine(config.plan)
    check_sequence_parallel.check_ranks(config, machine.ranks, machine.text())
    cost = forward_cost(model)
    rows = _rows(config, model, objective)
    if rows is None:
        work_to_do = work.worst_case_work(config, cost, objective, path)
    else:
        work_to_do = _work(config, *rows, cost, objective, path)
    needs = job_needs(config, model, work_to_do.keys_per_token, path)
    fits = fits_with_offloading(needs, machine)
    again = _again(needs, fits[0])
    report = _report(config, machine, needs, fits, again, work_to_do, cost)
    if counted(machine, path):
        if rows is None:
            row = row_of_longest_units(config, cost, objective, path, machine.ranks)
        else:
            row = row_of_first_step(config, rows[0], cost, objective, path, machine.ranks)
        report = replace(report, roofline=_roofline(config, model, machine, needs, again, row))
    show(report.text())
    uncounted = uncounted_text(model)
    if uncounted:
        say(f"estimates of memory and operations: {uncounted}")
    check_fit(needs, machine, fits)
    if config.plan.file is not None:
        _write(Path(config.plan.file), report.as_json())
        say(f"written: {config.plan.file}")


def _language_model(config: Config, key: str, name_or_path: str) -> PreTrainedConfig:
    """Return the checked configuration of a language model."""
    folder = resolve(name_or_path, key, weights=False)
    model = read_language_config(folder, key)
    check_config(model, folder, key)
    return model


def _rows(
    config: Config, model: PreTrainedConfig, objective: Objective
) -> tuple[TokenisedRows, dict[str, TokenisedRows]] | None:
    """Return the rows of training and of each evaluation; None, and why is said, where they cannot be read here."""
    try:
        tokenizer = load_tokenizer(resolve(config.tokenizer, "model.tokenizer", weights=False), "model.tokenizer")
    except UserError as e:  # config.json alone is enough for a plan
        _say_unread(objective, e)
        return None
    try:
        train = rows_for_loss(config, open_rows(tokenised_train_folder(config, tokenizer, model.vocab_size)), TRAIN)
        evals = {
            key: rows_for_loss(
                config, open_rows(tokenised_folder(config, tokenizer, model.vocab_size, sources, key)), key
            )
            for key, sources in eval_sets(config).items()
        }
    except NotHere as e:  # a row or a finding that would stop the job stops its plan, before any queue
        _say_unread(objective, e)
        return None
    return train, evals


def _say_unread(objective: Objective, why: UserError) -> None:
    few = ", with two responses" if objective.ranked else ""
    say(f"the data cannot be read here, so every row is taken to be as long as data.max_length allows{few}: {why}")


def _work(
    config: Config,
    train: TokenisedRows,
    evals: dict[str, TokenisedRows],
    cost: Cost,
    objective: Objective,
    path: ComputePath,
) -> work.Work:
    sources = [*config.data.train, *(source for some in eval_sets(config).values() for source in some)]
    copies = sum(copied_bytes(source.path, config.cache_dir) for source in sources)
    held = copies + sum(rows.disk_bytes for rows in (train, *evals.values()))
    return replace(work.work_from_rows(config, train, evals, cost, objective, path), data_bytes=held)


def _roofline(
    config: Config, model: PreTrainedConfig, machine: Machine, needs: Needs, again: float, row: PlannedRow
) -> Roofline | None:
    """Return the least time of a step's parts; None, and why is said, where it is not counted."""
    adapter = adapter_of(config.lora, model, config.model.name_or_path)
    try:
        return estimate(model, needs, row, machine, DTYPES[config.model.dtype], again, adapter)
    except NotCounted as e:
        say(f"no roofline: {e}")
        return None


def _report(
    config: Config, machine: Machine, needs: Needs, fits: list[Fit], again: float, todo: work.Work, cost: Cost
) -> PlanReport:
    speed = None if machine.peak is None else machine.peak * machine.efficiency * machine.ranks

    def seconds(flop: float) -> float | None:
        return None if speed is None else flop / speed

    written, merged = DTYPES[config.export.dtype or config.model.dtype].itemsize, config.export.merged
    disk = disk_needed(
        needs.sizes, config.checkpoint.keep, written, todo.sequences, merged=merged, data=todo.data_bytes
    )
    step_seconds = seconds(work.training_flop(todo, cost, again, needs.sizes.frozen))
    traffic = None
    if step_seconds is not None and machine.ranks > 1:
        traffic = network(
            needs.sizes,
            needs.policy,
            ranks=machine.ranks,
            ranks_a_node=machine.ranks_a_node,
            budget=needs.tokens,
            step_tokens=todo.step_tokens,
            step_seconds=step_seconds,
            recomputed=again,
        )
    return PlanReport(
        machine=machine,
        sizes=needs.sizes,
        fits=fits,
        micro_batch_tokens=config.train.micro_batch_tokens,
        work=todo,
        step_seconds=step_seconds,
        first_pass_seconds=seconds(todo.first_pass_flop),
        evaluation_seconds=seconds(todo.evaluation_flop),
        updates_seconds=seconds(todo.updates_flop),
        network=traffic,
        answers=_answers(config, machine, needs, todo.steps),
        longest_row=longest_row(needs, machine),
        disk=disk,
        export=export_plan(needs.sizes, disk, machine, export_item=written, part=PART_BYTES, merged=merged),
    )


def _again(needs: Needs, fit: Fit) -> float:
    """Return the share of the layers that are computed again in the backward pass."""
    layers = needs.sizes.activations.layers
    return (layers if fit.checkpointed is None else fit.checkpointed) / layers


def _answers(config: Config, machine: Machine, needs: Needs, steps: int | None) -> AnswersPlan | None:
    if config.answers.number == 0:
        return None
    every = config.answers_every_steps
    between = 0 if every is None or not steps else (steps - 1) // every
    return plan_answers(needs.sizes, needs.policy, machine, sampling_plan(config), config.answers.number, between)


def _write(path: Path, plan: dict[str, Any]) -> None:
    try:
        write_json(path, plan)
    except OSError as e:
        raise UserError(f"plan.file: {path} cannot be written ({e.strerror}). Choose a folder that exists.") from e
