"""A model on the meta device, whose attentions and experts compute shapes alone and record how they are called."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from prefopt_dist.model.adapter import Adapter, attach
from prefopt_dist.model.attention import CHOOSING, LayerNeeds, needs_of_call
from prefopt_dist.model.parts import backbone

NAME = "prefopt_counted"


@dataclass(frozen=True)
class AttentionCall:
    """The shapes of a layer's attention."""

    needs: LayerNeeds
    heads: int
    key_heads: int

    @property
    def key_numbers(self) -> int:
        """Return the numbers of a token's keys and values."""
        return self.key_heads * (self.needs.head_size + self.needs.value_size)

    @property
    def repeated_key_numbers(self) -> int:
        """Return the numbers of a token's keys and values where they are repeated for every query head."""
        return self.heads * (self.needs.head_size + self.needs.value_size)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, adapter: Adapter | None = None) -> PreTrainedModel:
    """Make a model of this configuration on the meta device, with adapters if given."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=NAME
            ).train()
        except (KeyError, ValueError):  # a family without the interface, whose own attention is computed
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()
        assert isinstance(model, PreTrainedModel)
        model.config._experts_implementation = NAME
        if adapter is not None:
            attach(model, adapter)
            model.to(dtype)  # on the meta device adapters do not take their layer's dtype
    return model


def position_arguments(model: PreTrainedModel, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the argument with the positions; none for a family whose tokens have none (Mamba, ALiBi)."""
    takes = "position_ids" in inspect.signature(backbone(model).forward).parameters
    return {"position_ids": positions} if takes else {}


class CallRecord:
    """The calls that the functions below meet in a forward pass."""

    def __init__(self) -> None:
        self.layer: int | None = None
        """The layer that computes now; None outside of them"""
        self.calls: list[tuple[int | None, AttentionCall]] = []
        self.chosen: dict[int, int] = {}
        """Experts of a token, by the id of the module that holds the experts"""


_record = CallRecord()


@contextmanager
def recording(layers: list[nn.Module], record: CallRecord) -> Iterator[None]:
    """Fill `record` inside, with the layer that computes."""
    global _record
    before, _record = _record, record
    handles = []

    def enter(i: int) -> Any:
        def hook(*_: Any) -> None:
            record.layer = i

        return hook

    def leave(*_: Any) -> None:
        record.layer = None

    for i, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(enter(i)), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        _record = before
        for handle in handles:
            handle.remove()


def _counted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    # An argument that is not known is refused where the model is loaded, not where it is only counted.
    needs = needs_of_call(module, query, value, {name: given.get(name) for name in CHOOSING})
    _record.calls.append((_record.layer, AttentionCall(needs, query.shape[1], key.shape[1])))
    out: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """An attention without stored scores: it keeps its operands, its result, and a float32 for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        # As kernels lay it out: what the layer makes of it needs no copy.
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        raise AssertionError("only the forward pass is counted")


class _Product(torch.autograd.Function):
    """A product of rows with their experts' matrices: it keeps the rows where the matrices are trained.

    torch's own product does not support every dtype on the meta device.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, transposed: bool) -> torch.Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        raise AssertionError("only the forward pass is counted")


def _counted_experts(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _record.chosen[id(module)] = experts.shape[1]
    return experts_in_order(module, hidden, experts, weights, _Product.apply)


def experts_in_order(
    module: Any,
    hidden: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
) -> torch.Tensor:
    """Compute each token with its k experts, in order of the experts.

    Args:
        module: the layer's experts.
        hidden: [T, D].
        experts: int64 [T, k], the experts of each token.
        weights: [T, k], the experts' weights.
        product: of rows [T · k, in], in order of the experts, with the experts' matrices [E, out, in]; of matrices
            [E, in, out] where its third argument is True.

    Returns:
        [T, D].
    """
    k = experts.shape[1]
    transposed = bool(getattr(module, "is_transposed", False))
    order = experts.flatten().argsort()
    rows = hidden[order // k]
    if getattr(module, "has_gate", True):
        inner = module._apply_gate(product(rows, module.gate_up_proj, transposed))
    else:
        inner = module.act_fn(product(rows, module.up_proj, transposed))
    out = product(inner, module.down_proj, transposed) * weights.flatten()[order, None]
    found: torch.Tensor = out[order.argsort()].view(*experts.shape, -1).sum(1)
    return found.to(hidden.dtype)


AttentionInterface.register(NAME, _counted_attention)
ExpertsInterface.register(NAME, _counted_experts)
