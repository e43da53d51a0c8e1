"""The step-0 check: stored and live log-probs must agree, at step 0 and wherever a model is loaded again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.counting import experts_of_token
from prefopt_dist.objectives import Objective, Terms


@dataclass(frozen=True)
class RoundingTolerance:
    """The differences that rounding explains in a model's log-probs; a larger one has another cause."""

    dtype: torch.dtype
    of_value: float
    """Tolerated share of |log π| of a sequence."""
    of_token: float
    """Tolerated nats, times the square root of the sequence's number of tokens, whose errors have either sign."""
    of_loss: float
    """Tolerated difference of a mean loss; relative where the loss is above 1 (as IPO's is)."""

    @classmethod
    def of_model(cls, config: PreTrainedConfig, dtype: torch.dtype) -> RoundingTolerance:
        """Return the tolerance for a model's dtype; it is larger for a model with experts."""
        experts = experts_of_token(config) is not None
        if dtype == torch.bfloat16:
            # A logit between 8 and 16 is a multiple of 1/16. The log-prob of a short or likely response is small, so a
            # share of it would be too little.
            return cls(dtype, of_value=2e-2, of_token=0.5 if experts else 0.25, of_loss=5e-2)
        # Where the scores of a router's k-th and next expert are nearly equal, the last bit decides between them, and
        # the token's state differs from there on: measured, by 0.04 to 0.2 nats of a sequence in 32 layers.
        return cls(dtype, of_value=1e-5, of_token=0.1 if experts else 0.0, of_loss=1e-2 if experts else 1e-4)

    def ratio(self, live: torch.Tensor, stored: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Divide |live − stored| by the tolerance, elementwise; above 1 rounding does not explain it; nan becomes inf.

        Args:
            live: float64, Σ log π of responses.
            stored: float64, the same from the store.
            tokens: number of tokens of each response.
        """
        allowed = self.of_value * stored.abs().clamp(min=1.0) + self.of_token * tokens.sqrt()
        return ((live - stored).abs() / allowed).nan_to_num(nan=math.inf)


class Step0Check:
    """A check of the first batch: it collects the largest differences on the device, then decides for all ranks."""

    def __init__(
        self,
        objective: Objective,
        rounding: RoundingTolerance,
        device: torch.device,
        step: int = 0,
        *,
        margins: bool = False,
    ) -> None:
        """Begin without a difference.

        Args:
            objective: the loss.
            rounding: the tolerated differences.
            device: of the sums.
            step: updates done, where the policy has just become the reference.
            margins: whether the rows have margins, with which no loss has a closed form at the start.
        """
        self._step = step
        self._start_loss = None if margins else objective.start_loss
        self._rounding = rounding
        self._worst = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, terms: Terms, reference: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add the units of one micro-batch; reference: float64 [U, R]; tokens: [U, R] tokens of the responses."""
        if len(reference) == 0:
            return
        difference = (terms.sums - reference).abs()
        ratio = self._rounding.ratio(terms.sums, reference, tokens)
        self._worst = torch.maximum(self._worst, torch.stack([ratio.max(), difference.nan_to_num(nan=torch.inf).max()]))

    def decide(self, mean_loss: float) -> None:
        """Refuse to train where stored and live log-probs differ, or the loss is wrong (all ranks call it).

        Args:
            mean_loss: the mean loss of the first batch, over all ranks.

        Raises:
            AgreedUserError: a difference is larger than rounding explains.
        """
        dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        ratio, difference = self._worst.tolist()
        if ratio > 1:
            remedy = "Set reference.store to a new folder, or check the model folder."
            if self._step:  # scored by the policy itself a moment ago
                remedy = "Set train.deterministic=true, or check the device: the same weights compute other numbers."
            raise AgreedUserError(
                f"step {self._step}: stored and live log-probs of a sequence differ by up to {difference:.6g} nats, "
                f"and by {ratio:.3g} times what rounding explains in {self._rounding.dtype}. The reference store does "
                f"not belong to the policy's start. {remedy}"
            )
        if self._start_loss is None:
            return
        tolerance = self._rounding.of_loss * max(1.0, self._start_loss)
        if not abs(mean_loss - self._start_loss) <= tolerance:
            raise AgreedUserError(
                f"step {self._step}: the loss is {mean_loss:.6f}; where policy and reference are equal it must be "
                f"{self._start_loss:.6f} within {tolerance:.0e} in {self._rounding.dtype}. The log-probs "
                "agree, so the fault is in the loss."
            )
