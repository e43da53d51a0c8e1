"""Losses and rewards: pure functions of summed log-probs, which know nothing of models or engines."""

from prefopt_dist.objectives.dpo import DPO
from prefopt_dist.objectives.hinge import Hinge
from prefopt_dist.objectives.ipo import IPO
from prefopt_dist.objectives.kto import KTO
from prefopt_dist.objectives.mix import Mix, Part
from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.orpo import ORPO
from prefopt_dist.objectives.robust import RobustDPO
from prefopt_dist.objectives.sft import SFT
from prefopt_dist.objectives.simpo import SimPO
from prefopt_dist.objectives.with_sft import WithSFT

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "Hinge",
    "Mix",
    "Objective",
    "Part",
    "RobustDPO",
    "Sequences",
    "SimPO",
    "Terms",
    "WithSFT",
]
