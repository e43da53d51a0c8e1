"""The bytes that ZeRO-3 moves between ranks, and the bandwidth at which the GPUs do not wait for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefopt_dist.planning.memory import ZeroSettings
from prefopt_dist.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Network:
    """The traffic of a micro-batch, and the time in which it should be over."""

    bytes: int
    """Bytes of weights and gradients that all ranks together move once: gathered in the forward pass, gathered in the
    backward pass, and the gradients summed; three times the weights where these are of one dtype"""
    seconds: float
    """Planned time of computing a micro-batch, in which the transfers can be hidden"""
    ranks: int

    @property
    def needed(self) -> float:
        """Return the bus bandwidth in GB/s at which transfers take as long as computing, as an all-reduce measures it.

        A gather and a sum move (n−1)/n of their bytes over each rank's link, the all-reduce twice that.
        """
        return (self.ranks - 1) / self.ranks * self.bytes / self.seconds / 1e9


def network(
    sizes: ModelSizes, zero: ZeroSettings, *, ranks: int, budget: int, step_tokens: float, step_seconds: float
) -> Network:
    """Return the traffic of a run on its machine.

    Args:
        sizes: of the model.
        zero: the policy's settings.
        ranks: number of ranks.
        budget: `train.micro_batch_tokens`.
        step_tokens: distinct tokens of a step.
        step_seconds: planned time of a step.
    """
    micro_batches = max(1, math.ceil(step_tokens / (budget * ranks)))
    # With hpZ the gathers of the backward pass stay within a group of ranks, usually a node.
    gathers = 2 if zero.secondary == 1 else 1
    moved = gathers * int(sizes.mean_bytes * sizes.parameters) + zero.reduced_dtype_bytes * sizes.trained
    return Network(moved, step_seconds / micro_batches, ranks)
