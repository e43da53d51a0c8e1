"""Losses and rewards: pure functions of summed log-probs, which know nothing of models or engines."""

from prefopt_dist.objectives.dpo import DPO
from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.sft import SFT

__all__ = ["DPO", "SFT", "Objective", "Sequences", "Terms"]
