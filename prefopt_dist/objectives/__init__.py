"""Losses and rewards: pure functions of summed log-probs, which know nothing of models or engines."""

from prefopt_dist.objectives.dpo import DPO, IPO, Hinge, RobustDPO
from prefopt_dist.objectives.kto import KTO
from prefopt_dist.objectives.mix import Mix, MixPart
from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.reference_free import ORPO, SimPO
from prefopt_dist.objectives.sft import SFT, WithSFT

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "Hinge",
    "Mix",
    "MixPart",
    "Objective",
    "RobustDPO",
    "Sequences",
    "SimPO",
    "Terms",
    "WithSFT",
]
