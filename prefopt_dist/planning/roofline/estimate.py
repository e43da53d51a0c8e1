"""The roofline of a run's step on its planned machine."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.layout import FROZEN_PASSES, TRAINING_PASSES
from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.counting import count
from prefopt_dist.planning.fit import Needs
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.roofline.attention import beyond_windows
from prefopt_dist.planning.roofline.kernels import Device
from prefopt_dist.planning.roofline.rows import PlannedRow
from prefopt_dist.planning.roofline.step import step_kernels
from prefopt_dist.planning.roofline.table import Roofline


class NotCounted(Exception):
    """The kernels of a model cannot be counted without weights."""


def counted(machine: Machine, path: ComputePath) -> bool:
    """Return whether a machine and a path have a roofline: a described GPU, and packed rows."""
    return machine.peak is not None and machine.bandwidth is not None and not in_rectangles(path)


def estimate(
    config: PreTrainedConfig,
    needs: Needs,
    row: PlannedRow,
    machine: Machine,
    dtype: torch.dtype,
    again: float,
    adapter: Adapter | None,
) -> Roofline:
    """Return the roofline of a micro-batch and its share of the update.

    Args:
        config: the model's configuration.
        needs: the job's needs.
        row: the micro-batch.
        machine: of which the peak and the bandwidth are known.
        dtype: of weights and activations.
        again: share of the layers that are computed again.
        adapter: the run's adapters.

    Raises:
        NotCounted: the model cannot be computed without weights, or its layers are not as they would be computed.
    """
    assert machine.peak is not None
    assert machine.bandwidth is not None
    sizes = needs.sizes
    if sizes.quantised:
        raise NotCounted("the base is quantised")
    if sizes.activations.shared > 1:
        raise NotCounted("ranks that share a row (train.sequence_parallel) exchange tokens inside the layers")
    try:
        kernels = step_kernels(
            config,
            sizes,
            needs.policy,
            row.facts,
            dtype=dtype,
            on_gpu=machine.is_gpu,
            ranks=machine.ranks,
            micro_batches=row.micro_batches,
            again=again,
            adapter=adapter,
        )
    except Exception as e:  # a family's own code, which may need real numbers
        why = (str(e).strip().splitlines() or [""])[0]
        raise NotCounted(f"the model cannot be computed without weights ({type(e).__name__}: {why})") from e
    passes = FROZEN_PASSES if sizes.frozen else TRAINING_PASSES
    least = row.forward_flop - beyond_windows(count(config, dtype).calls, row.facts.segments)
    return Roofline.of(kernels, passes * least, again, Device(machine.peak, machine.bandwidth))
