"""The results of plain transformers: one sequence at a time, eager attention, whole logits, and no code of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prefopt_dist.data.unit import Unit

Gradients = dict[str, torch.Tensor]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one sequence, float64 [L, V]; ids int64 [L]."""
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.double()


def sums_and_gradients(
    model: nn.Module, units: Sequence[Unit], weights: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    """Score the responses and differentiate their weighted sum.

    Args:
        model: a causal language model.
        units: prompts with their responses.
        weights: float64 [U, R].

    Returns:
        float64 [U, R], the log-prob of each response; the gradient of each parameter that has one.
    """
    device = next(model.parameters()).device
    forget = memory_of(model)
    sums = torch.zeros_like(weights)
    model.zero_grad(set_to_none=True)
    for u, unit in enumerate(units):
        for r, response in enumerate(unit.responses):
            ids = torch.from_numpy(np.concatenate([unit.prompt, response]).astype(np.int64)).to(device)
            first = len(unit.prompt)
            forget()
            logps = logits_of(model, ids)[first - 1 : -1].log_softmax(-1).gather(-1, ids[first:, None])[:, 0]
            learnt = None if unit.learnt is None else unit.learnt[r]
            total = logps.sum() if learnt is None else logps[torch.from_numpy(learnt).to(device)].sum()
            (total * weights[u, r]).backward()  # type: ignore[no-untyped-call]
            sums[u, r] = total.detach()
    return sums, take_gradients(model)


def take_gradients(model: nn.Module) -> Gradients:
    """Take the gradients of the parameters, by their names, out of the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def memory_of(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives a model the buffers and attributes back that it has now.

    Some rotary scalings keep the longest length that they have seen, so that a sequence would not be alone.
    """
    kept = [
        (module, {n: b.clone() for n, b in module.named_buffers(recurse=False)}, dict(vars(module)))
        for module in model.modules()
    ]

    def forget() -> None:
        for module, buffers, attributes in kept:
            for name, value in buffers.items():
                module._buffers[name] = value.clone()
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update(attributes)

    return forget


def influence_of_later_tokens(model: nn.Module, ids: torch.Tensor, *, of_length: bool) -> float:
    """Return by how much tokens change what stands before them, relative to the largest logit.

    A token is exchanged, and the sequence is cut short, which is what padding on the right comes down to.

    Args:
        model: a causal language model.
        ids: int64 [L].
        of_length: whether the sequence's length changes its logits by the model's own design, so that it is not cut.
    """
    forget = memory_of(model)
    with torch.no_grad():
        whole = logits_of(model, ids)
        worst = 0.0
        for place in (len(ids) // 2, len(ids) - 1):
            other = ids.clone()
            other[place:] = ids[place - 1].item()
            for changed in (logits_of(model, x)[:place] for x in ((other,) if of_length else (other, ids[:place]))):
                worst = max(worst, float((changed - whole[:place]).abs().max()))
    forget()
    return worst / float(whole.abs().max())
