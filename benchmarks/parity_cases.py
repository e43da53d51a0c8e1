"""The losses that benchmarks.parity compares with TRL's: our options beside TRL's, a case a line of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DIVERGENCES = {"forward_kl": "forward_kl", "jensen_shannon": "js_divergence", "alpha": "alpha_divergence"}
"""Our names of the divergences, and TRL's."""
Rows = list[tuple[list[int], list[int], list[int]]]
"""Token ids of prompt, chosen and rejected."""


@dataclass(frozen=True)
class Value:
    """A loss and its gradient by parameter name."""

    loss: float
    gradient: dict[str, torch.Tensor]

    def __add__(self, other: Value) -> Value:
        return Value(self.loss + other.loss, {n: g + other.gradient[n] for n, g in self.gradient.items()})

    def __mul__(self, factor: float) -> Value:
        return Value(factor * self.loss, {n: factor * g for n, g in self.gradient.items()})


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    ours: str
    """Name of the loss"""
    theirs: str
    """Name of the loss in TRL"""
    options: dict[str, Any]
    """Our options, as under `loss:`"""
    peer: Callable[[Any, Rows], Value]
    """Function that computes the same with TRL, given a `benchmarks.parity_peer.Peer`"""
    less_sft: bool = False
    """Whether ours is compared without its SFT term"""
    only: str = ""
    """Name of the term that is compared; empty for the whole loss"""


SMOOTHING, SFT_WEIGHT = 0.1, 0.3


def cases() -> list[Case]:
    """Return a case for every loss that TRL has too."""
    return [*of_dpo(), *of_kin(), *of_mixes(), *without_reference()]


def smoothed(peer: Any, rows: Rows) -> Value:
    """Return DPO's loss with smoothing: TRL's, on the rows and on swapped ones."""
    swapped = [(p, r, c) for p, c, r in rows]
    return peer.dpo(rows, ["sigmoid"], 0.1) * (1 - SMOOTHING) + peer.dpo(swapped, ["sigmoid"], 0.1) * SMOOTHING


def one_by_one(peer: Any, rows: Rows, losses: list[str], weights: list[float]) -> Value:
    """Return the mean over batches of one pair, in which TRL's SFT term is a mean over the pair's own tokens."""
    found = [peer.dpo([row], losses, 0.1, loss_weights=weights) for row in rows]
    total = found[0]
    for value in found[1:]:
        total = total + value
    return total * (1 / len(rows))


def of_dpo() -> list[Case]:
    """Return the cases of DPO with its options."""
    return [
        Case("dpo", "DPO sigmoid", {"beta": 0.1}, lambda t, r: t.dpo(r, ["sigmoid"], 0.1)),
        Case(
            "dpo, label_smoothing",
            "DPO sigmoid, on rows and swapped rows",
            {"beta": 0.1, "label_smoothing": SMOOTHING},
            smoothed,
        ),
        Case(
            "dpo, average: tokens",
            "DPO sigmoid_norm",
            {"beta": 5.0, "average": "tokens"},
            lambda t, r: t.dpo(r, ["sigmoid_norm"], 5.0),
        ),
        *(
            Case(
                f"dpo, divergence: {ours}",
                f"DPO sigmoid, {theirs}",
                {"beta": 0.1, "divergence": ours},
                lambda t, r, theirs=theirs: t.dpo(r, ["sigmoid"], 0.1, f_divergence_type=theirs),
            )
            for ours, theirs in DIVERGENCES.items()
        ),
        Case(
            "dpo, ld_alpha",
            "DPO sigmoid, ld_alpha",
            {"beta": 0.1, "ld_alpha": 0.3},
            lambda t, r: t.dpo(r, ["sigmoid"], 0.1, ld_alpha=0.3),
        ),
        Case(
            "dpo, wpo",
            "DPO sigmoid, use_weighting",
            {"beta": 0.1, "wpo": True},
            lambda t, r: t.dpo(r, ["sigmoid"], 0.1, use_weighting=True),
        ),
        Case(
            "dpo, sft_weight",
            "DPO sigmoid + sft, one pair a batch",
            {"beta": 0.1, "sft_weight": SFT_WEIGHT},
            lambda t, r: one_by_one(t, r, ["sigmoid", "sft"], [1.0, SFT_WEIGHT]),
        ),
    ]


def of_kin() -> list[Case]:
    """Return the cases of other losses of pairs with a reference."""
    return [
        Case(
            "robust",
            "DPO robust",
            {"beta": 0.1, "label_smoothing": 0.2},
            lambda t, r: t.dpo(r, ["robust"], 0.1, label_smoothing=0.2),
        ),
        Case("ipo", "DPO ipo", {"beta": 0.3}, lambda t, r: t.dpo(r, ["ipo"], 0.3)),
        Case("hinge", "DPO hinge", {"beta": 0.05}, lambda t, r: t.dpo(r, ["hinge"], 0.05)),
        *(
            Case(name, f"DPO {name}", {"beta": 0.1}, lambda t, r, name=name: t.dpo(r, [name], 0.1))
            for name in ("apo_zero", "apo_down", "bco_pair", "nca_pair", "sppo_hard", "aot", "aot_unpaired")
        ),
        Case(
            "exo_pair",
            "DPO exo_pair",
            {"beta": 0.1, "label_smoothing": 0.01},
            lambda t, r: t.dpo(r, ["exo_pair"], 0.1, label_smoothing=0.01),
        ),
        Case(
            "discopop",
            "DPO discopop",
            {"beta": 0.05, "temperature": 0.05},
            lambda t, r: t.dpo(r, ["discopop"], 0.05, discopop_tau=0.05),
        ),
    ]


def of_mixes() -> list[Case]:
    """Return the cases of weighted sums of losses."""
    mix = {"dpo": {"weight": 0.8, "beta": 0.2}, "ipo": {"weight": 0.05, "beta": 0.2}}
    mpo = {"dpo": {"weight": 0.8, "beta": 0.1}, "bco_pair": {"weight": 0.2, "beta": 0.1}, "sft": {"weight": 1.0}}
    return [
        Case(
            "mix of dpo and ipo",
            "DPO sigmoid + ipo, loss_weights",
            {"of": mix},
            lambda t, r: t.dpo(r, ["sigmoid", "ipo"], 0.2, loss_weights=[0.8, 0.05]),
        ),
        Case(
            "mix of dpo, bco_pair and sft (MPO)",
            "DPO sigmoid + bco_pair + sft, one pair a batch",
            {"of": mpo},
            lambda t, r: one_by_one(t, r, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        ),
    ]


def without_reference() -> list[Case]:
    """Return the cases of losses that need no reference."""
    return [
        Case(
            "simpo",
            "CPO simpo, cpo_alpha 0",
            {"beta": 2.0, "gamma": 1.0},
            lambda t, r: t.cpo(r, loss_type="simpo", beta=2.0, simpo_gamma=1.0),
        ),
        Case(
            "alphapo",
            "CPO alphapo",
            {"beta": 2.0, "gamma": 0.5, "alpha": 0.25},
            lambda t, r: t.cpo(r, loss_type="alphapo", beta=2.0, simpo_gamma=0.5, alpha=0.25),
        ),
        Case(
            "cpo, sft_weight 0",
            "CPO sigmoid, cpo_alpha 0",
            {"beta": 0.05, "label_smoothing": SMOOTHING, "sft_weight": 0.0},
            lambda t, r: t.cpo(r, loss_type="sigmoid", beta=0.05, label_smoothing=SMOOTHING),
        ),
        Case(
            "orpo",
            "ORPO",
            {"beta": 0.5},
            lambda t, r: t.orpo(r, 0.5),
            less_sft=True,
            only="odds ratio",
        ),
    ]
