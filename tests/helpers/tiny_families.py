"""Small configurations of families whose layers, heads or buffers are special, and random models of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
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
