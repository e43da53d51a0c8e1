"""Quantised and pickled folders, converted once into the cache: tensors, names, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VOCABULARY, larger_model, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from prefopt_dist.errors import UserError
from prefopt_dist.model import published
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.published import from_fp8, from_mxfp4, trainable_folder
from prefopt_dist.setup import prepare_models

KEY = "model.name_or_path"


def converted(folder: Path, cache: Path, said: list[str] | None = None) -> Path:
    return trainable_folder(folder, KEY, cache, (said if said is not None else []).append)


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def quantise_fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """8 bits, and a scale for each block or one for all."""
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    out, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].abs().max() / 448
            out[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def write_fp8(folder: Path, block: tuple[int, int] | None) -> None:
    """Quantise the matrices of the layers, as DeepSeek's folders are."""
    held = load_file(folder / "model.safetensors")
    for name in list(held):
        if ".layers." in name and name.endswith("proj.weight") and "vision" not in name:
            held[name], held[f"{name}_scale_inv"] = quantise_fp8(held[name].float(), block)
            held[name.replace("weight", "activation_scale")] = torch.ones(())
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": block and list(block), "activation_scheme": "dynamic"}
    configure(folder, quantization_config=settings)


def test_a_plain_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    tiny_model("olmo3").save_pretrained(tmp_path / "model")
    assert converted(tmp_path / "model", tmp_path / "cache") == tmp_path / "model"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("block", [(16, 8), (12, 20), None])
def test_fp8_is_converted_once(tmp_path: Path, block: tuple[int, int] | None) -> None:
    """Blocks that divide the matrices, blocks that do not, and one scale for a whole matrix."""
    source, said = tmp_path / "model", list[str]()
    lm = tiny_model("deepseek_v3").to(torch.bfloat16)
    lm.save_pretrained(source)
    before = tensors(source)
    write_fp8(source, block)
    with pytest.raises(UserError, match="are quantised"):
        inspect_folder(source, KEY)
    folder = converted(source, tmp_path / "cache", said)
    assert len(said) == 1
    assert "(fp8) once" in said[0]
    after = tensors(folder)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if ".layers." in name and name.endswith("proj.weight"):
            assert not torch.equal(after[name], tensor)
            assert (after[name].float() - tensor.float()).abs().max() <= tensor.abs().max() / 14
        else:
            assert torch.equal(after[name], tensor), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_unsharded(inspect_folder(folder, KEY), dtype=torch.bfloat16).config.model_type == "deepseek_v3"
    assert converted(source, tmp_path / "cache", said) == folder
    assert len(said) == 1, "not a second time"
    os.utime(source / "model.safetensors", (1, 1))
    assert converted(source, tmp_path / "cache", said) != folder, "of other files"


def test_a_scale_for_each_row_and_experts_in_one_tensor() -> None:
    weight = torch.randn(3, 6, 8)
    for scale in (torch.rand(3, 6, 1), torch.rand(3, 6), torch.rand(())):
        eight = weight.to(torch.float8_e4m3fn)
        factor = scale if scale.dim() in (0, 3) else scale[..., None]
        assert torch.equal(from_fp8(eight, scale, None), (eight.float() * factor).to(torch.bfloat16))
    scale = torch.rand(3, 2, 2)
    whole = scale.repeat_interleave(4, 1)[:, :6].repeat_interleave(5, 2)[:, :, :8]
    assert torch.equal(from_fp8(eight, scale, [4, 5]), (eight.float() * whole).to(torch.bfloat16))


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (3, 64, 10)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_a_folder_of_gpt_oss(tmp_path: Path) -> None:
    """As it is published: experts in 4 bits, biases and everything else in bfloat16."""
    source = tmp_path / "model"
    fields = {"hidden_size": 64, "intermediate_size": 32}
    tiny_model("gpt_oss", **fields).to(torch.bfloat16).save_pretrained(source)
    held, shapes = tensors(source), {}
    for name in list(held):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, into, out = held.pop(name).shape
            shapes[name] = (experts, into, out)
            held[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
            held[f"{name}_scales"] = torch.randint(118, 122, (experts, out, into // 32), dtype=torch.uint8)
    assert shapes
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    configure(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    folder = converted(source, tmp_path / "cache")
    after = tensors(folder)
    assert {name: tuple(after[name].shape) for name in shapes} == shapes
    lm = load_unsharded(inspect_folder(folder, KEY), dtype=torch.bfloat16)
    for name in shapes:
        expected = convert_moe_packed_tensors(held[f"{name}_blocks"], held[f"{name}_scales"])
        assert torch.equal(lm.state_dict()[name], expected)


def test_a_quantised_language_model_beside_images(tmp_path: Path) -> None:
    """As Ministral 3 is published; the part for images stays as it is."""
    source = tmp_path / "model"
    larger_model("mistral3").to(torch.bfloat16).save_pretrained(source)
    before = tensors(source)
    write_fp8(source, None)
    folder = inspect_folder(converted(source, tmp_path / "cache"), KEY)
    assert folder.part_of_more
    after = tensors(folder.path)
    assert all(torch.equal(after[name], before[name]) for name in folder.names.kept)


@pytest.mark.parametrize("files", [1, 2])
def test_pickled_weights_are_converted(tmp_path: Path, files: int) -> None:
    source = tmp_path / "model"
    lm = tiny_model("gpt_neox")
    lm.save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    held = tensors(source)
    (source / "model.safetensors").unlink()
    names = sorted(held)
    if files == 1:
        torch.save(held, source / "pytorch_model.bin")
    else:
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in parts.items():
            torch.save({name: held[name] for name in part}, source / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    folder = converted(source, tmp_path / "cache")
    assert len(list(folder.glob("*.safetensors"))) == files
    assert not list(folder.glob("*.bin*"))
    assert (folder / "tokenizer_config.json").read_text() == "{}"
    after = tensors(inspect_folder(folder, KEY).path)
    assert after.keys() == held.keys()
    assert all(torch.equal(after[name], held[name]) for name in names)
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(1, VOCABULARY, (1, 9))
    assert torch.equal(again(ids).logits, lm(ids).logits)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nonexistent/never",)


def test_a_pickle_of_anything_else_is_refused(tmp_path: Path) -> None:
    tiny_config("gpt_neox").save_pretrained(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as a file of tensors alone"):
        converted(tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "converted").glob("[!.]*/"))


def test_what_is_quantised_in_another_way_is_refused_by_its_name(tmp_path: Path) -> None:
    tiny_config("olmo3").save_pretrained(tmp_path)
    configure(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantised by 'gptq', .* Give the folder of the model in bfloat16"):
        converted(tmp_path, tmp_path / "cache")


def test_8_bits_without_a_scale_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("olmo3").save_pretrained(source)
    write_fp8(source, None)
    held = load_file(source / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.weight"
    held.pop(f"{lost}_scale_inv")
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has {lost} in 8 bits, but no scale of it"):
        converted(source, tmp_path / "cache")


def test_a_run_takes_the_converted_folder(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("olmo3").save_pretrained(source)
    write_fp8(source, None)
    config: Any = SimpleNamespace(cache_dir=tmp_path / "cache", data=SimpleNamespace(max_length=64))
    folder = prepare_models.model_folder(config, str(source), KEY)
    assert folder.path.parent == tmp_path / "cache" / "converted"


def test_a_conversion_that_was_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    tiny_model("olmo3").save_pretrained(source)
    write_fp8(source, None)
    whole = published._convert

    def dies(*given: Any, **options: Any) -> None:
        whole(*given, **options)
        raise OSError("no space left")

    monkeypatch.setattr(published, "_convert", dies)
    with pytest.raises(OSError, match="no space left"):
        converted(source, tmp_path / "cache")
    monkeypatch.undo()
    folder = converted(source, tmp_path / "cache")
    assert inspect_folder(folder, KEY).path == folder
    shutil.rmtree(folder)
    assert converted(source, tmp_path / "cache") == folder
