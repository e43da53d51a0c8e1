"""Losses and rewards: pure functions of summed log-probs, which know nothing of models or engines."""

from prefopt_dist.objectives.anchored import APODown, APOZero, BCOPair, CalDPO, DPOPositive, NCAPair, SPPOHard
from prefopt_dist.objectives.aot import AOT, AOTUnpaired
from prefopt_dist.objectives.dpo import DPO, IPO, DiscoPOP, EXOPair, Hinge, LengthDesensitised, RobustDPO
from prefopt_dist.objectives.kto import KTO
from prefopt_dist.objectives.mix import Mix, MixPart
from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.ranked import AllPairs, PlackettLuce
from prefopt_dist.objectives.reference_free import CPO, ORPO, AlphaPO, SimPO
from prefopt_dist.objectives.sft import SFT, WithSFT
from prefopt_dist.objectives.wpo import WPO

__all__ = [
    "AOT",
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AllPairs",
    "AlphaPO",
    "BCOPair",
    "CalDPO",
    "DPOPositive",
    "DiscoPOP",
    "EXOPair",
    "Hinge",
    "LengthDesensitised",
    "Mix",
    "MixPart",
    "NCAPair",
    "Objective",
    "PlackettLuce",
    "RobustDPO",
    "SPPOHard",
    "Sequences",
    "SimPO",
    "Terms",
    "WithSFT",
]
