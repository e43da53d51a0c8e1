"""The frozen base of adapters in 4 bit (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

The linear layers of the decoder are quantised to NF4 as they are loaded: two weights a byte, and a float32 scale for
each 64 of them. Every product computes with the weights as they are dequantised, in the dtype of the run. The output
head, the embedding, norms and experts keep their dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from prefopt_dist.packages import import_optional

BLOCK = 64
"""Weights that share a scale"""
BYTES = 0.5
"""Bytes of a quantised weight, without its share of the scales"""
SCALE_BYTES = 4 / BLOCK
"""Bytes of a quantised weight's share of the scales, which ZeRO-3 does not partition"""


def require_package() -> None:
    """Raise UserError where bitsandbytes is not installed."""
    _bitsandbytes()


def settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' settings for loading a base in 4 bit that computes in `dtype`."""
    require_package()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        # Any other dtype would be converted with the module's, and the weights with it.
        bnb_4bit_quant_storage=torch.uint8,
    )


def settle(lm: nn.Module) -> None:
    """Prepare the quantised layers of a loaded model for ZeRO-3 and for checkpoints.

    On a CPU with AVX512-BF16 a layer would pack its weights anew in eval(). The new layout would be partitioned as if
    it were the old one, and later products would be wrong without an error.
    """
    for layer in _layers(lm):
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_without_scales)


def _without_scales(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the scales out of a state, as checkpoints hold no frozen weights: loading the base makes them again."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def dequantise(lm: PreTrainedModel) -> None:
    """Replace the quantised layers by plain ones with the weights that they compute with, and widen all to float32."""
    functional = _bitsandbytes().functional
    for name, layer in [(n, m) for n, m in lm.named_modules() if isinstance(m, _bitsandbytes().nn.Linear4bit)]:
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(lm.get_submodule(parent), last, plain)
    lm.is_loaded_in_4bit = False  # by which peft chooses the class of its layers
    nn.Module.float(lm)  # the model's own method refuses what was quantised once


def _layers(lm: nn.Module) -> list[Any]:
    kind = _bitsandbytes().nn.Linear4bit
    return [module for module in lm.modules() if isinstance(module, kind)]


def _bitsandbytes() -> Any:
    return import_optional("bitsandbytes", "lora.base", "a base in 4 bit", "set lora.base=full")
