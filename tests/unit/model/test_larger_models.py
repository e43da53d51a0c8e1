"""Folders of models that also take images, and of tensors that transformers skips: loaded, and exported whole again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import LARGER_MODELS, VOCABULARY, larger_model, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from prefopt_dist.checkpoint import export_weights, other_parts
from prefopt_dist.checkpoint.export_weights import WeightsInMemory
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import ModelFolder, inspect_folder
from prefopt_dist.model.load import load_language_model

KEY = "model.name_or_path"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: 0)


def logits(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm(input_ids=ids, use_cache=False).logits
    return found


def load(folder: ModelFolder, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_language_model(folder, folder.config, dtype, attn_implementation="eager").eval()


def export(source: ModelFolder, lm: PreTrainedModel, target: Path, dtype: torch.dtype = torch.float32) -> None:
    target.mkdir()
    empty = export_weights.empty_model(source, dtype, [])
    weights = WeightsInMemory(lm.state_dict())
    written = export_weights.write_share(weights, empty, dtype, target, [0], source)
    export_weights.write_index(target, written)
    if source.part_of_more:
        other_parts.copy_settings(source.path, target, dtype, source.config.model_type)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", LARGER_MODELS)
def test_the_language_model_computes_what_the_larger_model_does(tmp_path: Path, family: str) -> None:
    whole = larger_model(family)
    whole.save_pretrained(tmp_path)
    folder = inspect_folder(tmp_path, KEY)
    assert folder.part_of_more
    lm = load(folder)
    assert folder.names.kept
    assert all("lm_head" not in name and "embed_tokens" not in name for name in folder.names.kept)
    ids = torch.randint(1, 59, (2, 14))
    assert (logits(lm, ids) - logits(whole, ids)).abs().max() < 1e-6


@pytest.mark.parametrize("family", LARGER_MODELS)
def test_the_export_is_the_whole_folder_again(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_weights, "PART_BYTES", 30_000)
    source, target = tmp_path / "source", tmp_path / "target"
    larger_model(family).to(torch.bfloat16).save_pretrained(source)
    file = source / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"text_config": config["text_config"] | {"dtype": "bfloat16"}}))
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    folder = inspect_folder(source, KEY)
    lm = load(folder)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.5)
    export(folder, lm, target)
    assert len(list(target.glob("*.safetensors"))) > 2
    assert (target / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    before, after = tensors(source), tensors(target)
    assert before.keys() == after.keys()
    for name in folder.names.kept:
        assert before[name].dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(before[name], after[name]), name
    own = before.keys() - set(folder.names.kept)
    assert all(after[name].dtype == torch.float32 for name in own)
    config, written = (json.loads((f / "config.json").read_text()) for f in (source, target))
    assert written == config | {"dtype": "float32", "text_config": config["text_config"] | {"dtype": "float32"}}
    served = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    assert type(served).__name__ == config["architectures"][0]
    ids = torch.randint(1, 59, (2, 14))
    assert (logits(served.eval(), ids) - logits(lm, ids)).abs().max() < 1e-6
    assert (logits(load(inspect_folder(target, KEY)), ids) - logits(lm, ids)).abs().max() < 1e-6


def test_a_larger_model_that_scales_its_logits_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Cohere's model for images, which leaves the logit scale of its language model out."""
    whole = larger_model("gemma3")
    whole.save_pretrained(tmp_path)
    original = type(whole).forward

    def scaled(self: Any, **given: Any) -> Any:
        result = original(self, **given)
        result.logits = 0.5 * result.logits
        return result

    monkeypatch.setattr(type(whole), "forward", scaled)
    with pytest.raises(UserError, match=r"Gemma3ForConditionalGeneration are 0\.5·x of the head's product x, .* are x"):
        inspect_folder(tmp_path, KEY)


def test_a_missing_tensor_of_the_language_model_is_named(tmp_path: Path) -> None:
    larger_model("gemma3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    held.pop("language_model.model.layers.1.mlp.up_proj.weight")
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        inspect_folder(tmp_path, KEY)


@pytest.mark.parametrize(
    ("family", "skipped"),
    [("glm4_moe", "model.layers.46.mlp.up_proj.weight"), ("qwen3_5_text", "mtp.layers.0.mlp.up_proj.weight")],
)
def test_tensors_that_transformers_skips_are_kept(tmp_path: Path, family: str, skipped: str) -> None:
    """Predictions of several tokens: not trained, and part of the export, bit for bit in their own dtype."""
    source, target = tmp_path / "source", tmp_path / "target"
    tiny_model(family).save_pretrained(source)
    file = source / "model.safetensors"
    extra = torch.randn(4, 4).to(torch.float8_e4m3fn)
    save_file(load_file(file) | {skipped: extra}, file, metadata={"format": "pt"})
    folder = inspect_folder(source, KEY)
    assert folder.names.kept == (skipped,)
    lm = load(folder)
    export(folder, lm, target)
    assert torch.equal(tensors(target)[skipped].view(torch.uint8), extra.view(torch.uint8))
    assert inspect_folder(target, KEY).names.kept == (skipped,)
    again = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    ids = torch.randint(1, VOCABULARY, (1, 9))
    assert torch.equal(logits(again, ids), logits(lm, ids))


def test_a_tied_model_saved_without_its_head(tmp_path: Path) -> None:
    """As GPT-2 is published: the names lack the backbone's prefix, in the export too."""
    source, target = tmp_path / "source", tmp_path / "target"
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)).eval()
    whole.transformer.save_pretrained(source)
    folder = inspect_folder(source, KEY)
    lm = load(folder)
    ids = torch.randint(1, VOCABULARY, (1, 9))
    assert (logits(lm, ids) - logits(whole, ids)).abs().max() < 1e-6
    export(folder, lm, target)
    assert tensors(target).keys() == tensors(source).keys()
    assert torch.equal(logits(load(inspect_folder(target, KEY)), ids), logits(lm, ids))


def test_correction_biases_are_exported_in_their_own_dtype(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    lm = tiny_model("deepseek_v3")
    lm.save_pretrained(source)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = tensors(source)[name]
    assert bias.abs().min() > 0
    export(inspect_folder(source, KEY), load(inspect_folder(source, KEY)), target, torch.bfloat16)
    assert torch.equal(tensors(target)[name], bias), "not rounded"
    assert inspect_folder(target, KEY).names.kept == ()
    assert tensors(target)["model.norm.weight"].dtype == torch.bfloat16
