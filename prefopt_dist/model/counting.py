"""Counting on a model without weights: its parameters, and what a forward pass keeps and computes, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter, is_adapter, require_package
from prefopt_dist.model.attention import LayerNeeds
from prefopt_dist.model.meta_device import AttentionCall, CallRecord, meta_model, position_arguments, recording
from prefopt_dist.model.parts import backbone, decoder_layers, output_head

_TOKENS = 64
"""Tokens of the counted forward pass; any number does, since all activations are linear in it."""
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
"""Names that configurations give to the number of experts of a token."""


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
    record = CallRecord()
    failure = ""
    try:
        kept = _kept_bytes(model, layers, record)
    except Exception as e:  # a family's own code, which may need real numbers
        failure = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        record = CallRecord()
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


def _kept_bytes(model: PreTrainedModel, layers: list[nn.Module], record: CallRecord) -> list[int]:
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

    with recording(layers, record), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        backbone(model)(input_ids=ids, use_cache=False, **position_arguments(model, positions))
    embedding.requires_grad_(not frozen)
    return kept


def _estimated(layer: nn.Module) -> int:
    """Return the numbers for each token that a layer keeps, at least: inputs and results of its linear layers."""
    return sum(sum(module.weight.shape) for module in layer.modules() if isinstance(module, nn.Linear))


def _active_shares(model: PreTrainedModel, record: CallRecord) -> dict[int, float]:
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
