"""The widths of a cut: numbers of heads, sizes of heads, and all that goes with them, divided by common factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

HEADS = re.compile(
    r"(num_attention_heads(_per_layer)?|num_key_value_heads|num_kv_heads|n_heads?|num_heads|kv_n_heads|attention_heads"
    r"|decoder_attention_heads|num_decoder_attention_heads|swa_num_(attention|key_value)_heads"
    r"|num_global_key_value_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_(key_|value_)?heads"
    r"|num_query_groups|n_groups|mamba_n_groups|mamba_ngroups)"
)
HEAD_SIZES = re.compile(
    r"(head_dim|global_head_dim|swa_head_dim|attention_head_size|attention_head_dim|dim_head|d_head|kv_channels"
    r"|qk_(nope_|rope_)?head_dim|v_head_dim|linear_(key_|value_)?head_dim|mamba_d_head|mamba_head_dim|index_head_dim"
    r"|rotary_dim)"
)
OTHERS = re.compile(
    r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|attention_hidden_size"
    r"|lru_width|.*intermediate_size.*|ffn_dim|decoder_ffn_dim|ffn_hidden_size|expert_ffn_hidden_size|n_inner|d_inner"
    r"|dff|dim_ff|mamba_d_ssm|kv_lora_rank|q_lora_rank|o_lora_rank|moe_latent_size|router_hidden_size"
    r"|hidden_size_per_layer_input|ple_embed_dim|feed_forward_size|input_embedding_size|output_embedding_size)"
)
FACTORS = (1, 2, 4, 8, 16, 32)
SMALLEST_HEAD = 4
SMALLEST_WIDTH = 32


def factors(fields: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield divisors (of numbers of heads, of sizes of heads), from small to large products, heads before sizes."""
    counts = [v for v in _values(fields, HEADS) if v > 1]
    common = math.gcd(*counts) if counts else 1
    pairs = [(h, s) for h in FACTORS for s in FACTORS if common % h == 0]
    yield from sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _values(fields: dict[str, Any], names: re.Pattern[str]) -> list[int]:
    found: list[int] = []
    for name, value in fields.items():
        if name.endswith("config") and isinstance(value, dict):
            found += _values(value, names)
        elif names.fullmatch(name):
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)]
    return found


def divide(fields: dict[str, Any], heads: int, sizes: int) -> dict[str, Any]:
    """Return the fields with numbers of heads, sizes of heads and other widths divided; ratios of heads stay.

    Args:
        fields: of a configuration, or of a part of it.
        heads: divisor of the numbers of heads.
        sizes: divisor of the sizes of heads; widths are divided by both.
    """
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("config") and isinstance(value, dict):
            changed[name] = divide(value, heads, sizes)
        elif name == "per_layer_config" and isinstance(value, dict):
            changed[name] = {k: divide(v, heads, sizes) for k, v in value.items()}
        elif HEADS.fullmatch(name):
            changed[name] = _divided(value, heads, 1)
        elif HEAD_SIZES.fullmatch(name):
            changed[name] = _divided(value, sizes, SMALLEST_HEAD)
        elif OTHERS.fullmatch(name):
            changed[name] = _divided(value, heads * sizes, SMALLEST_WIDTH)
        elif name == "rope_parameters" and isinstance(value, dict) and sizes > 1:
            changed[name] = _shorter_tables(value, sizes)
    return fields | changed


def _divided(value: Any, by: int, least: int) -> Any:
    if isinstance(value, list | tuple):
        return [_divided(v, by, least) for v in value]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        return value
    divided = max(least, value // by)
    # Grouped products of experts need rows of whole 16 bytes.
    if least < SMALLEST_WIDTH or (value % by == 0 and divided % 4 == 0):
        return divided
    return max(least, divided // 8 * 8)


def _shorter_tables(rotary: dict[str, Any], by: int) -> dict[str, Any]:
    """Return rotary parameters whose tables of factors, one for each pair of a head's dimensions, are shorter."""
    found: dict[str, Any] = {}
    for name, value in rotary.items():
        if isinstance(value, dict):
            found[name] = _shorter_tables(value, by)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            found[name] = value[::by]
        elif name == "mrope_section" and isinstance(value, list):
            found[name] = [max(1, v // by) for v in value]
    return rotary | found
