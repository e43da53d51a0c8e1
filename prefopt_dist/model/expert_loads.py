"""Shares of the experts of a mixture in the tokens of a step, and the loss that balances them.

Both look at the sequences of the step's units, a response with its prompt each, without the last token, which predicts
nothing: a token that stands in the row once for several sequences counts once for each. So neither depends on ranks,
micro-batches, padding, or on what is shared.

Legend: T tokens of a forward pass, Q distinct sequences of the micro-batch, U units with R responses each, E experts,
k experts that a token takes, L routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prefopt_dist.batching.micro_batch import MicroBatch, to_device
from prefopt_dist.model.routers import Router, affinities


class Tokens(NamedTuple):
    """The counts of the tokens of a row or of a rectangle, by which loads and the balancing loss are formed."""

    uses: torch.Tensor
    """float64 [T]: in how many of the units' responses, with their prompts, each stands, by the units' weights."""
    members: torch.Tensor | None
    """float32 [Q, T]: 1 where a sequence has the token; None where no balancing loss is added."""
    weights: torch.Tensor | None
    """float64 [Q]: the weight of each sequence's balancing loss, 1/R of the unit's for each response that it is."""


class ExpertLoads:
    """Running float64 sums on the device: how many tokens took each expert, and the balancing loss.

    They are neither read on the host nor sent to another rank here.
    """

    def __init__(self, routers: Sequence[Router], coefficient: float, device: torch.device) -> None:
        """Start from zero.

        Args:
            routers: of the model; at least one.
            coefficient: of the balancing loss; 0 to leave it out.
            device: of the sums.
        """
        self._routers = tuple(routers)
        self._coefficient = coefficient
        self._ends = np.cumsum([router.experts for router in routers]).tolist()
        self._sums = torch.zeros(self._ends[-1] + (coefficient > 0), dtype=torch.float64, device=device)
        self._followed = False
        self._uses: torch.Tensor | None = None
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def size(self) -> int:
        """Return how many numbers `summary` has."""
        return len(self._routers) + 1 + (self._coefficient > 0)

    def tokens(self, batch: MicroBatch) -> Tokens:
        """Return what each token of a micro-batch's row counts for, on its device."""
        uses = np.zeros(batch.input_ids.shape[1], dtype=np.float64)
        members = np.zeros((len(batch.spans), len(uses)), dtype=np.bool_)
        for q, span in enumerate(batch.spans):
            for part in (slice(span.prefix_start, span.prefix_end), slice(span.start, span.end)):
                uses[part] += span.share
                members[q, part] = True

        def moved(numbers: NDArray[Any]) -> torch.Tensor:
            return to_device(torch.from_numpy(numbers), batch.input_ids.device)

        if not self._coefficient:
            return Tokens(moved(uses), None, None)
        shares = np.array([span.share for span in batch.spans], dtype=np.float64)
        return Tokens(moved(uses), moved(members).float(), moved(shares))

    def through(
        self,
        lm: nn.Module,
        batch: MicroBatch,
        tokens: Tokens,
        rectangle: int | None,
        compute: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a forward pass, and count where its tokens go.

        Args:
            lm: the model.
            batch: the micro-batch.
            tokens: what `tokens` returned of it.
            rectangle: number of the rectangle that the pass computes; None for the row.
            compute: the pass.

        Returns:
            What `compute` returned; the pass's part of the balancing loss, float64 [], summed over the units, or None.
        """
        if not self._followed:  # after DeepSpeed's own hooks, so that the outputs are those that it watches
            for i, router in enumerate(self._routers):
                lm.get_submodule(router.name).register_forward_hook(self._hook(i))
            self._followed = True
        if rectangle is not None:
            tokens = _of_rectangle(batch, tokens, rectangle)
        self._uses, self._outputs = tokens.uses, []
        try:
            result = compute()
        finally:
            self._uses = None  # activation checkpointing computes layers again, which counts no more
        outputs, self._outputs = self._outputs, []
        if tokens.members is None or tokens.weights is None:
            return result, None
        balance = (self._balance(tokens.members, outputs) * tokens.weights).sum()
        self._sums[-1] += balance.detach()
        return result, self._coefficient * balance

    def _hook(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        router, begin = self._routers[i], self._ends[i] - self._routers[i].experts

        def count(_: nn.Module, __: Any, output: Any) -> None:
            if self._uses is None:
                return
            chosen: torch.Tensor = output[router.chosen]
            times = self._uses[:, None].expand(-1, chosen.shape[1])
            self._sums[begin : self._ends[i]].index_add_(0, chosen.flatten(), times.flatten())
            if self._coefficient:
                self._outputs.append((output[router.scores], chosen))

        return count

    def _balance(self, members: torch.Tensor, outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Compute Σ_e f_e · P_e of DeepSeek-V3, summed over the routers, of each sequence: float64 [Q].

        In a sequence of n tokens f_e = E / (k·n) · Σ_t [t takes e], and P_e is the mean of its tokens' affinities to e.

        Args:
            members: float32 [Q, T].
            outputs: of each router the scores [T, E] and the chosen experts [T, k].
        """
        # A sequence of another pass has no tokens here, and adds nothing.
        shares = members / members.sum(1, keepdim=True).clamp(min=1)
        total = torch.zeros(len(members), dtype=torch.float64, device=members.device)
        for router, (scores, chosen) in zip(self._routers, outputs, strict=True):
            assert router.affinity is not None
            taken = torch.zeros_like(scores, dtype=torch.float32).scatter_(1, chosen, 1.0)
            f = shares @ taken * (router.experts / chosen.shape[1])
            total = total + (f * (shares @ affinities(scores, router.affinity))).double().sum(1)
        return total

    def take(self) -> torch.Tensor:
        """Return this rank's sums, float64 [ΣE, and the balancing loss where there is one], and begin again."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken

    def summary(self, sums: torch.Tensor) -> torch.Tensor:
        """Return of each router the load of its busiest expert over the mean load, 1, and the balancing loss.

        Args:
            sums: those that `take` returned, of all ranks.
        """
        begins = [0, *self._ends]
        loads = [sums[a:b] for a, b in zip(begins, self._ends, strict=False)]
        most = [load.max() / load.mean().clamp(min=torch.finfo(load.dtype).tiny) for load in loads]
        return torch.cat([torch.stack([*most, torch.ones_like(most[0])]), sums[self._ends[-1] :]])

    def metrics(self, summed: Sequence[float], pairs: float) -> dict[str, float]:
        """Return the metrics `router/…`.

        Args:
            summed: summaries, added over steps.
            pairs: units of these steps.
        """
        *of_layers, steps = summed[: len(self._routers) + 1]
        if not steps:
            return {}
        found = {"router/max_load": sum(of_layers) / len(of_layers) / steps}
        found |= {f"router/max_load_of/{r.layer}": n / steps for r, n in zip(self._routers, of_layers, strict=True)}
        if self._coefficient:
            found["router/balancing_loss"] = summed[-1] / pairs
        return found


def _of_rectangle(batch: MicroBatch, tokens: Tokens, rectangle: int) -> Tokens:
    """Return what a rectangle's tokens count for; padding, which repeats the index of the last token, for nothing."""
    places = batch.rectangles[rectangle]
    first = torch.ones_like(places[:, :1], dtype=torch.bool)
    real = torch.cat([first, places[:, 1:] != places[:, :-1]], dim=1).flatten()
    if rectangle >= len(batch.rectangles) - batch.dummies:
        real = torch.zeros_like(real)
    at = places.flatten()
    return tokens._replace(
        uses=tokens.uses[at] * real, members=None if tokens.members is None else tokens.members[:, at] * real
    )
