"""Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prefopt_dist.objectives.objective import Sequences, Terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, pair_terms, worth


@dataclass(frozen=True)
class IPO:
    """L = (h − 1/(2β))²,  h = (log π_c − log π_ref,c) − (log π_r − log π_ref,r).

    Equation 17 of the paper, whose τ is β here. Unlike DPO it has a target: the log-ratios of a pair are driven
    1/(2β) apart and no further, so that a preference that is certain in the data does not drive π_r to 0.

    The paper writes sequences and has no word on length. Per token (the default) each response's log-ratio is
    divided by its tokens, as its authors advised later: a sum grows with the length, so one target 1/(2β) in nats
    would ask much of a pair of short responses and little of long ones, and a squared error would let the
    longest pairs rule the gradient. Where policy and reference are equal, h = 0 and L = 1/(2β)².
    """

    beta: float
    """β > 0: 1/(2β) is the margin that is aimed at"""
    per_token: bool = True
    """Log-ratios per token instead of summed over the response"""
    tie_tolerance: float = TIE
    """τ of ties; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    @property
    def start_loss(self) -> float | None:
        """1/(2β)²: (1/(2β)) squared."""
        return (1 / (2 * self.beta)) ** 2

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards are β(log π − log π_ref), per token where the loss is: a margin of ½ is the aim."""
        nat = worth(units, self.beta, per_token=self.per_token)
        reward = nat * logratios(units)
        h = (reward[:, 0] - reward[:, 1]) / self.beta
        loss = (h - 1 / (2 * self.beta)) ** 2
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
