"""The message of a job whose memory ran out: the phase, the estimate beside the peak, and which setting to change."""

from __future__ import annotations

import socket

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.config import Config, mask_secrets
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.files import read_json
from prefopt_dist.model.folder import read_language_config, resolve
from prefopt_dist.monitoring.console import format_bytes
from prefopt_dist.monitoring.timers import peak_memory
from prefopt_dist.planning import memory
from prefopt_dist.planning.generation_memory import generation_phase
from prefopt_dist.planning.phases import Phase, Placement
from prefopt_dist.setup.answer_engines import sampling_plan
from prefopt_dist.setup.memory_needs import job_needs
from prefopt_dist.setup.prepare_models import zero_settings

SAMPLING_STAGES = ("generate", "rounds", "evaluate")
"""Stages that sample batches of `generate.batch_tokens`."""
MORE_RANKS, MORE_MEMORY = "more ranks", "GPUs with more memory"
"""Changes that help every phase of a sharded model, and of a model that is whole on each rank."""


def use(config: Config, stage: str) -> None:
    """Describe memory that runs out from now on by this configuration, whose secrets are masked.

    Args:
        config: the configuration; in rounds, that of the round, whose folder has what its training has chosen.
        stage: the stage that runs.
    """
    out_of_memory.describe_with(lambda phase, fault: mask_secrets(describe(config, stage, phase, fault)))


def describe(config: Config, stage: str, phase: str, fault: str) -> str:
    """Return the message (the rank whose memory ran out calls it).

    Args:
        config: the configuration.
        stage: the stage that runs.
        phase: the work in which it happened.
        fault: the first line of the exception.
    """
    # The message must come, whatever else is wrong.
    try:
        estimate = format_bytes(_estimate(config, stage, phase))
    except Exception as e:
        estimate = f"unknown ({type(e).__name__}: {e})"
    try:
        remedies = "; ".join(_remedies(config, stage, phase))
    except Exception as e:
        remedies = f"{MORE_RANKS} (other changes are unknown, {type(e).__name__}: {e})"
    return (
        f"out of memory in the {phase}, on rank {ranks.rank()} of host {socket.gethostname()}: {fault}\n"
        f"The plan's estimate is {estimate}, the peak so far {format_bytes(peak_memory())}{_of_device()}. "
        f"All ranks end.\n"
        f"Change one of these: {remedies}.\n"
        "Committed checkpoints and stored scores are safe: start again with the same command and the change."
    )


def _of_device() -> str:
    """Return the memory of this rank's GPU as text, with what is free and what fragments hold."""
    if not torch.cuda.is_available():
        return " (resident, libraries included)"
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return f" of {format_bytes(total)} ({format_bytes(free)} are free, the allocator holds {format_bytes(held)} unused)"


def _estimate(config: Config, stage: str, phase: str) -> int:
    """Return the plan's bytes of the phase of a stage on one rank of this job.

    Raises:
        LookupError: the plan has no such phase.
    """
    key = "model.name_or_path"
    model: PreTrainedConfig = read_language_config(resolve(config.model.name_or_path, key, weights=False), key)
    needs = job_needs(config, model, 1.0, _path(config))
    sizes, place = needs.sizes, Placement(ranks.world_size(), ranks.device().type == "cuda")
    found: Phase
    if phase == "training step":
        checkpointed, keys = _chosen(config)
        needs = job_needs(config, model, keys, _path(config))
        found = memory.backward_phase(needs.sizes, needs.policy, place, needs.tokens, checkpointed)
    elif phase == "first pass" or (phase, stage) == ("evaluation", "evaluate"):  # by an engine that only scores
        found = memory.first_pass_phase(sizes, needs.reference, place, config.reference_micro_batch_tokens)
    elif phase == "evaluation":
        scoring = memory.first_pass_phase(sizes, needs.policy, place, config.reference_micro_batch_tokens)
        states = memory.training_states(sizes, needs.policy, place)
        found = Phase(phase, (*states, *(part for part in scoring.parts if part.name != "parameters")))
    elif phase == "sampling":
        asked = needs.generation if stage in SAMPLING_STAGES else sampling_plan(config)
        if asked is None:
            raise LookupError(f"the plan has no sampling by {config.generate.engine}")
        found = generation_phase(sizes, place, asked)
    else:
        raise LookupError("the plan has no such phase")
    libraries = memory.libraries(place, needs.policy, sizes.activations.shared)
    return found.device + sum(part.bytes for part in libraries)


def _path(config: Config) -> ComputePath:
    """Return how the run computes micro-batches, which its folder says; of a stage without a run, what most models do.

    A stage without a run has no estimate of a step.
    """
    file = config.run_dir / "run.json"
    found: ComputePath = read_json(file).get("path", "shared") if file.exists() else "shared"
    return found


def _chosen(config: Config) -> tuple[int, float]:
    """Return what this start has chosen: recomputed layers, and gathered keys per token."""
    chosen = read_json(config.run_dir / "run.json")["memory"]
    return chosen["checkpointed_layers"], chosen["keys_per_token"]


def _remedies(config: Config, stage: str, phase: str) -> list[str]:
    """Return the changes that need less memory in the phase, each with its value; the one that costs least first."""
    if phase == "training step":
        found = [f"train.micro_batch_tokens={_half(config.train.micro_batch_tokens)} (the longest row must fit)"]
        if config.model.checkpointing != "all":
            found.append(f"model.checkpointing=all (now {config.model.checkpointing})")
        return [*found, *_offload(config), MORE_RANKS]
    if phase in ("first pass", "evaluation", "scoring of the answers"):
        found = [
            f"reference.micro_batch_tokens={_half(config.reference_micro_batch_tokens)} (the longest row must fit)"
        ]
        if phase == "first pass" and config.reference.offload == "none":
            found.append("reference.offload=cpu")
        return [*found, *(_offload(config) if phase == "evaluation" and stage != "evaluate" else []), MORE_RANKS]
    if phase == "sampling":
        if stage in SAMPLING_STAGES:
            return [f"generate.batch_tokens={_half(config.generate.batch_tokens)}", MORE_MEMORY]
        tokens = _half(config.max_answer_tokens)
        return [f"answers.max_new_tokens={tokens}", "answers.number=0 (no answers and no verdict)", MORE_MEMORY]
    if phase == "export":  # its check loads the folder as the first pass loads the reference
        found = ["export.merged=false (adapters alone)"] if config.export.merged else []
        if config.reference.offload == "none":
            found.append("reference.offload=cpu")
        return [*found, MORE_RANKS]
    if phase == "scoring by the rewards":
        return [f"generate.batch_tokens={_half(config.generate.batch_tokens)}", MORE_MEMORY]
    return [*_offload(config), MORE_RANKS]


def _offload(config: Config) -> list[str]:
    """Return the offloading that deepspeed.policy does not have yet."""
    zero = zero_settings(config.deepspeed.policy, "deepspeed.policy").get("zero_optimization", {})
    names = ("offload_optimizer", "offload_param")
    missing = [name for name in names if (zero.get(name) or {}).get("device") != "cpu"]
    return [f"{name} (device cpu) in {config.deepspeed.policy}" for name in missing[:1]]


def _half(tokens: int) -> int:
    return max(1, tokens // 2)
