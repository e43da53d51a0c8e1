"""The cost of a run's own answers: memory of a whole copy of the model beside the training, and time.

Legend: N parameters, s bytes of a number in the model's dtype, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt_dist.monitoring.console import format_bytes
from prefopt_dist.planning import memory
from prefopt_dist.planning.generation_memory import GenerationSettings, generation_phase
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.phases import MemoryPart, Phase, Placement
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings

ANSWERS = "answers"
"""Name of the phase in which a copy of the trained model answers prompts beside its engine."""
SHARD_PROMPTS = 8
"""Prompts of a shard: they are answered together in one batch, which is what each rank loses when it is killed."""
LAYER_SECONDS = 1.0e-3
"""Least seconds of one token in one layer: the time in which the host launches the operations of Transformers' code.
1.7 to 2.3 ms were measured on a busy CPU core; not measured on a GPU."""
NETWORK_SPEED = 50e9
"""Bytes a second at which a rank receives the model's shards where the engine answers under ZeRO-3: 400 Gb/s."""
MODELS = 2
"""Models that answer: the start and the trained one."""
SCORING_PASSES = 4
"""Forward passes over the answers or as many responses: the policy over its own, and the reference over both models'
answers and over chosen responses."""


@dataclass(frozen=True)
class AnswersPlan:
    """Memory and time of the answers that the section `answers` asks for."""

    prompts: int
    new: int
    """Most tokens of an answer"""
    policy: Phase
    """Memory while the trained model answers"""
    available: int
    """Bytes of a rank's device that may be used; the rest stays free"""
    seconds: float | None
    """Seconds of both models' answers and their scoring; None where the device's speed is not known"""

    @property
    def fits(self) -> bool:
        """Return whether a whole copy of the model fits beside the training's engine."""
        return self.policy.device <= self.available

    def text(self, total: float | None) -> str:
        """Return a line of the report; total: seconds of the job without the answers, None where not known."""
        if self.fits:
            how = f"a rank uses {format_bytes(self.policy.device)} while the trained model answers"
        else:
            how = (
                f"under ZeRO-3, since with a whole copy beside the training a rank would use "
                f"{format_bytes(self.policy.device)}, and {format_bytes(self.available)} may be used"
            )
        line = (
            f"answers: {self.prompts} prompts, at most {self.new} tokens each, by the start and by the trained model; "
            f"{how}"
        )
        if self.seconds is None:
            return line
        share = "" if not total else f", {self.seconds / (total + self.seconds):.1%} of the job"
        return f"{line}; at most {self.seconds:.3g} s{share} (the start's answers are kept in the cache)"


def plan_answers(
    sizes: ModelSizes, zero: ZeroSettings, machine: Machine, asked: GenerationSettings, prompts: int, between: int = 0
) -> AnswersPlan:
    """Return the plan of a run's own answers, to prompts of the longest allowed length.

    Args:
        sizes: the model's sizes.
        zero: DeepSpeed settings of the policy.
        machine: the machine that the run is planned for.
        asked: settings by which the prompts are answered.
        prompts: number of prompts.
        between: how often the trained model answers between the start and the end of the training.
    """
    place = Placement(machine.ranks, machine.is_gpu)
    copy: Sequence[MemoryPart] = generation_phase(sizes, place, asked).parts
    beside = [part for part in copy if not part.on_host]  # the copy is of the live engine: nothing is loaded
    libraries = memory.libraries(place, zero, sizes.activations.shared)
    policy = Phase(ANSWERS, (*libraries, *memory.training_states(sizes, zero, place), *beside))
    available = machine.usable
    gathered = policy.device > available
    return AnswersPlan(
        prompts, asked.new_tokens, policy, available, _seconds(sizes, machine, asked, prompts, gathered, between)
    )


def _seconds(
    sizes: ModelSizes, machine: Machine, asked: GenerationSettings, prompts: int, gathered: bool, between: int
) -> float | None:
    """Return the seconds of all answers and their scoring; None where the device's speed is not known.

    gathered: whether the model's shards are sent to every rank for every token.
    """
    if machine.peak is None:
        return None
    speed = machine.peak * machine.efficiency
    shards = -(-prompts // SHARD_PROMPTS)
    shards_of_rank = -(-shards // machine.ranks)
    reading = 0.0 if machine.bandwidth is None else sizes.mean_bytes * sizes.parameters / machine.bandwidth
    product = 2 * sizes.parameters * min(SHARD_PROMPTS, prompts) / speed
    sending = sizes.mean_bytes * sizes.parameters / NETWORK_SPEED if gathered else 0.0
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
    return (MODELS + between) * shards_of_rank * (prefill + asked.new_tokens * token) + scored
