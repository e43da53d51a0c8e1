"""The files of weights that several ranks write, beside those of save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from prefopt_dist.checkpoint import export_weights
from prefopt_dist.checkpoint.export_weights import WeightsInMemory, WrittenFile
from prefopt_dist.distributed import ranks
from prefopt_dist.model.folder import ModelFolder

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = SIZES | {"num_experts_per_tok": 2}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=24),
    "mixtral": MixtralConfig(**EXPERTS, num_local_experts=4),
}


@pytest.mark.parametrize("part_bytes", [1, 20_000, export_weights.PART_BYTES])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_two_ranks_are_those_of_save_pretrained(
    name: str, part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, values and dtypes; experts, which are one tensor in the model, are many in files, of whole layers."""
    config: PreTrainedConfig = CONFIGS[name]
    whole = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "whole", max_shard_size=20_000)
    monkeypatch.setattr(export_weights, "PART_BYTES", part_bytes)
    target = tmp_path / "written"
    target.mkdir()
    weights = WeightsInMemory({n: p.detach().float() for n, p in whole.named_parameters()})
    model = ModelFolder(tmp_path / "whole", AutoConfig.from_pretrained(tmp_path / "whole"), (), "model.name_or_path")
    written: dict[str, WrittenFile] = {}
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        lm = export_weights.empty_model(model, torch.bfloat16, [])
        written |= export_weights.write_share(weights, lm, torch.bfloat16, target, [0, 1])
    export_weights.write_index(target, written)

    expected, found = _tensors(tmp_path / "whole"), _tensors(target)
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    others = ["config.json", "generation_config.json"]
    if part_bytes == export_weights.PART_BYTES and len(files) == 1:
        assert files == ["model.safetensors"]
    else:
        others.append("model.safetensors.index.json")
        index, theirs = (json.loads((f / others[-1]).read_text()) for f in (target, tmp_path / "whole"))
        assert index["metadata"] == theirs["metadata"]
        assert index["weight_map"] == {n: f for f in files for n in load_file(target / f)}
    assert sorted(path.name for path in target.iterdir()) == sorted(files + others)
    for other in others[:2]:
        assert (target / other).read_text() == (tmp_path / "whole" / other).read_text()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
