"""Options of every loss on pairs."""

from __future__ import annotations

from typing import Any

import torch

from prefopt_dist.config.build import _build_loss
from prefopt_dist.objectives import Objective
from prefopt_dist.objectives.factory import make_objective

FAMILY: list[dict[str, Any]] = [
    {"name": "dpo", "beta": 5.0, "label_smoothing": 0.1, "average": "tokens", "sft_weight": 0.0},
    {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "average": "sums", "sft_weight": 0.7},
    {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "average": "sums", "divergence": "forward_kl"},
    {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1, "average": "sums", "divergence": "jensen_shannon"},
    {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "average": "sums", "divergence": "alpha"},
    {
        **{"name": "dpo", "beta": 2.0, "label_smoothing": 0.0, "average": "tokens"},
        **{"divergence": "alpha", "divergence_alpha": 0.8, "sft_weight": 0.1},
    },
    {"name": "robust", "beta": 0.2, "label_smoothing": 0.2, "sft_weight": 0.0},
    {"name": "ipo", "beta": 0.3, "average": "tokens", "sft_weight": 0.0},
    {"name": "ipo", "beta": 0.05, "average": "sums", "sft_weight": 0.0},
    {"name": "hinge", "beta": 0.1, "sft_weight": 0.0},
    {"name": "hinge", "beta": 0.1, "sft_weight": 1.0},
    {"name": "exo_pair", "beta": 0.1, "label_smoothing": 0.01, "sft_weight": 0.0},
    {"name": "discopop", "beta": 0.1, "temperature": 0.05, "sft_weight": 0.0},
    {"name": "discopop", "beta": 0.2, "temperature": 1.0, "sft_weight": 0.3},
    {"name": "apo_zero", "beta": 0.1, "sft_weight": 0.0},
    {"name": "apo_zero", "beta": 0.05, "sft_weight": 0.5},
    {"name": "apo_down", "beta": 0.1, "sft_weight": 0.0},
    {"name": "bco_pair", "beta": 0.1, "sft_weight": 0.0},
    {"name": "nca_pair", "beta": 0.1, "sft_weight": 0.0},
    {"name": "sppo_hard", "beta": 0.2, "sft_weight": 0.0},
    {"name": "cal_dpo", "beta": 0.1, "sft_weight": 0.0},
    {"name": "dpop", "beta": 0.1, "penalty": 5.0, "sft_weight": 0.0},
    {"name": "simpo", "beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
    {"name": "simpo", "beta": 2.5, "gamma": 0.0, "sft_weight": 0.2},
    {"name": "alphapo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25, "sft_weight": 0.0},
    {"name": "alphapo", "beta": 2.0, "gamma": 0.0, "alpha": -0.3, "sft_weight": 0.2},
    {"name": "cpo", "beta": 0.1, "label_smoothing": 0.0, "sft_weight": 1.0},
    {"name": "cpo", "beta": 0.1, "label_smoothing": 0.2, "sft_weight": 0.0},
    {"name": "orpo", "beta": 0.5},
    {
        "name": "mix",
        "of": {
            "dpo": {"weight": 1.0, "beta": 0.1, "label_smoothing": 0.0, "average": "sums"},
            "orpo": {"weight": 0.2, "beta": 0.5},
        },
    },
    {
        "name": "mix",
        "of": {
            "dpo": {"weight": 0.8, "beta": 5.0, "label_smoothing": 0.1, "average": "tokens"},
            "ipo": {"weight": 0.05, "beta": 0.3, "average": "tokens"},
            "hinge": {"weight": 2.0, "beta": 0.1},
        },
    },
    {
        "name": "mix",
        "of": {
            "dpo": {"weight": 0.8, "beta": 0.1, "label_smoothing": 0.0, "average": "sums"},
            "bco_pair": {"weight": 0.2, "beta": 0.1},
            "cpo": {"weight": 0.1, "beta": 0.1, "label_smoothing": 0.1},
            "sft": {"weight": 1.0},
        },
    },
    {"name": "mix", "of": {"simpo": {"weight": 0.5, "beta": 2.0, "gamma": 1.0}, "sft": {"weight": 3.0}}},
]


def called(options: dict[str, Any]) -> str:
    return "-".join(str(v) if not isinstance(v, dict) else "+".join(v) for v in options.values())


def made(options: dict[str, Any]) -> Objective:
    """By the configuration's own way."""
    return make_objective(_build_loss(options, "loss"), torch.float32)
