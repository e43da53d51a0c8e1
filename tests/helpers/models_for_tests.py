"""Small random models of every family, and pairs that share in every way, for comparisons with plain float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention

SHARING_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
"""Families whose log-probs in packed rows with shared prompts are compared with those of the plain model."""

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 8.0, 12.0, 16.0],
    "original_max_position_embeddings": 128,
}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
OLMOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN3_MOE: dict[str, Any] = OLMOE | {"moe_intermediate_size": 24, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "mistral-window-2": ("mistral", {"sliding_window": 2}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    # Caps that bind, windows that are shorter than the sequences, heads whose scale is not 1/√d.
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma2-untied-no-caps": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma2-attention-cap": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3-untied-linear": (
        "gemma3_text",
        GEMMA
        | {
            "tie_word_embeddings": False,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
        },
    ),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "phi3-window-partial-tied": (
        "phi3",
        {
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True}),
    # Every expert is met by some token, and none by all.
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "mixtral-window-tied": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("qwen3_moe", QWEN3_MOE | {"tie_word_embeddings": False}),
    "qwen3-moe-normed-tied": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", OLMOE | {"tie_word_embeddings": False}),
    "olmoe-tied": ("olmoe", OLMOE | {"norm_topk_prob": True, "tie_word_embeddings": True}),
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose every parameter matters: biases and norms moved off 0 and 1, log-probs wide apart."""
    family, fields = MODELS[name]
    config = AutoConfig.for_model(family, **(SIZES | fields | changes))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return lm.to(dtype).eval()


def tokens(draw: np.random.RandomState, n: int) -> np.ndarray:
    return draw.randint(0, VOCABULARY, size=n).astype(np.int32)


def pairs() -> list[Unit]:
    """Every kind of sharing and of length: see the names."""
    draw = np.random.RandomState(1)
    shared_by_two, shared_by_four, lonely, single, begun = (tokens(draw, n) for n in (9, 6, 12, 1, 5))
    same, a, b, c, one, other_one = (tokens(draw, n) for n in (11, 8, 3, 17, 1, 1))
    assert one[0] != other_one[0]
    rows = [
        (shared_by_two, (a, b)),
        (lonely, (tokens(draw, 20), tokens(draw, 2))),
        (shared_by_four, (one, other_one)),  # one-token responses first: the prompt's segment is the prompt alone
        (shared_by_two, (c, a)),  # a: chosen there, rejected here
        (single, (tokens(draw, 13), one)),
        (shared_by_four, (same, one)),
        (shared_by_four, (same, c)),
        (shared_by_four, (b, same)),
        (lonely[:-1], (a, c)),  # a prompt that begins another one
        (shared_by_two, (a, b)),  # a whole row again
        (single, (one, other_one)),
        (tokens(draw, 1), (one, tokens(draw, 30))),
        (begun, (np.r_[b, a], np.r_[b, c])),  # responses that begin alike
        (begun, (np.r_[b, other_one], b)),  # one that begins another one, and b is now told from two
        (tokens(draw, 4), (a, np.r_[a, one])),
        (tokens(draw, 4), (np.r_[c, one], c[:-1])),
        (tokens(draw, 7), (np.r_[c, one], np.r_[c, other_one])),  # apart in their last token only
    ]
    return [Unit(100 + i, prompt, responses) for i, (prompt, responses) in enumerate(rows)]


def plain_sums(model: Any, units: list[Unit]) -> torch.Tensor:
    return torch.stack([torch.stack([plain.sequence_logp(model, u.prompt, r) for r in u.responses]) for u in units])


def references(units: list[Unit]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    return -lengths * (3.5 + 2 * torch.rand(lengths.shape, generator=draw, dtype=torch.float64))


def gradients(lm: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.double().clone() for n, p in lm.named_parameters()}


def worst(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest ‖Δ‖/‖g‖ of a tensor, and its name."""
    assert got.keys() == exact.keys()
    return max((float((got[n] - exact[n]).norm() / exact[n].norm()), n) for n in exact)


def apart(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).abs() / exact.abs()).max().item()
