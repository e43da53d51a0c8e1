"""What fits on the machine: offloading, checkpointed layers, and the remedy where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from prefopt_dist.errors import UserError
from prefopt_dist.model.activation_checkpointing import RESERVED_SHARE
from prefopt_dist.monitoring.console import in_units
from prefopt_dist.planning import memory
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.memory import LOADING, GenerationSettings, Phase, Placement, ZeroSettings
from prefopt_dist.planning.sizes import ModelSizes

MAX_RANKS = 65_536
"""Beyond it nobody looks for a machine that is large enough."""


@dataclass(frozen=True)
class Needs:
    """What decides a job's memory on a machine."""

    sizes: ModelSizes
    policy: ZeroSettings
    reference: ZeroSettings
    tokens: int
    """Of a micro-batch of training"""
    reference_tokens: int | None
    """Of one of the first pass; None for a loss without reference"""
    checkpointing: Literal["auto", "none", "all"]
    """model.checkpointing"""
    reference_follows: bool = True
    """The first pass's micro-batch is twice training's, as nothing else is said of it"""
    generation: GenerationSettings | None = None
    """How prompts are answered; None where none are"""

    def with_tokens(self, tokens: int) -> Needs:
        """With other micro-batches of training, and of the first pass where they follow."""
        followed = 2 * tokens if self.reference_follows and self.reference_tokens is not None else self.reference_tokens
        return replace(self, tokens=tokens, reference_tokens=followed)


@dataclass(frozen=True)
class Fit:
    """One way to run, on one rank."""

    name: str
    checkpointed: int | None
    """Layers computed again; None where it does not fit"""
    phases: tuple[Phase, ...]
    available: int
    """Bytes of the device, a tenth left free"""

    @property
    def device(self) -> int:
        """Bytes at the worst moment."""
        return max(p.device for p in self.phases)

    def host(self, ranks: int) -> int:
        """Bytes of the memory of a node with so many ranks at the worst moment; rank 0 alone maps the checkpoint."""
        return max(p.host * (1 if p.name == LOADING else ranks) for p in self.phases)


def find_fit(needs: Needs, machine: Machine, ranks: int | None = None, name: str = "as configured") -> Fit:
    """As the settings are; checkpointing as asked for, or as few layers as there is room for."""
    place = Placement(ranks or machine.ranks, machine.is_gpu)
    available = int((1 - RESERVED_SHARE) * machine.memory)
    sizes, layers = needs.sizes, needs.sizes.activations.layers
    fixed = [memory.loading_phase(sizes, place)]
    if needs.reference_tokens is not None:
        fixed.append(memory.first_pass_phase(sizes, needs.reference, place, needs.reference_tokens))
    if needs.generation is not None:
        fixed.append(memory.generation_phase(sizes, place, needs.generation))

    def phases(checkpointed: int) -> tuple[Phase, ...]:
        asked = (sizes, needs.policy, place, needs.tokens, checkpointed)
        return (memory.backward_phase(*asked), memory.update_phase(*asked), *fixed)

    tried = {"none": [0], "all": [layers], "auto": list(range(layers + 1))}[needs.checkpointing]
    for checkpointed in tried:
        found = Fit(name, checkpointed, phases(checkpointed), available)
        if found.device <= available:
            return found
    return Fit(name, None, phases(tried[-1]), available)


def fits_with_offloading(needs: Needs, machine: Machine) -> list[Fit]:
    """The settings as they are, and with offloading; on the CPU, where it saves nothing, as they are alone."""
    found = [find_fit(needs, machine)]
    if machine.is_gpu:
        optimizer = replace(needs, policy=needs.policy.offloading(True, needs.policy.offload_param))
        both = replace(
            needs, policy=needs.policy.offloading(True, True), reference=needs.reference.offloading(False, True)
        )
        found += [
            find_fit(changed, machine, name=name)
            for name, changed in (("offload_optimizer", optimizer), ("and offload_param", both))
            if changed != needs
        ]
    return found


def check_fit(needs: Needs, machine: Machine, found: list[Fit]) -> None:
    """Ends the plan where the settings as they are do not fit, with what would."""
    mine = found[0]
    if mine.checkpointed is not None:
        return
    worst = max(mine.phases, key=lambda p: p.device)
    wish = (
        f" with model.checkpointing={needs.checkpointing}"
        if needs.checkpointing != "auto"
        else " with every layer computed again"
    )
    if not worst.name.startswith("training"):
        wish = ""
    alone = ""
    trains = replace(needs, generation=None)
    if (
        _largest_batch(needs, machine) is None
        and trains != needs
        and find_fit(trains, machine).checkpointed is not None
    ):
        alone = " Where the run only trains, on pairs that are there, set generate.rewards=[]."
    raise UserError(
        f"plan: {worst.name} needs about {in_units(worst.device)} on each of {machine.text()}{wish}, and "
        f"{in_units(mine.available)} of {in_units(machine.memory)} may be used. "
        f"{_remedies(needs, machine, found)}{alone}"
    )


def _remedies(needs: Needs, machine: Machine, found: list[Fit]) -> str:
    ways = []
    if (
        needs.checkpointing == "none"
        and find_fit(replace(needs, checkpointing="auto"), machine).checkpointed is not None
    ):
        ways.append("set model.checkpointing=auto")
    if (tokens := _largest(needs, machine)) is not None:
        ways.append(f"lower train.micro_batch_tokens from {needs.tokens} to at most {tokens}")
    if (tokens := _largest_of_first_pass(needs, machine)) is not None:
        ways.append(f"lower reference.micro_batch_tokens from {needs.reference_tokens} to at most {tokens}")
    if (tokens := _largest_batch(needs, machine)) is not None:
        ways.append(f"lower generate.batch_tokens to at most {tokens}")
    for way in found[1:]:
        if way.checkpointed is not None:
            ways.append(
                f"set {way.name.replace('and ', 'offload_optimizer and ')} (device cpu) in deepspeed.policy, which "
                f"takes {in_units(way.host(machine.ranks_a_node))} of each node's memory"
            )
            break
    if machine.is_gpu and (nodes := _enough_nodes(needs, machine)) is not None:
        ways.append(f"use at least {nodes * machine.ranks_a_node} such GPUs (plan.nodes={nodes})")
    if not ways:
        return "No number of ranks, no offloading and no smaller micro-batch alone would do: take a smaller model."
    return "Do one of these: " + "; ".join(ways) + "."


def _largest(needs: Needs, machine: Machine) -> int | None:
    """Tokens of a micro-batch of training that would fit; None where the number is not what is wrong."""

    def fits(tokens: int) -> bool:
        return find_fit(needs.with_tokens(tokens), machine).checkpointed is not None

    return _most(fits, needs.tokens)


def _largest_of_first_pass(needs: Needs, machine: Machine) -> int | None:
    if needs.reference_tokens is None or needs.reference_follows:
        return None
    return _most(
        lambda tokens: find_fit(replace(needs, reference_tokens=tokens), machine).checkpointed is not None,
        needs.reference_tokens,
    )


def _largest_batch(needs: Needs, machine: Machine) -> int | None:
    """Tokens that could be sampled at once; None where the number is not what is wrong."""
    sampled = needs.generation
    if sampled is None:
        return None
    return _most(
        lambda tokens: (
            find_fit(replace(needs, generation=replace(sampled, batch_tokens=tokens)), machine).checkpointed is not None
        ),
        sampled.batch_tokens,
    )


def _most(fits: Callable[[int], bool], now: int) -> int | None:
    if not fits(1):
        return None
    low, high = 1, now
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _enough_nodes(needs: Needs, machine: Machine) -> int | None:
    """The fewest nodes on which the settings as they are fit."""
    nodes = machine.nodes
    while nodes * machine.ranks_a_node <= MAX_RANKS:
        nodes *= 2
        if find_fit(needs, machine, nodes * machine.ranks_a_node).checkpointed is not None:
            low, high = nodes // 2 + 1, nodes
            while low < high:
                middle = (low + high) // 2
                if find_fit(needs, machine, middle * machine.ranks_a_node).checkpointed is not None:
                    high = middle
                else:
                    low = middle + 1
            return high
    return None
