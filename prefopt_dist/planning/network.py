"""The bytes that ranks send to each other, and the bandwidth at which the GPUs do not wait for them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings

PASSES = 2.0
"""Times that what a forward pass exchanges is sent: in it, and as a gradient. A recomputed layer sends once more."""


@dataclass(frozen=True)
class Network:
    """The traffic of a micro-batch, and the time in which it should be over."""

    bytes: int
    """Bytes of weights and gradients that all ranks together move once: gathered in the forward pass, gathered in the
    backward pass, and the gradients summed; three times the weights where these are of one dtype"""
    seconds: float
    """Planned time of computing a micro-batch, in which the transfers can be hidden"""
    ranks: int
    sent: int = 0
    """Bytes that a rank sends to the others that share its rows, in all-to-alls"""
    leaving: int = 0
    """Bytes of these that leave a node, of all of its ranks together"""

    @property
    def needed(self) -> float:
        """Return the bus bandwidth in GB/s at which transfers take as long as computing, as an all-reduce measures it.

        A gather and a sum move (n−1)/n of their bytes over each rank's link, the all-reduce twice that. Between nodes
        its ring passes each byte once over all links of a node, so what leaves a node comes on top.
        """
        return ((self.ranks - 1) / self.ranks * self.bytes + self.leaving) / self.seconds / 1e9


def network(
    sizes: ModelSizes,
    zero: ZeroSettings,
    *,
    ranks: int,
    ranks_a_node: int,
    budget: int,
    step_tokens: float,
    step_seconds: float,
    recomputed: float = 0.0,
) -> Network:
    """Return the traffic of a run on its machine.

    Args:
        sizes: of the model.
        zero: the policy's settings.
        ranks: number of ranks.
        ranks_a_node: number of ranks of a node.
        budget: `train.micro_batch_tokens`.
        step_tokens: distinct tokens of a step.
        step_seconds: planned time of a step.
        recomputed: share of the layers that are computed again in the backward pass, 0 to 1.
    """
    micro_batches = max(1, math.ceil(step_tokens / (budget * ranks)))
    # With hpZ the gathers of the backward pass stay within a group of ranks, usually a node.
    gathers = 2 if zero.secondary == 1 else 1
    moved = gathers * int(sizes.mean_bytes * sizes.parameters) + zero.reduced_dtype_bytes * sizes.trained
    shared = sizes.activations.shared
    exchanged = (PASSES + recomputed) * sizes.exchanged_bytes * step_tokens / (micro_batches * ranks)
    return Network(
        moved,
        step_seconds / micro_batches,
        ranks,
        sent=int(exchanged * (shared - 1) / shared),
        leaving=int(exchanged * most_outside(ranks, ranks_a_node, shared) / shared),
    )


def most_outside(ranks: int, ranks_a_node: int, shared: int) -> int:
    """Return the most pairs of a rank of one node and a rank elsewhere that shares its rows, over the nodes.

    Consecutive ranks are on one node, and consecutive ranks share rows.
    """
    found = 0
    for first in range(0, ranks, ranks_a_node):
        groups = Counter(rank // shared for rank in range(first, min(first + ranks_a_node, ranks)))
        found = max(found, sum(inside * (shared - inside) for inside in groups.values()))
    return found
