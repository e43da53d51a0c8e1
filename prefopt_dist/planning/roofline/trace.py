"""The kernels of a model's backbone, found by running it forward and backward without weights, on the meta device.

So the count holds for every family. The part of an operation is that of the module that computes it, in the backward
pass that of the module whose autograd node computes it. Attention is left to the caller, since its kernel is not the
meta device's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.attention import CHOOSING, needs_of_call
from prefopt_dist.model.meta_device import AttentionCall, experts_in_order, meta_model, position_arguments
from prefopt_dist.model.parts import backbone, decoder_layers
from prefopt_dist.planning.roofline.kernels import Kernel, Step
from prefopt_dist.planning.roofline.recorder import Recorder, tensors_in

NAME = "prefopt_traced"

NORMS, ROTARY, RESIDUALS = "norms", "rotary embedding", "residuals, sums of gradients"
ATTENTION_PRODUCTS, MLP_PRODUCTS = "Q, K, V, O products", "MLP products"
ACTIVATION, EMBEDDING, STATES, OTHER = "gated activation", "embedding", "selected states", "other"

OfAttention = Callable[[AttentionCall, Step], Sequence[Kernel]]
"""Returns the kernels of an attention by its shapes and its pass."""


def trace_backbone(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    tokens: int,
    states: int,
    of_attention: OfAttention,
    adapter: Adapter | None = None,
) -> list[Kernel]:
    """Return the kernels of a forward and a backward pass of the layers, and of what stands around them.

    The output head and the attention are left out.

    Args:
        config: the model's configuration.
        dtype: of weights and activations.
        tokens: T, tokens of the row.
        states: N, tokens whose hidden states reach the head.
        of_attention: called wherever the attention would run, in both passes.
        adapter: the run's adapters.
    """
    global _tracing
    lm = meta_model(config, dtype, adapter)
    lm.set_attn_implementation(NAME)
    lm.config._experts_implementation = NAME
    parts = _Parts(lm)
    recorder = Recorder()
    with torch.device("meta"):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        positions = torch.arange(tokens)[None]
        source = torch.zeros(states, dtype=torch.int64)
    _tracing = _Tracing(recorder, parts, of_attention)
    try:
        with _watched(lm, recorder), recorder:
            hidden = backbone(lm)(input_ids=ids, use_cache=False, **position_arguments(lm, positions)).last_hidden_state
            recorder.module = parts.states
            selected = hidden.flatten(0, 1)[source]
            _label(recorder, selected, parts.states)
            gradient = torch.empty_like(selected)
            recorder.step, recorder.module = "backward", None
            selected.backward(gradient)
    finally:
        _tracing = None
    ran = recorder.module_of
    return [parts.placed(kernel, ran[i]) if i in ran else kernel for i, kernel in enumerate(recorder.kernels)]


class _Parts:
    """The part of the step that each module's kernels belong to."""

    def __init__(self, lm: PreTrainedModel) -> None:
        layers = {id(layer): i for i, layer in enumerate(decoder_layers(lm))}
        self.states = nn.Identity()
        self.attends: set[int] = set()
        """Modules that call the attention, which are known when they have done so: after their first kernels"""
        self._chain: dict[int, tuple[nn.Module, ...]] = {}
        self._layer: dict[int, int] = {}

        def walk(module: nn.Module, above: tuple[nn.Module, ...], layer: int | None) -> None:
            layer = layers.get(id(module), layer)
            self._chain[id(module)] = above = (*above, module)
            if layer is not None:
                self._layer[id(module)] = layer
            for child in module.children():
                walk(child, above, layer)

        walk(lm, (), None)

    def layer_of(self, module: nn.Module | None) -> int | None:
        """Return the number of the decoder layer that a module is in; None outside of the layers."""
        return self._layer.get(id(module))

    def placed(self, kernel: Kernel, module: nn.Module | None) -> Kernel:
        """Return a kernel with its part and layer, by the module that computed it."""
        part = self._name(kernel.name, module, product=not kernel.fusible)
        return replace(kernel, part=part, layer=self.layer_of(module))

    def _name(self, kernel: str, module: nn.Module | None, *, product: bool) -> str:
        if module is self.states:
            return STATES
        chain = self._chain.get(id(module), ())
        kind = type(module).__name__.lower()
        if "norm" in kind:
            return NORMS
        if id(module) in self._layer:
            attends = any(id(of) in self.attends for of in chain)
            if kernel == "add" and isinstance(module, nn.Linear):
                return RESIDUALS  # autograd sums the gradients of one tensor's several uses
            if product or isinstance(module, nn.Linear):
                return ATTENTION_PRODUCTS if attends else MLP_PRODUCTS
            inside = [of for of in chain if id(of) in self._layer]
            if attends:
                return ROTARY
            return RESIDUALS if len(inside) == 1 else ACTIVATION
        if "rotary" in kind:
            return ROTARY
        return EMBEDDING if isinstance(module, nn.Embedding) else OTHER


@dataclass(frozen=True)
class _Tracing:
    """What the functions below need while a model is traced."""

    recorder: Recorder
    parts: _Parts
    of_attention: OfAttention


_tracing: _Tracing | None = None


@contextmanager
def _watched(lm: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module computes, and which module each node of autograd belongs to."""
    handles, above = [], []

    def enter(module: nn.Module, given: Any, named: Any) -> None:
        if recorder.module is not None:
            for x in tensors_in((given, named)):
                _label(recorder, x, recorder.module)
        above.append(recorder.module)
        recorder.module = module

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        recorder.module = above.pop()
        for x in tensors_in(out):
            _label(recorder, x, module)

    for module in lm.modules():
        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _label(recorder: Recorder, out: torch.Tensor, module: nn.Module) -> None:
    """Note the module of all nodes behind a tensor that have none yet: those of inner modules were noted before."""
    waiting = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in recorder.of_node:
            recorder.of_node[node] = module
            waiting += [before for before, _ in node.next_functions]


def _traced_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **given: Any
) -> tuple[torch.Tensor, None]:
    assert _tracing is not None
    needs = needs_of_call(module, query, value, {name: given.get(name) for name in CHOOSING})
    call = AttentionCall(needs, query.shape[1], key.shape[1])
    _tracing.parts.attends.add(id(module))
    layer = _tracing.parts.layer_of(module)
    out: torch.Tensor = _TracedAttention.apply(query, key, value, layer, call)  # type: ignore[no-untyped-call]
    return out, None


class _TracedAttention(torch.autograd.Function):
    """Stands for the attention, with results and gradients laid out as kernels do."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int | None, call: AttentionCall
    ) -> torch.Tensor:
        assert _tracing is not None
        ctx.save_for_backward(query, key, value)
        ctx.layer, ctx.call = layer, call
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        kernels = _tracing.of_attention(call, "forward")
        _tracing.recorder.add_given(kernels, layer, (query, key, value), (out,))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert _tracing is not None
        like = ctx.saved_tensors
        found = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in like]
        kernels = _tracing.of_attention(ctx.call, "backward")
        _tracing.recorder.add_given(kernels, ctx.layer, (grad, *like), found)
        return *found, None, None


def _traced_experts(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute each token with its k experts, every expert with as many tokens as any other."""

    def product(rows: torch.Tensor, matrices: torch.Tensor, transposed: bool) -> torch.Tensor:
        number = len(matrices)
        most = -(-len(rows) // number) * number
        rows = torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows))) if most > len(rows) else rows
        found = torch.bmm(rows.view(number, -1, rows.shape[1]), matrices if transposed else matrices.mT)
        return found.flatten(0, 1)[: experts.numel()]

    return experts_in_order(module, hidden, experts, weights, product)


AttentionInterface.register(NAME, _traced_attention)
ExpertsInterface.register(NAME, _traced_experts)
