"""The settings with which a job fits a machine: offloading, recomputed layers, and remedies where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import format_bytes
from prefopt_dist.planning import memory
from prefopt_dist.planning.generation_memory import GenerationSettings, generation_phase
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.memory import LOADING
from prefopt_dist.planning.phases import Phase, Placement
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings

MAX_ROW = 2**26
"""Tokens of a rank's part of a row at which the search for the longest one ends."""
MAX_RANKS = 65_536
"""Number of ranks at which the search for a machine that is large enough ends."""


@dataclass(frozen=True)
class Needs:
    """The facts that decide a job's memory on a machine."""

    sizes: ModelSizes
    policy: ZeroSettings
    reference: ZeroSettings
    tokens: int
    """Tokens of a micro-batch of training"""
    reference_tokens: int | None
    """Tokens of a micro-batch of the first pass; None for a loss without a reference"""
    checkpointing: Literal["auto", "none", "all"]
    """Value of `model.checkpointing`"""
    reference_follows: bool = True
    """Whether the first pass's micro-batch is twice training's, because the configuration does not set it"""
    generation: GenerationSettings | None = None
    """Settings by which prompts are answered; None where no prompts are answered"""

    def with_tokens(self, tokens: int) -> Needs:
        """Return the needs with micro-batches of `tokens`, twice that in the first pass where it follows training."""
        follows = self.reference_follows and self.reference_tokens is not None
        return replace(self, tokens=tokens, reference_tokens=2 * tokens if follows else self.reference_tokens)


@dataclass(frozen=True)
class Fit:
    """Memory of one rank under one choice of settings."""

    name: str
    checkpointed: int | None
    """Layers that are recomputed in the backward pass; None where the job does not fit"""
    phases: tuple[Phase, ...]
    available: int
    """Bytes of the device that may be used; the rest stays free"""

    @property
    def fits(self) -> bool:
        """Return whether every phase fits the device."""
        return self.checkpointed is not None

    @property
    def device(self) -> int:
        """Return the bytes of the device in the largest phase."""
        return max(p.device for p in self.phases)

    def host(self, ranks: int) -> int:
        """Return the bytes of host memory of a node with `ranks` ranks in the largest phase.

        The mapped checkpoint counts once, since only rank 0 maps it.
        """
        return max(p.host * (1 if p.name == LOADING else ranks) for p in self.phases)


def find_fit(needs: Needs, machine: Machine, ranks: int | None = None, name: str = "as configured") -> Fit:
    """Return the job's memory with its settings, with as few recomputed layers as `needs.checkpointing` allows.

    Args:
        needs: the job's needs.
        machine: the machine that it is planned for.
        ranks: number of ranks; None for the machine's.
        name: name of the settings in the report.
    """
    place = Placement(ranks or machine.ranks, machine.is_gpu)
    available = machine.usable
    sizes, layers = needs.sizes, needs.sizes.activations.layers
    fixed = [memory.loading_phase(sizes, place)]
    if needs.reference_tokens is not None:
        fixed.append(memory.first_pass_phase(sizes, needs.reference, place, needs.reference_tokens))
    if needs.generation is not None:
        fixed.append(generation_phase(sizes, place, needs.generation))

    def phases(checkpointed: int) -> tuple[Phase, ...]:
        arguments = (sizes, needs.policy, place, needs.tokens, checkpointed)
        found = (memory.backward_phase(*arguments), memory.update_phase(*arguments), *fixed)
        libraries = memory.libraries(place, needs.policy, sizes.activations.shared)
        return tuple(replace(phase, parts=(*libraries, *phase.parts)) for phase in found)

    candidates = {"none": [0], "all": [layers], "auto": list(range(layers + 1))}[needs.checkpointing]
    for checkpointed in candidates:
        fit = Fit(name, checkpointed, phases(checkpointed), available)
        if fit.device <= available:
            return fit
    return Fit(name, None, phases(candidates[-1]), available)


def longest_row(needs: Needs, machine: Machine) -> int | None:
    """Return the most tokens of a packed row that fit the machine with every layer recomputed, unless none may be.

    The ranks that share a row each hold a part of it. None where no number of tokens fits.
    """
    recomputed = replace(needs, checkpointing="none" if needs.checkpointing == "none" else "all")

    def fits(tokens: int) -> bool:
        # The reference scores one sequence of the row at a time, where it has to.
        reference = None if needs.reference_tokens is None else tokens
        return find_fit(replace(recomputed, tokens=tokens, reference_tokens=reference), machine).fits

    found = _largest_that_fits(fits, MAX_ROW)
    return None if found is None else found * needs.sizes.activations.shared


def fits_with_offloading(needs: Needs, machine: Machine) -> list[Fit]:
    """Return the fit of the settings as they are, and on GPUs those with offloading, which saves nothing on a CPU."""
    fits = [find_fit(needs, machine)]
    if machine.is_gpu:
        optimizer = replace(needs, policy=needs.policy.offloading(True, needs.policy.offload_param))
        both = replace(
            needs, policy=needs.policy.offloading(True, True), reference=needs.reference.offloading(False, True)
        )
        fits += [
            find_fit(changed, machine, name=name)
            for name, changed in (("offload_optimizer", optimizer), ("and offload_param", both))
            if changed != needs
        ]
    return fits


def check_fit(needs: Needs, machine: Machine, fits: list[Fit]) -> None:
    """Check that the job fits the machine as it is configured.

    Args:
        needs: the job's needs.
        machine: the machine that it is planned for.
        fits: result of `fits_with_offloading`.

    Raises:
        UserError: the job does not fit; the message lists the changes with which it would.
    """
    configured = fits[0]
    if configured.fits:
        return
    worst = max(configured.phases, key=lambda p: p.device)
    layers = ""
    if worst.name.startswith("training"):
        setting = f"model.checkpointing={needs.checkpointing}"
        layers = " with every layer recomputed" if needs.checkpointing == "auto" else f" with {setting}"
    training_alone = ""
    without_generation = replace(needs, generation=None)
    if (
        _largest_generation_batch(needs, machine) is None
        and without_generation != needs
        and find_fit(without_generation, machine).fits
    ):
        training_alone = " If the run only trains, on pairs that exist already, set generate.rewards=[]."
    raise UserError(
        f"plan: {worst.name} needs about {format_bytes(worst.device)} on each rank of {machine.text()}{layers}, "
        f"but only {format_bytes(configured.available)} of {format_bytes(machine.memory)} may be used. "
        f"{_remedies(needs, machine, fits)}{training_alone}"
    )


def _remedies(needs: Needs, machine: Machine, fits: list[Fit]) -> str:
    remedies = []
    if needs.checkpointing == "none" and find_fit(replace(needs, checkpointing="auto"), machine).fits:
        remedies.append("set model.checkpointing=auto")
    if (tokens := _largest_micro_batch(needs, machine)) is not None:
        remedies.append(f"lower train.micro_batch_tokens from {needs.tokens} to at most {tokens}")
    if (tokens := _largest_reference_micro_batch(needs, machine)) is not None:
        remedies.append(f"lower reference.micro_batch_tokens from {needs.reference_tokens} to at most {tokens}")
    if (tokens := _largest_generation_batch(needs, machine)) is not None:
        remedies.append(f"lower generate.batch_tokens to at most {tokens}")
    for fit in fits[1:]:
        if fit.fits:
            remedies.append(
                f"set {fit.name.replace('and ', 'offload_optimizer and ')} (device cpu) in deepspeed.policy, which "
                f"takes {format_bytes(fit.host(machine.ranks_a_node))} of each node's memory"
            )
            break
    if machine.is_gpu and (nodes := _fewest_nodes(needs, machine)) is not None:
        remedies.append(f"use at least {nodes * machine.ranks_a_node} such GPUs (plan.nodes={nodes})")
    if not remedies:
        return (
            "More ranks, offloading or smaller micro-batches would not be enough, each by itself: take a smaller model."
        )
    return "Do one of these: " + "; ".join(remedies) + "."


def _largest_micro_batch(needs: Needs, machine: Machine) -> int | None:
    """Return the most tokens of a training micro-batch that fit; None where no number of tokens would fit."""
    return _largest_that_fits(lambda tokens: find_fit(needs.with_tokens(tokens), machine).fits, needs.tokens)


def _largest_reference_micro_batch(needs: Needs, machine: Machine) -> int | None:
    """Return the most tokens of a first-pass micro-batch that fit, where they are configured by themselves."""
    if needs.reference_tokens is None or needs.reference_follows:
        return None
    return _largest_that_fits(
        lambda tokens: find_fit(replace(needs, reference_tokens=tokens), machine).fits, needs.reference_tokens
    )


def _largest_generation_batch(needs: Needs, machine: Machine) -> int | None:
    """Return the most tokens that could be sampled at once; None where no number of tokens would fit."""
    generation = needs.generation
    if generation is None:
        return None

    def fits(tokens: int) -> bool:
        return find_fit(replace(needs, generation=replace(generation, batch_tokens=tokens)), machine).fits

    return _largest_that_fits(fits, generation.batch_tokens)


def _largest_that_fits(fits: Callable[[int], bool], upper: int) -> int | None:
    """Return the largest number from 1 to `upper` for which `fits` holds, by bisection; None where 1 does not fit."""
    if not fits(1):
        return None
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fewest_nodes(needs: Needs, machine: Machine) -> int | None:
    """Return the fewest nodes on which the settings as they are fit; None where MAX_RANKS ranks are too few."""
    nodes = machine.nodes
    while nodes * machine.ranks_a_node <= MAX_RANKS:
        nodes *= 2
        if find_fit(needs, machine, nodes * machine.ranks_a_node).fits:
            low, high = nodes // 2 + 1, nodes
            while low < high:
                middle = (low + high) // 2
                if find_fit(needs, machine, middle * machine.ranks_a_node).fits:
                    high = middle
                else:
                    low = middle + 1
            return high
    return None
