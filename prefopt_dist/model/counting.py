"""Counting on a model without weights: its parameters, and what a forward pass keeps and computes, layer by layer."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter, attach, is_adapter, require_package
from prefopt_dist.model.attention import CHOOSING, LayerNeeds, needs_of_call
from prefopt_dist.model.parts import backbone, decoder_layers, output_head

NAME = "prefopt_counted"
_TOKENS = 64
"""Tokens of the counted forward pass; any number does, since all activations are linear in it."""
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
"""Names that configurations give to the number of experts of a token."""


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


@dataclass(frozen=True)
class LayerCount:
    """The counts of a decoder layer."""

    parameters: int
    trained: int
    active: float
    """Parameters that a token uses: k of E experts"""
    kept: float
    """Bytes for each token that autograd keeps"""
    per_attended: int
    """FLOP for each pair of a token and one that it attends to; 0 for a layer without attention"""


@dataclass(frozen=True)
class Counts:
    """The counts of a model."""

    layers: tuple[LayerCount, ...]
    sizes: tuple[tuple[int, bool], ...]
    """(elements, whether it is trained) of each parameter"""
    modules: tuple[int, ...]
    """Elements of the parameters of each module that has its own"""
    head: int
    """Parameters of the output head's matrix"""
    beside_layers: float
    """Parameters of linear layers outside the decoder layers, without the head"""
    kept_beside_layers: float
    """Bytes for each token that autograd keeps outside the layers, without the head"""
    calls: tuple[AttentionCall, ...]
    """Every attention of the forward pass"""
    experts: bool
    """Whether a layer has experts, of which a token uses some"""
    quantised: int
    """Elements of the weights of linear layers of the decoder that adapters leave in 4 bit"""
    failure: str
    """Why no forward pass could be counted; empty where it was"""

    @property
    def needs(self) -> tuple[LayerNeeds, ...]:
        """Return what each attention needs."""
        return tuple(call.needs for call in self.calls)


def count(config: PreTrainedConfig, dtype: torch.dtype, adapter: Adapter | None = None) -> Counts:
    """Count a model of this configuration, with adapters if given; the result is kept in memory."""
    if adapter is not None:
        require_package()
    described = json.dumps([type(config).__name__, config.to_dict()], sort_keys=True, default=str)
    return _counted(described, _Held(config), dtype, adapter)


def experts_of_token(config: PreTrainedConfig) -> int | None:
    """Return the number of experts that a token is given to; None for a model without experts."""
    fields = config.to_dict()
    # Some families give one number for each layer.
    named = [max(v) if isinstance(v, list) else v for name in _CHOSEN_EXPERTS if (v := fields.get(name))]
    return next((int(number) for number in named if isinstance(number, int)), None)


class _Held:
    """A configuration that is equal to any other, since its content is an argument of its own."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)


@lru_cache(maxsize=32)
def _counted(described: str, held: _Held, dtype: torch.dtype, adapter: Adapter | None) -> Counts:
    del described  # it decides whether a result is known
    model = meta_model(held.config, dtype, adapter)
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"model.name_or_path: {type(model).__name__} has no list of num_hidden_layers decoder layers, by which "
            "memory and operations are counted. Give a model of another family."
        )
    sizes = tuple((p.numel(), p.requires_grad) for p in model.parameters())
    record = _Record()
    failure = ""
    try:
        kept = _kept_bytes(model, layers, record)
    except Exception as e:  # a family's own code, which may need real numbers
        failure = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        record = _Record()
        kept = [_estimated(layer) * dtype.itemsize * _TOKENS for layer in layers]
        kept.append(2 * model.config.hidden_size * dtype.itemsize * _TOKENS)
    factor = _active_shares(model, record)

    def active(module: nn.Module) -> float:
        return sum(p.numel() * factor.get(id(p), 1.0) for p in module.parameters())

    inside = {id(module) for layer in layers for module in layer.modules()}
    head = output_head(model)
    others = [
        module
        for module in backbone(model).modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module is not head
    ]
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return Counts(
        layers=tuple(
            LayerCount(
                parameters=sum(p.numel() for p in layer.parameters()),
                trained=sum(p.numel() for p in layer.parameters() if p.requires_grad),
                active=active(layer),
                kept=kept[i] / _TOKENS,
                per_attended=sum(
                    2 * call.heads * (call.needs.head_size + call.needs.value_size)
                    for place, call in record.calls
                    if place == i
                ),
            )
            for i, layer in enumerate(layers)
        ),
        sizes=sizes,
        modules=tuple(n for n in own if n),
        head=head.weight.numel(),
        beside_layers=sum(active(module) for module in others),
        kept_beside_layers=kept[-1] / _TOKENS,
        calls=tuple(call for _, call in record.calls),
        experts=bool(factor),
        quantised=_in_4_bit(model) if adapter is not None and adapter.quantised else 0,
        failure=failure,
    )


def _in_4_bit(model: PreTrainedModel) -> int:
    """Count the weights that bitsandbytes quantises: of the decoder's linear layers, but for adapters."""
    return sum(
        module.weight.numel()
        for name, module in backbone(model).named_modules()
        if isinstance(module, nn.Linear) and not is_adapter(name + ".") and module.weight.ndim == 2
    )


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


class _Record:
    """The calls that the functions below meet in a forward pass."""

    def __init__(self) -> None:
        self.layer: int | None = None
        """The layer that computes now; None outside of them"""
        self.calls: list[tuple[int | None, AttentionCall]] = []
        self.chosen: dict[int, int] = {}
        """Experts of a token, by the id of the module that holds the experts"""


_record = _Record()


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


@contextmanager
def _recording(layers: list[nn.Module], record: _Record) -> Iterator[None]:
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


def _kept_bytes(model: PreTrainedModel, layers: list[nn.Module], record: _Record) -> list[int]:
    """Count the bytes that autograd keeps in a forward pass of `_TOKENS` tokens, without the weights.

    Returns:
        The bytes of each layer, and those outside the layers.
    """
    # With frozen weights the first layer's input would have no gradient, and the layer would keep less than the others.
    embedding = model.get_input_embeddings().weight
    frozen = not embedding.requires_grad
    embedding.requires_grad_(True)
    with torch.device("meta"):
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
        positions = torch.arange(_TOKENS)[None]
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    # Storages are held, because a new one could get the number of a freed one. With each: where it is counted.
    held: dict[int, tuple[torch.UntypedStorage, int]] = {}
    outside = len(layers)
    kept = [0] * (outside + 1)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        place = outside if record.layer is None else record.layer
        if storage._cdata in own:
            return tensor
        if storage._cdata not in held:
            held[storage._cdata] = storage, place
            kept[place] += storage.nbytes()
        elif held[storage._cdata][1] not in (place, place - 1, outside):
            # What layers share, such as the rotary embedding, belongs to none of them.
            kept[held[storage._cdata][1]] -= storage.nbytes()
            kept[outside] += storage.nbytes()
            held[storage._cdata] = storage, outside
        return tensor

    with _recording(layers, record), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        backbone(model)(input_ids=ids, use_cache=False, **position_arguments(model, positions))
    embedding.requires_grad_(not frozen)
    return kept


def _estimated(layer: nn.Module) -> int:
    """Return the numbers for each token that a layer keeps, at least: inputs and results of its linear layers."""
    return sum(sum(module.weight.shape) for module in layer.modules() if isinstance(module, nn.Linear))


def _active_shares(model: PreTrainedModel, record: _Record) -> dict[int, float]:
    """Return k/E for the parameters of experts, by the parameter's id."""
    configured = experts_of_token(model.config)
    found: dict[int, float] = {}
    for name, module in model.named_modules():
        k = record.chosen.get(id(module), configured)
        if isinstance(module, nn.ModuleList) and name.endswith("experts") and configured:
            found |= {id(p): min(1.0, configured / len(module)) for p in module.parameters()}
        elif id(module) in record.chosen or any(p.dim() == 3 for p in module.parameters(recurse=False)):
            # All experts' matrices are one tensor [E, out, in], and their biases one of [E, out].
            if k is None or not (id(module) in record.chosen or name.endswith("experts")):
                continue
            found |= {id(p): min(1.0, k / p.shape[0]) for p in module.parameters(recurse=False)}
    return found
