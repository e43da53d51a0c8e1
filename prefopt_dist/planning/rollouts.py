"""What a run's own answers cost: memory of a whole copy beside the training, and time.

Legend: N parameters, s bytes of a number in the model's dtype, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt_dist.model.activation_checkpointing import RESERVED_SHARE
from prefopt_dist.monitoring.console import in_units
from prefopt_dist.planning import memory
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.memory import GenerationSettings, MemoryPart, Phase, Placement, ZeroSettings
from prefopt_dist.planning.sizes import ModelSizes

ANSWERS = "answers"
"""The phase in which the trained model answers beside its engine."""
SHARD_PROMPTS = 8
"""Prompts that are answered together, one lockstep batch: what a kill costs each rank."""
LAYER_SECONDS = 1.0e-3
"""A token's step through a layer by transformers' own code, however small the layer is: what the host takes to start
its operations. 1.7 to 2.3 ms were measured on a busy CPU core; not measured on a GPU."""
NETWORK_SPEED = 50e9
"""Bytes a second by which a rank is sent the model, where the sharded engine answers: 400 Gb/s."""
MODELS = 2
"""The start and the trained one"""
SCORING_PASSES = 4
"""Forward passes over as many answers: the policy's own, the reference's over both models' and over chosen ones."""


@dataclass(frozen=True)
class AnswersPlan:
    """What the section answers asks of a machine."""

    prompts: int
    new: int
    """Tokens of an answer at most"""
    policy: Phase
    """While the trained model answers"""
    available: int
    """Bytes of a rank's device, a tenth left free"""
    seconds: float | None
    """Of both models' answers and the scoring; None where the device's speed is not known"""

    @property
    def fits(self) -> bool:
        """Return whether a whole copy has room beside the training's engine."""
        return self.policy.device <= self.available

    def text(self, total: float | None) -> str:
        """Return a line for people; total: seconds of the job without this."""
        if self.fits:
            how = f"{in_units(self.policy.device)} of a rank while the latter answers"
        else:
            how = (
                f"under ZeRO-3, since a whole copy beside the training takes {in_units(self.policy.device)} of a rank "
                f"and {in_units(self.available)} may be used"
            )
        said = (
            f"answers: {self.prompts} prompts, at most {self.new} tokens each, by the start and by the trained model; "
            f"{how}"
        )
        if self.seconds is None:
            return said
        share = "" if not total else f", {self.seconds / (total + self.seconds):.1%} of the job"
        return f"{said}; at most {self.seconds:.3g} s{share} (the start's are kept in the cache)"


def plan_answers(
    sizes: ModelSizes, zero: ZeroSettings, machine: Machine, asked: GenerationSettings, prompts: int, between: int = 0
) -> AnswersPlan:
    """Return the plan of `prompts` prompts that are as long as they may be; between: times between start and end."""
    place = Placement(machine.ranks, machine.is_gpu)
    copy: Sequence[MemoryPart] = memory.generation_phase(sizes, place, asked).parts
    beside = [part for part in copy if not part.on_host]  # the copy is of the live engine: nothing is loaded
    policy = Phase(ANSWERS, (*memory.training_states(sizes, zero, place), *beside))
    available = int((1 - RESERVED_SHARE) * machine.memory)
    gathered = policy.device > available
    return AnswersPlan(
        prompts, asked.new_tokens, policy, available, _seconds(sizes, machine, asked, prompts, gathered, between)
    )


def _seconds(
    sizes: ModelSizes, machine: Machine, asked: GenerationSettings, prompts: int, gathered: bool, between: int
) -> float | None:
    """gathered: the model is sent to every rank for every token."""
    if machine.peak is None:
        return None
    speed = machine.peak * machine.efficiency
    shards = -(-prompts // SHARD_PROMPTS)
    of_rank = -(-shards // machine.ranks)
    reading = 0.0 if machine.bandwidth is None else sizes.dtype_bytes * sizes.parameters / machine.bandwidth
    product = 2 * sizes.parameters * min(SHARD_PROMPTS, prompts) / speed
    sending = sizes.dtype_bytes * sizes.parameters / NETWORK_SPEED if gathered else 0.0
    token = max(reading, product, LAYER_SECONDS * sizes.activations.layers, sending)
    prefill = product * asked.prompt_tokens
    scored = (
        SCORING_PASSES
        * 2
        * sizes.parameters
        * prompts
        * (asked.prompt_tokens + asked.new_tokens)
        / (speed * machine.ranks)
    )
    return (MODELS + between) * of_rank * (prefill + asked.new_tokens * token) + scored
