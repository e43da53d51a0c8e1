"""Every causal family of transformers is proven on some path, or refused in words; never wrong, never a crash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import language_config
from prefopt_dist.model.proof.prove import prove

KEY = "model.name_or_path"
SMALL = 8 * 2**20
"""Bytes of a cut: widths are narrowed, since the proof is about the family's code here."""
MISSING: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 4}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 8192, "mamba_d_head": 64},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "xmod": {"default_language": "en_XX"},
}
"""Fields without which a family's default configuration cannot be built."""
DECODERS = ("bert", "bert-generation", "camembert", "electra", "ernie", "rembert", "roberta", "roformer", "xlm-roberta")
"""Encoders that are causal where is_decoder is set, as their decoders' checkpoints set it."""


def tried() -> list[tuple[str, dict[str, Any]]]:
    families = [(family, MISSING.get(family, {})) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return families + [(family, {"is_decoder": True}) for family in DECODERS]


def outcome(family: str, fields: dict[str, Any]) -> tuple[str, str]:
    """Return the path, or why there is none, and the numbers."""
    try:
        config: PreTrainedConfig = language_config(CONFIG_MAPPING[family](**fields), Path(family), KEY)
    except Exception as e:
        return "not tried", f"its default configuration cannot be made ({type(e).__name__})"
    try:
        found = prove(config, key=KEY, most_bytes=SMALL)
    except UserError as e:
        return "refused", str(e).removeprefix(f"{KEY}: ")
    return found.path, "; ".join(one.text() for one in found.tried)


@pytest.mark.slow
def test_every_family_has_a_path_or_a_reason(tmp_path: Path) -> None:
    rows = [(family, fields, *outcome(family, fields)) for family, fields in tried()]
    table = "\n".join(
        f"| `{family}`{f' {fields}' if fields else ''} | {path} | {why.replace('|', '/')} |"
        for family, fields, path, why in rows
    )
    file = Path(os.environ.get("FAMILIES_TABLE", tmp_path / "families.md"))
    file.write_text(table + "\n")
    found = {family: path for family, fields, path, _ in rows if "is_decoder" not in fields}
    for family in ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "glm4_moe", "gpt_neox", "granite", "cohere"):
        assert found[family] == "shared"
    for family in ("qwen3_5_text", "granitemoehybrid", "mamba", "lfm3", "nemotron_h"):
        assert found[family] == "plain"
    for family in ("bert", "xlnet"):
        assert found[family] == "refused"
    assert sum(path in ("shared", "packed", "plain") for path in found.values()) > 120
