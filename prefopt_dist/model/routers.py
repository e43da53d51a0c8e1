"""The routers of a mixture of experts: where they stand in a model, and what their outputs mean.

transformers names the class of a family's router. What it returns is measured on a copy with random weights: the scores
of all experts, the chosen experts, and by which function of the scores it weighs them.

Legend: T tokens, E experts, k experts that a token takes.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from prefopt_dist.model.load import without_dropout

PROBED_TOKENS = 64
"""Random tokens on which a router is measured."""
SAME = 1e-4
"""Largest relative difference of numbers that are equal but for rounding."""

Affinity = Literal["softmax", "sigmoid", "given"]
"""Ways from a token's scores to its affinities to the experts, which add up to 1: the softmax of the scores, their
sigmoids divided by their sum, or the scores themselves."""


@dataclass(frozen=True)
class Router:
    """A router of a model."""

    name: str
    """Name of the module."""
    layer: int
    """Number of its layer, or of the router where a layer has several."""
    experts: int
    """E"""
    scores: int
    """Place in the output of the scores, [T, E]"""
    chosen: int
    """Place in the output of the chosen experts, int64 [T, k]"""
    affinity: Affinity | None
    """None where the chosen experts are weighed by no function that is known here."""


def find_routers(config: PreTrainedConfig) -> tuple[Router, ...]:
    """Return the routers of a causal language model; none where it has none, or none whose choice is known.

    Args:
        config: the model's configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(without_dropout(config))
    declared = [m._can_record_outputs or {} for m in model.modules() if isinstance(m, PreTrainedModel)]
    recorded = next((outputs["router_logits"] for outputs in declared if "router_logits" in outputs), None)
    if not isinstance(recorded, OutputRecorder):  # JetMoe has a list of them
        return ()
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, recorded.target_class)]
    kinds: dict[Any, tuple[int, int, int, Affinity | None] | None] = {}
    found: list[tuple[str, tuple[int, int, int, Affinity | None]]] = []
    for name, module in named:
        kind = (type(module), *(p.shape for p in module.parameters()))
        if kind not in kinds:
            kinds[kind] = _measured(module, recorded.index, config.hidden_size)
        result = kinds[kind]
        if result is None:
            return ()
        found.append((name, result))
    layers = [int(number.group(1)) if (number := re.search(r"\.(\d+)\.", name)) else 0 for name, _ in found]
    numbers = layers if len(set(layers)) == len(layers) else range(len(found))
    return tuple(Router(name, n, *result) for n, (name, result) in zip(numbers, found, strict=True))


def _measured(module: nn.Module, scores: int, hidden: int) -> tuple[int, int, int, Affinity | None] | None:
    """Return E, the places of scores and chosen experts, and the affinity; None for outputs that are not known."""
    router = copy.deepcopy(module).float().to_empty(device="cpu").eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for p in router.parameters():
            p.normal_(0.0, 1.0 if p.dim() < 2 else 1 / math.sqrt(p.shape[-1]))
        for buffer in router.buffers():
            buffer.zero_()
        try:
            output = router(torch.randn(PROBED_TOKENS, hidden))
        except Exception:  # a router that needs more than the hidden states
            return None
    if not isinstance(output, tuple) or not all(isinstance(x, torch.Tensor) for x in output):
        return None
    places = [i for i, x in enumerate(output) if x.dtype == torch.int64 and x.dim() == 2]
    if len(places) != 1 or output[scores].dim() != 2 or len(output[scores]) != PROBED_TOKENS:
        return None
    chosen = output[places[0]]
    weights = [x for i, x in enumerate(output) if i not in (scores, places[0]) and x.shape == chosen.shape]
    affinity = _affinity(output[scores].float(), chosen, weights[0].float()) if len(weights) == 1 else None
    return output[scores].shape[1], scores, places[0], affinity


def _affinity(scores: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Affinity | None:
    """Return the affinity to which the weights of a token's chosen experts are in proportion; with k = 1, equal."""
    if bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < SAME).all()):
        return "given"
    candidates: dict[Affinity, torch.Tensor] = {"softmax": scores.softmax(1), "sigmoid": scores.sigmoid()}
    for name, values in candidates.items():
        ratio = weights / values.gather(1, chosen)
        expected = ratio[:, :1] if chosen.shape[1] > 1 else torch.ones_like(ratio)
        if bool(((ratio - expected).abs() <= SAME * expected.abs()).all()):
            return name
    return None


def affinities(scores: torch.Tensor, affinity: Affinity) -> torch.Tensor:
    """Return the affinities of tokens to experts, float32 [T, E], from a router's scores."""
    scores = scores.float()
    if affinity == "given":
        return scores
    if affinity == "softmax":
        return scores.softmax(-1)
    weighed = scores.sigmoid()
    return weighed / weighed.sum(-1, keepdim=True)
