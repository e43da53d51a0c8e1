"""Cuts of a configuration besides layers and widths: experts, vocabulary, lengths that short sequences must cross."""

from __future__ import annotations

import re
from typing import Any

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num")
MOST_EXPERTS = 8
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
MOST_CHOSEN = 2
GROUPS = {"n_group": 4, "num_expert_group": 4, "topk_group": 2}
"""Groups of experts and how many of them are chosen, so that each group has 2 of 8 experts."""

VOCABULARY = re.compile("vocab_size")
MOST_TOKENS = 1024
TOKEN = re.compile("(token_ids?|token_index|_id)$")
"""Fields with ids of tokens."""

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "local_attention",
    "attention_chunk_size",
    "local_attention_window_len",
    "keep_window_size",
    "index_topk",
    "floor_scale",
    "log_scaling_n_floor",
    "rel_extent",
    "block_size",
    "chunk_size",
    "mamba_chunk_size",
)
WINDOW = 8
BLOCKS = {"index_block_size": 4, "index_topk_blocks": 2}
"""Lengths of attention over chosen blocks of keys."""

SCALED = ("yarn", "longrope", "llama3", "dynamic", "su")
"""Rotary embeddings that are scaled from a length on."""
BY_LENGTH = ("dynamic", "longrope", "su")
"""Those that look at the length of the sequence, so that a sequence that does not reach it is computed otherwise."""
ORIGINAL = 16
"""That length in a cut; the sequences of the proof are longer."""
NOT_REACHED = 256
"""The same where no sequence of the run reaches it; the sequences of the proof are shorter."""


def limit(fields: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """Return the fields with fewer experts and tokens, and with lengths that short sequences cross.

    Args:
        fields: of a configuration, or of a part of it.
        max_length: tokens of the run's longest sequence; None where unknown, so that it may be any.
    """
    changed: dict[str, Any] = {}
    vocabulary = min(MOST_TOKENS, fields.get("vocab_size") or MOST_TOKENS)
    for name, value in fields.items():
        if name.endswith("config") and isinstance(value, dict):
            changed[name] = limit(value, max_length)
        elif name == "unpadded_vocab_size" and isinstance(value, int) and value < (fields.get("vocab_size") or 0):
            changed[name] = vocabulary - 24
        elif VOCABULARY.search(name) and isinstance(value, int):
            changed[name] = min(value, MOST_TOKENS)
        elif TOKEN.search(name):
            changed[name] = _clamped(value, vocabulary)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in EXPERTS:
            changed[name] = min(value, MOST_EXPERTS)
        elif name in CHOSEN:
            changed[name] = min(value, MOST_CHOSEN)
        elif name in GROUPS:
            changed[name] = min(value, GROUPS[name])
        elif name in WINDOWS:
            changed[name] = min(value, WINDOW)
        elif name in BLOCKS:
            changed[name] = min(value, BLOCKS[name])
    return _limit_rotary(fields | changed, max_length)


def _clamped(value: Any, vocabulary: int) -> Any:
    if isinstance(value, list | tuple):
        return [_clamped(v, vocabulary) for v in value]
    return min(value, vocabulary - 1) if isinstance(value, int) and not isinstance(value, bool) else value


def _limit_rotary(fields: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """Cut the length from which rotary embeddings are scaled, and the largest position by the same ratio."""
    rotary = fields.get("rope_parameters")
    if not isinstance(rotary, dict):
        return fields
    sets = {k: v for k, v in rotary.items() if isinstance(v, dict)} or {"": rotary}
    most = fields.get("max_position_embeddings") or fields.get("original_max_position_embeddings")
    scaled = {k: v for k, v in sets.items() if v.get("rope_type", "default") in SCALED}
    if not scaled or not most:
        return fields
    # dynamic counts from the largest position, whatever stands beside (model/rotary.py)
    originals = [
        most if v["rope_type"] == "dynamic" else v.get("original_max_position_embeddings") for v in scaled.values()
    ]
    original = max((v for v in originals if v), default=fields.get("original_max_position_embeddings") or most)
    by_length = any(v["rope_type"] in BY_LENGTH for v in scaled.values())
    reached = max_length is None or max_length > original or not by_length
    new = ORIGINAL if reached else NOT_REACHED
    changed = {
        k: v | ({"original_max_position_embeddings": new} if v.get("original_max_position_embeddings") else {})
        for k, v in scaled.items()
    }
    found: dict[str, Any] = {"rope_parameters": changed[""] if "" in changed else rotary | changed}
    found["max_position_embeddings"] = max(new, most * new // original)
    if fields.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = new
    return fields | found
