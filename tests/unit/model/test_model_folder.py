"""What is refused in a model folder, and with which words."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from models_for_tests import SHARING_FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prefopt_dist.errors import UserError
from prefopt_dist.model.fingerprint import file_digest
from prefopt_dist.model.folder import inspect_folder, resolve
from prefopt_dist.model.load import load_tokenizer, load_unsharded, without_dropout
from prefopt_dist.model.rotary import length_dependent, length_dependent_types

KEY = "model.name_or_path"
NO_SPECIAL: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    worlds.write_model(root / "tied", tied=True)
    worlds.write_model(root / "untied", tied=False)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """An untied model's folder of the test's own."""
    return shutil.copytree(made / "untied", tmp_path / "model")


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        inspect_folder(folder, KEY)
    message = str(caught.value)
    assert message.startswith(f"{KEY}: ")
    assert str(folder) in message
    return message


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_weights(folder: Path) -> list[Path]:
    """The same weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({n: tensors[n] for n in part}, file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


def small(family: str, **fields: Any) -> PreTrainedConfig:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return AutoConfig.for_model(family, **sizes, **NO_SPECIAL, **fields)


# Sound folders


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_sound_folder(made: Path, name: str) -> None:
    found = inspect_folder(made / name, KEY)
    assert found.path == made / name
    assert found.config.model_type == "llama"
    assert found.weight_files == (made / name / "model.safetensors",)
    tensors = load_file(found.weight_files[0])
    assert ("lm_head.weight" in tensors) == (name == "untied")


def test_weights_in_several_files(folder: Path) -> None:
    files = split_weights(folder)
    assert inspect_folder(folder, KEY).weight_files == tuple(files)


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_every_family_is_accepted_and_loads(tmp_path: Path, family: str) -> None:
    AutoModelForCausalLM.from_config(small(family)).save_pretrained(tmp_path)
    lm = load_unsharded(inspect_folder(tmp_path, KEY), dtype=torch.float32)
    assert lm.config._attn_implementation == "prefopt_shared_prefix"
    assert not lm.training


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_rope_types_that_pack(folder: Path, rope: str) -> None:
    fields = {
        "rope_type": rope,
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    configure(folder, rope_parameters=fields)
    assert inspect_folder(folder, KEY).config.rope_parameters["rope_type"] == rope


def test_old_rotary_buffers_are_no_fault(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda t: t.update({name: torch.ones(4)}))
    assert inspect_folder(folder, KEY).weight_files == (folder / "model.safetensors",)


# Faults of the configuration


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in complaint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "nonesuch"}'])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read" in complaint(folder)


@pytest.mark.parametrize("family", ["t5", "vit", "chameleon"])
def test_a_family_without_a_causal_language_model(folder: Path, family: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    message = complaint(folder)
    assert f"no causal language model for the model_type '{family}'" in message


def test_a_larger_model_whose_language_model_transformers_lacks(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    assert "model_type 'qwen2_vl_text'" in complaint(folder)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_attention_to_what_follows_is_refused(tmp_path: Path, family: str) -> None:
    small(family, use_bidirectional_attention=True).save_pretrained(tmp_path)
    assert "use_bidirectional_attention" in complaint(tmp_path)


@pytest.mark.parametrize("layer", ["full_attention", "sliding_attention"])
def test_rope_is_looked_at_in_every_type_of_layer(tmp_path: Path, layer: str) -> None:
    rope: dict[str, Any] = {
        t: {"rope_type": "default", "rope_theta": 1e4} for t in ("full_attention", "sliding_attention")
    }
    config = small("gemma3_text", rope_parameters=rope)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert inspect_folder(tmp_path, KEY).config.rope_parameters == rope
    rope[layer] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert length_dependent(small("gemma3_text", rope_parameters=rope))


def test_longrope_up_to_the_length_of_its_short_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = small("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert inspect_folder(tmp_path, KEY).config.model_type == "phi3"
    assert length_dependent(config)
    assert length_dependent(config, 65)
    assert not length_dependent(config, 64)


@pytest.mark.parametrize("original", [16, 256])
def test_dynamic_counts_from_the_positions_of_the_model(original: int) -> None:
    """transformers looks at max_position_embeddings alone, whatever original length stands beside."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": original}
    config = small("llama", rope_parameters=rope, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(80)[None] % config.vocab_size
    with torch.no_grad():
        alone, longer = (model(ids[:, :n]).logits[0, :40] for n in (64, 80))
    for length, differs in ((64, False), (65, True)):
        assert length_dependent(config, length) is differs
    assert not torch.allclose(alone, longer, rtol=1e-5), "a longer row changes what stands before"


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_a_rope_type_that_looks_at_the_row(folder: Path, rope: str, field: str) -> None:
    fields: dict[str, Any] = {"rope_type": rope, "factor": 2.0, "rope_theta": 1e4}
    if rope == "longrope":
        fields |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    configure(folder, **{field: fields})
    if field == "rope_scaling":
        file = folder / "config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "rope_parameters"}))
    assert length_dependent_types(inspect_folder(folder, KEY).config) == [rope]


@pytest.mark.parametrize("fields", [{"hidden_size": "32"}, {"num_attention_heads": 5}])
def test_a_config_of_wrong_values(folder: Path, fields: dict[str, Any]) -> None:
    configure(folder, **fields)
    assert "config.json" in complaint(folder)


# Faults of the weights


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = complaint(folder)
    assert "model.safetensors" in message
    assert "save_pretrained" in message


def test_a_missing_shard(folder: Path) -> None:
    split_weights(folder)[1].unlink()
    message = complaint(folder)
    assert "model-00002-of-00002.safetensors" in message
    assert "Copy the folder again" in message


@pytest.mark.parametrize("rest", [0, 4, 8, 100, 0.5, -1])
def test_a_file_cut_short(folder: Path, rest: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(rest * len(content)) if isinstance(rest, float) else rest])
    assert "Copy it again" in complaint(folder)


def test_a_file_grown(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as f:
        f.write(b"\0")
    assert "its header promises" in complaint(folder)


def test_a_second_file_cut_short(folder: Path) -> None:
    file = split_weights(folder)[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in complaint(folder)


@pytest.mark.parametrize("split", [False, True])
def test_a_missing_tensor(folder: Path, split: bool) -> None:
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    if split:
        split_weights(folder)
    assert "missing: model.layers.1.mlp.up_proj.weight (1 in all)" in complaint(folder)


def test_a_missing_head_where_it_is_not_tied(folder: Path) -> None:
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in complaint(folder)


def test_an_unknown_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    assert "unknown: model.layers.0.self_attn.q_proj.bias (1 in all)" in complaint(folder)


def test_a_misshapen_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
    assert "of another shape: model.norm.weight [31] instead of [32]" in complaint(folder)


def test_all_faults_at_once_and_no_endless_list(folder: Path) -> None:
    configure(folder, num_hidden_layers=3, vocab_size=301)
    edit_weights(folder, lambda t: t.update({"extra": torch.zeros(1)}))
    message = complaint(folder)
    assert "… (9 in all)" in message
    assert "unknown: extra" in message
    assert "lm_head.weight [300, 32] instead of [301, 32]" in message


def test_a_backbone_without_its_prefix(folder: Path) -> None:
    """Saved from the base model, not from the causal one: every name differs."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(folder, strip)
    assert "missing: " in complaint(folder)


@pytest.mark.parametrize("damage", ["index is no JSON", "index without map", "header is no JSON", "zeros"])
def test_damaged_headers_are_the_user_s_mistake(folder: Path, damage: str) -> None:
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if damage.startswith("index"):
        file.unlink()  # beside an index it would be refused for that
        index.write_text("{" if damage == "index is no JSON" else "{}")
    elif damage == "header is no JSON":
        content = bytearray(file.read_bytes())
        content[12] = 0xFF
        file.write_bytes(content)
    else:
        file.write_bytes(struct.pack("<Q", 0) + bytes(100))
    message = complaint(folder)
    assert "damaged" in message
    assert "again" in message


def test_the_files_that_are_hashed_are_those_that_are_loaded(folder: Path) -> None:
    """A stale index beside a newer single file: the store's key must be of the weights that are computed with."""
    shutil.copy(folder / "model.safetensors", folder / "newer")
    old = split_weights(folder)
    (folder / "newer").rename(folder / "model.safetensors")
    edit_weights(folder, lambda t: t["model.norm.weight"].fill_(2.0))
    try:
        found = inspect_folder(folder, KEY)
    except UserError:
        return  # refusing both is as good
    before = [file_digest(f) for f in found.weight_files]
    norm = load_unsharded(found, dtype=torch.float32).model.norm.weight.detach()
    inspected = {n: t for f in found.weight_files for n, t in load_file(f).items()}
    assert torch.equal(norm, inspected["model.norm.weight"])
    assert before != [file_digest(f) for f in old]


def test_a_tied_head_with_other_weights_of_its_own_is_refused_or_tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    try:
        found = inspect_folder(folder, KEY)
    except UserError:
        return
    lm = load_unsharded(found, dtype=torch.float32)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


# Names


def test_resolve_of_a_folder_is_the_folder(folder: Path) -> None:
    assert resolve(str(folder), KEY) == folder


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_resolve_of_what_is_no_hub_name(name: str) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        resolve(name, KEY)


def test_resolve_of_a_file(folder: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        resolve(str(folder / "config.json"), KEY)


# Tokenizers


def tokenizer_complaint(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, "model.tokenizer")
    message = str(caught.value)
    assert message.startswith("model.tokenizer: ")
    assert str(folder) in message
    return message


def test_a_sound_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "model.tokenizer")
    assert tokenizer.is_fast
    assert tokenizer.chat_template is not None


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in tokenizer_complaint(folder)
    (folder / "tokenizer_config.json").unlink()
    assert "Set model.tokenizer" in tokenizer_complaint(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "\0"])
def test_a_damaged_tokenizer(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    assert "holds no tokenizer" in tokenizer_complaint(folder)


def test_a_tokenizer_of_a_broken_model(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] = {"type": "Nonesuch"}
    file.write_text(json.dumps(content))
    assert "holds no tokenizer" in tokenizer_complaint(folder)


def test_a_slow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "slow" in tokenizer_complaint(folder)


# Dropout


@pytest.mark.parametrize("fields", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_with_and_without_experts(tmp_path: Path, fields: dict[str, Any]) -> None:
    AutoModelForCausalLM.from_config(small("qwen3_moe", **fields)).save_pretrained(tmp_path)
    assert inspect_folder(tmp_path, KEY).config.model_type == "qwen3_moe"


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(small("mixtral")).save_pretrained(tmp_path)
    assert inspect_folder(tmp_path, KEY).config.num_local_experts == 8
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_weights(tmp_path, lambda tensors: tensors.__delitem__(lost))
    assert f"missing: {lost} (1 in all)" in complaint(tmp_path)


def test_experts_that_were_saved_as_one(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_config(small("mixtral"))
    lm.save_pretrained(tmp_path, save_original_format=False)
    loaded = load_unsharded(inspect_folder(tmp_path, KEY), dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lm.state_dict().items())
    edit_weights(tmp_path, lambda tensors: tensors.__delitem__("model.layers.1.mlp.experts.down_proj"))
    assert "missing: model.layers.1.mlp.experts.down_proj (1 in all)" in complaint(tmp_path)


def test_a_router_without_noise() -> None:
    plain = without_dropout(small("mixtral", router_jitter_noise=0.1, output_router_logits=True))
    assert (plain.router_jitter_noise, plain.output_router_logits) == (0.0, False)


def test_without_dropout_changes_dropout_alone() -> None:
    for family in SHARING_FAMILIES:
        config = AutoConfig.for_model(family, attention_dropout=0.25)
        config.resid_pdrop, config.hidden_dropout, config.embd_pdrop = 0.1, 0.2, 0.3
        before = config.to_dict()
        plain = without_dropout(config)
        assert type(plain) is type(config)
        zeroed = {"attention_dropout": 0.0, "resid_pdrop": 0.0, "hidden_dropout": 0.0, "embd_pdrop": 0.0}
        assert plain.to_dict() == before | zeroed
        assert config.to_dict() == before


def test_a_model_with_dropout_is_loaded_without(folder: Path) -> None:
    configure(folder, attention_dropout=0.5)
    lm = load_unsharded(inspect_folder(folder, KEY), dtype=torch.float32).train()
    assert lm.model.layers[0].self_attn.attention_dropout == 0.0
