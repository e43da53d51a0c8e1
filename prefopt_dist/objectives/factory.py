"""Make the objective that the configuration's section loss names."""

from __future__ import annotations

import torch

from prefopt_dist.config import Loss
from prefopt_dist.config.anchored_losses import (
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CalDPOLoss,
    DPOPositiveLoss,
    NCAPairLoss,
    SPPOHardLoss,
)
from prefopt_dist.config.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOPairLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    MixLoss,
    RobustLoss,
    SFTLoss,
)
from prefopt_dist.config.ranked_losses import AllPairsLoss, PlackettLuceLoss
from prefopt_dist.config.reference_free_losses import AlphaPOLoss, CPOLoss, ORPOLoss, SimPOLoss
from prefopt_dist.objectives import (
    AOT,
    CPO,
    DPO,
    IPO,
    KTO,
    ORPO,
    SFT,
    WPO,
    AllPairs,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    DiscoPOP,
    DPOPositive,
    EXOPair,
    Hinge,
    LengthDesensitised,
    Mix,
    MixPart,
    NCAPair,
    Objective,
    PlackettLuce,
    RobustDPO,
    SimPO,
    SPPOHard,
    WithSFT,
)
from prefopt_dist.objectives.pairs import tie_tolerance


def make_objective(loss: Loss, dtype: torch.dtype) -> Objective:
    """Return the objective of a loss's options, with the tolerance of ties for the model's dtype."""
    tie = tie_tolerance(dtype)
    objective: Objective
    match loss:
        case MixLoss():
            return Mix(tuple(MixPart(n, p.weight, make_objective(p.loss, dtype)) for n, p in loss.of.items()))
        case SFTLoss():
            return SFT()
        case ORPOLoss():
            return ORPO(loss.beta, tie)
        case AOTLoss():
            objective = AOT(loss.beta, loss.label_smoothing, tie)
        case AOTUnpairedLoss():
            objective = AOTUnpaired(loss.beta, loss.label_smoothing, tie)
        case KTOLoss():
            at_zero = loss.reference_point == "zero"
            return KTO(loss.beta, loss.desirable_weight, loss.undesirable_weight, tie, at_zero=at_zero)
        case DPOLoss():
            per_token = loss.average == "tokens"
            objective = DPO(loss.beta, loss.label_smoothing, tie, per_token, loss.divergence, loss.divergence_alpha)
            if loss.ld_alpha < 1:
                objective = LengthDesensitised(objective, loss.ld_alpha)
            if loss.wpo:
                objective = WPO(objective)
        case RobustLoss():
            objective = RobustDPO(loss.beta, loss.label_smoothing, tie)
        case IPOLoss():
            objective = IPO(loss.beta, loss.average == "tokens", tie)
        case HingeLoss():
            objective = Hinge(loss.beta, tie)
        case EXOPairLoss():
            objective = EXOPair(loss.beta, tie, loss.label_smoothing)
        case DiscoPOPLoss():
            objective = DiscoPOP(loss.beta, tie, loss.temperature)
        case APOZeroLoss():
            objective = APOZero(loss.beta, tie)
        case APODownLoss():
            objective = APODown(loss.beta, tie)
        case BCOPairLoss():
            objective = BCOPair(loss.beta, tie)
        case NCAPairLoss():
            objective = NCAPair(loss.beta, tie)
        case SPPOHardLoss():
            objective = SPPOHard(loss.beta, tie)
        case CalDPOLoss():
            objective = CalDPO(loss.beta, tie)
        case DPOPositiveLoss():
            objective = DPOPositive(loss.beta, tie, loss.penalty)
        case PlackettLuceLoss():
            objective = PlackettLuce(loss.beta, tie)
        case AllPairsLoss():
            objective = AllPairs(loss.beta, tie)
        case SimPOLoss():
            objective = SimPO(loss.beta, loss.gamma, tie)
        case AlphaPOLoss():
            objective = AlphaPO(loss.beta, loss.gamma, loss.alpha, tie)
        case CPOLoss():
            objective = CPO(loss.beta, loss.label_smoothing, tie)
    return WithSFT(objective, loss.sft_weight) if loss.sft_weight > 0 else objective


def described(loss: Loss) -> str:
    """Return the loss's name; for a mix its parts with their weights."""
    if not isinstance(loss, MixLoss):
        return loss.name
    return " + ".join(f"{part.weight:g} {name}" for name, part in loss.of.items())
