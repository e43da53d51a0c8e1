"""What a reference value depends on, as one digest: contents, never a path or a name."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedConfig

SCORING_SCHEMA = 1
"""Raised when the scoring code changes its numbers by more than rounding."""

WITHOUT_EFFECT = frozenset(
    {"_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}
    | {"dtype", "torch_dtype", "transformers_version", "use_cache", "_attn_implementation", "return_dict"}
    | {"output_attentions", "output_hidden_states", "problem_type", "chunk_size_feed_forward"}
    | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
)
"""Fields of a model's configuration that change no log-prob. All others are in the key, known or not."""


def reference_key(weight_digests: list[str], config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """The name under which reference log-probs of these weights are stored, 32 hexadecimal digits.

    weight_digests: of the weight files in the order of their names.
    """
    numbers = {k: v for k, v in config.to_dict().items() if k not in WITHOUT_EFFECT and "dropout" not in k}
    content = json.dumps(
        {"weights": weight_digests, "config": numbers, "dtype": str(dtype), "schema": SCORING_SCHEMA},
        sort_keys=True,
        default=str,
    )
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
