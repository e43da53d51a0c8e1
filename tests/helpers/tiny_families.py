"""Small configurations of families whose layers, heads or buffers are special, and random models of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import models_for_tests
import torch
from models_for_tests import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

SIZES: dict[str, Any] = models_for_tests.SIZES | {"head_dim": 8}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo3": {"sliding_window": 6, "rope_parameters": YARN, "head_dim": None},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "rope_parameters": YARN},
    "glm4_moe": ROUTED | {"n_shared_experts": 1},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
    },
    "deepseek_v3": ROUTED
    | {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "qwen3_5_text": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "logits_scaling": 2.0,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "cohere": {"logit_scale": 0.3},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of three layers that are as different as the family's are."""
    fields = {name: value for name, value in (SIZES | FAMILIES[family] | changes).items() if value is not None}
    nothing = {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return AutoConfig.for_model(family, **(fields | nothing))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose every parameter matters: biases and norms moved off 0 and 1."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in lm.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * torch.randn_like(buffer)
    return lm.to(dtype).eval()


_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_IMAGES: dict[str, Any] = {"image_token_index": 60}
LARGER_MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": SIZES | {"sliding_window": 6},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    }
    | _IMAGES,
    "mistral3": {
        "text_config": SIZES | FAMILIES["ministral3"] | {"model_type": "ministral3"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    }
    | _IMAGES,
    "qwen3_5": {
        "text_config": SIZES | FAMILIES["qwen3_5_text"],
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    },
    "gemma4": {
        "text_config": SIZES | FAMILIES["gemma4_text"] | {"pad_token_id": 0},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
        },
        "audio_config": None,
        "image_token_id": 60,
        "boi_token_id": 61,
        "eoi_token_id": 62,
        "audio_token_id": 63,
    },
    "llava": {
        "text_config": SIZES | {"model_type": "llama", "tie_word_embeddings": False},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    }
    | _IMAGES,
}
"""Models that also take images, by their model_type."""


def larger_model(family: str, text: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """A random model that also takes images; its class is the one that a published folder of the family names.

    Args:
        family: its model_type.
        text: changes of its language model's fields.
        changes: changes of its own fields.
    """
    torch.manual_seed(0)
    fields = LARGER_MODELS[family] | changes
    config = AutoConfig.for_model(family, **(fields | {"text_config": fields["text_config"] | (text or {})}))
    lm = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return lm.eval()
