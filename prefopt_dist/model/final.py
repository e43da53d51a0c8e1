"""The computation of a family between its output head's product and the logits: a factor and a soft-cap.

Families write it in their own forward function, under names of their own: a logit scale, a divisor, a multiplier. So it
is measured. The family's forward function runs on a copy of the model's outermost module whose backbone returns chosen
hidden states and whose head is small, in float64, and its logits are compared with the head's product. This takes
milliseconds and needs no weights, so it works on a model whose weights are partitioned.

Legend: h hidden states, x = h Wᵀ + b, z logits, f factor, c cap: z = c·tanh(f·x/c), or z = f·x without a cap.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefopt_dist.errors import UserError
from prefopt_dist.model.head import FinalTransform
from prefopt_dist.model.parts import backbone, name_of, output_head

_TOKENS, _VOCABULARY = 6, 16
_LARGE = 1e6
"""Size of products beyond any cap in use."""
_SIZES = (1e-3, 1.0, 10.0, 50.0)
"""Sizes of the products on which the result is proven."""
_TOLERANCE = 1e-5
"""Relative difference that the float32 of a family's own forward function explains."""


class _Outputs:
    """A backbone's results: the hidden states by name and as the first entry; anything else is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.last_hidden_state,))

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry by its name, as a mapping does."""
        return self.last_hidden_state if name == "last_hidden_state" else default


class _Given(nn.Module):
    """Stands for the backbone, and for what else has a module's attributes: it returns given hidden states."""

    def __init__(self, original: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self._original = [original]  # in a list, so that torch does not register it
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> _Outputs:
        return _Outputs(self._hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_original"][0], name)
        # Some families call a part of their backbone, such as its decoder, instead of the whole.
        return _Given(found, self._hidden) if isinstance(found, nn.Module) else found


class _SmallHead(nn.Module):
    """A head of a few tokens, each of which reads one number of the hidden states, so that it takes no products."""

    def __init__(self, head: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.read = min(_VOCABULARY, head.in_features)
        self.scale = torch.randn(self.read, generator=generator, dtype=torch.float64)
        self.weight = torch.eye(self.read, head.in_features, dtype=torch.float64) * self.scale[:, None]
        self.bias = None if head.bias is None else torch.randn(self.read, generator=generator, dtype=torch.float64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product = hidden[..., : self.read] * self.scale
        return product if self.bias is None else product + self.bias


@torch.no_grad()
def final_transform(lm: PreTrainedModel) -> FinalTransform:
    """Return what the model's own forward function does between the head's product and the logits.

    Args:
        lm: the model; its weights are not read.

    Raises:
        UserError: it is something else than a factor and a cap; the message has the numbers.
    """
    head = output_head(lm)
    generator = torch.Generator().manual_seed(0)
    small = _SmallHead(head, generator)
    direction = torch.randn(1, _TOKENS, head.in_features, generator=generator, dtype=torch.float64)
    direction /= (small(direction) - small(0 * direction)).abs().max()

    def both(size: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the head's product and the family's logits, for products of about this size."""
        return small(size * direction), _logits(lm, head, small, size * direction)

    found = _measured(lm, both)
    for size in _SIZES:
        product, logits = both(size)
        expected = found.apply(product)
        difference = float(((logits - expected).abs() / expected.abs().max()).max())
        if not difference < _TOLERANCE:
            raise _unknown(
                lm, f"for products of the size {size:g} the logits differ from {found.text()} by {difference:.2e}"
            )
    return found


def _measured(lm: PreTrainedModel, both: Any) -> FinalTransform:
    """Return the factor and the cap that explain small and very large products."""
    product, logits = both(_LARGE)
    if logits.shape != product.shape:
        raise _unknown(
            lm, f"its logits have the shape {tuple(logits.shape)}, the head's product {tuple(product.shape)}"
        )
    large = logits.abs()[product.abs() > _LARGE / 100]
    largest = float(large.max())
    # With a cap every large product comes out as the cap; without one the products keep their ratio.
    capped = bool((large > largest * (1 - 1e-4)).all()) and largest < _LARGE / 100
    cap = _as_configured(lm, largest) if capped else None
    product, logits = both(1.0)
    scaled = logits if cap is None else cap * torch.atanh((logits / cap).clamp(-1 + 1e-12, 1 - 1e-12))
    # The least-squares factor, to which small products add little noise.
    factor = float((scaled * product).sum() / (product * product).sum())
    if not (math.isfinite(factor) and factor != 0):
        raise _unknown(lm, f"the factor of its logits is {factor}")
    return FinalTransform(_as_configured(lm, factor), cap)


def _as_configured(lm: PreTrainedModel, measured: float) -> float:
    """Return the configured number that a measured one means (itself or its inverse), so that it has no noise."""
    if abs(measured - 1) < _TOLERANCE:
        return 1.0
    for value in _numbers(lm.config.to_dict()):
        for candidate in (value, 1 / value):
            if abs(candidate / measured - 1) < _TOLERANCE:
                return candidate
    return measured


def _numbers(fields: Mapping[str, Any]) -> Iterator[float]:
    for value in fields.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value):
            yield float(value)


def _logits(lm: PreTrainedModel, head: nn.Linear, small: _SmallHead, hidden: torch.Tensor) -> torch.Tensor:
    """Run the family's own forward function with these hidden states and this head."""
    shell = _replaced(lm, name_of(lm, backbone(lm)).split("."), _Given(backbone(lm), hidden))
    shell = _replaced(shell, name_of(lm, head).split("."), small)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    try:
        logits: torch.Tensor = type(lm).forward(shell, input_ids=ids, use_cache=False, return_dict=True).logits
    except Exception as e:  # whatever a family's code raises
        why = (str(e).strip().splitlines() or [""])[0]
        raise _unknown(lm, f"its forward function needs more than hidden states ({type(e).__name__}: {why})") from e
    if logits.device != hidden.device:
        raise _unknown(lm, "its forward function does not take its hidden states from its base model")
    return logits.double()


def _replaced(module: Any, path: list[str], part: nn.Module) -> Any:
    """Return a copy of the module with another part at this path; all other parts are shared with the original."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    name, *rest = path
    copied._modules[name] = _replaced(module._modules[name], rest, part) if rest else part
    return copied


def _unknown(lm: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"model.name_or_path: {type(lm).__name__} computes something between its last hidden states and its logits "
        f"that is neither a factor nor a soft-cap: {why}. Give a model of another family."
    )
