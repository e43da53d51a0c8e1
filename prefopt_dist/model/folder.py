"""Inspect a model folder: configuration, family, weight files, the names and shapes of tensors."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from prefopt_dist.errors import UserError

FAMILIES = (
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
"""`model_type`s whose packed log-probs are tested against the plain model's."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layers that a packed row can be computed with; any other carries state along the row or attends otherwise."""

RECURRENT = ("mamba", "ssm", "conv_kernel", "conv_l_cache", "state_size", "linear_attention", "lru_", "rwkv", "xlstm")
"""Parts of a model_type, a field or a layer type by which a family with state along the row is known."""

ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary scalings that look at a token's own position only, never at the longest sequence of the row."""

EMBEDDING = "model.embed_tokens.weight"
"""The input embedding's name in all of these families."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked local folder with config, tokenizer and safetensors weights."""

    path: Path
    config: PreTrainedConfig
    weight_files: tuple[Path, ...]
    """Sorted by name."""
    key: str
    """The dotted key that named it, for messages"""


def resolve(name_or_path: str, key: str, *, weights: bool = True) -> Path:
    """A local folder as it is, or the local snapshot of a hub model (downloaded where the network allows).

    weights False: without the weight files, for a tokenizer or for the data alone.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{key}: {name_or_path!r} is no folder. Give a Hugging Face model folder or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    patterns = ["*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges*"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except GatedRepoError as e:
        raise UserError(
            f"{key}: {name_or_path!r} is gated on the hub. Accept its licence there and set HF_TOKEN, or give a folder."
        ) from e
    except Exception as e:  # the http library's own kinds too, which is another one in other versions of the hub's
        raise UserError(
            f"{key}: {name_or_path!r} is neither a local folder nor a model that the hub gave "
            f"({type(e).__name__}). Check the name and the network, or download it first and give the folder."
        ) from e


def inspect_folder(path: Path, key: str, max_length: int | None = None) -> ModelFolder:
    """Checks a model folder without loading weights: config, family, weight files and their parameter names.

    max_length: tokens of the run's longest sequence, where it is known; a longrope model is taken only then.
    """
    config = read_config(path, key)
    check_config(config, path, key, max_length)
    config.return_dict = True  # the scoring module reads results by name
    folder = ModelFolder(path=path, config=config, weight_files=weight_files(path, key), key=key)
    _check_names(folder, key)
    return folder


def check_config(config: PreTrainedConfig, path: Path, key: str, max_length: int | None) -> None:
    """What can be said of a model by its configuration alone; max_length as in `inspect_folder`."""
    _check_family(config, path, key)
    _check_experts(config, path, key)
    _check_rope(config, path, key, max_length)


def _check_family(config: PreTrainedConfig, path: Path, key: str) -> None:
    """Refuses what a packed row would compute otherwise than the model alone, and what was not tried."""
    plain = config.to_dict()
    # A family with recurrent or convolutional layers is told by its fields; its name may be new.
    kinds = (plain.get("layer_types") or []) + (plain.get("block_types") or [])
    said = " ".join([config.model_type, *plain, *map(str, kinds)]).lower()
    if config.model_type in FAMILIES:
        why = ""
    elif "vision_config" in plain:
        why = "it takes images too. Save its language model alone" + (
            " (Gemma3ForCausalLM, model_type gemma3_text)" if config.model_type == "gemma3" else ""
        )
    elif any(field in said for field in RECURRENT):
        why = "its layers carry state along the row, so a sequence would see its neighbours in a packed row"
    else:
        why = "its numbers in a packed row have not been compared with the model's own"
    if why:
        raise UserError(
            f"{key}: model_type {config.model_type!r} of {path} is not supported: {why}. "
            f"Supported are {', '.join(FAMILIES)}."
        )
    other = sorted(set(plain.get("layer_types") or LAYER_TYPES) - set(LAYER_TYPES))
    if other:
        raise UserError(f"{key}: layer_types of {path} has {', '.join(other)}; supported are {', '.join(LAYER_TYPES)}.")
    if plain.get("use_bidirectional_attention"):
        raise UserError(f"{key}: use_bidirectional_attention of {path} is set: no causal language model.")


def _check_experts(config: PreTrainedConfig, path: Path, key: str) -> None:
    """Memory and FLOP are counted on one layer and taken for all."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise UserError(
            f"{key}: some layers of {path} have experts and others none (mlp_only_layers, decoder_sparse_step), which "
            "is not supported; every layer must have them."
        )


def _check_rope(config: PreTrainedConfig, path: Path, key: str, max_length: int | None) -> None:
    """Refuses a rotary scaling by which a neighbour in a packed row would change a sequence's numbers."""
    found = config.rope_parameters or {}
    # Gemma 3 has one set of parameters for each type of layer.
    by_layer = [p for p in found.values() if isinstance(p, dict)] or [found]
    for parameters in by_layer:
        rope = parameters.get("rope_type", "default")
        if rope == "longrope" and max_length is not None:
            # The factors are chosen by the row's largest position. Positions begin anew with each sequence, so up
            # to this length it is the short ones for every row, as for every sequence alone.
            original = parameters["original_max_position_embeddings"]
            if max_length > original:
                raise UserError(
                    f"{key}: {path} has longrope factors for sequences beyond {original} tokens, which a neighbour in "
                    f"a packed row would switch on. Set data.max_length to at most {original} (it is {max_length})."
                )
        elif rope not in ROPE_TYPES:
            raise UserError(
                f"{key}: rope_type {rope!r} of {path} is not supported, since a neighbour in a packed row would "
                f"change a sequence's numbers; supported are {', '.join(ROPE_TYPES)}."
            )


def read_config(path: Path, key: str) -> PreTrainedConfig:
    """The config.json of a model folder."""
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: {path} holds adapters, not a whole model. Give a whole one: of a run with adapters, what the "
            "stage export writes with export.merged=true."
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json. Give a folder written by save_pretrained.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as e:  # transformers' own kinds derive from nothing in particular
        why = str(e).rstrip(".")
        raise UserError(f"{key}: {path / 'config.json'} cannot be read: {why}. Copy the folder again.") from e
    return config


def read_generation_config(path: Path, key: str) -> GenerationConfig | None:
    """The generation_config.json of a model folder; None where it has none."""
    if not (path / "generation_config.json").is_file():
        return None
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(path)
    except Exception as e:  # transformers' own kinds derive from nothing in particular
        why = str(e).strip().rstrip(".").splitlines()[0]
        raise UserError(
            f"{key}: {path / 'generation_config.json'} cannot be read: {why}. Copy it again, or remove it."
        ) from e
    return found


def weight_files(path: Path, key: str) -> tuple[Path, ...]:
    """The safetensors files of a folder, by name; all that its index names are there."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file() and single.is_file():
        raise UserError(
            f"{key}: {path} has both {single.name} and {index.name}, and one of them is left from another save. "
            "Remove the one that does not belong there."
        )
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{key}: {index} is damaged ({type(e).__name__}: {e}). Copy the folder again.") from e
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise UserError(f"{key}: {path} lacks {', '.join(missing)}, named in {index.name}. Copy the folder again.")
        return tuple(path / n for n in names)
    if not single.is_file():
        raise UserError(
            f"{key}: {path} has no model.safetensors (nor an index of several). Other weight formats are not read: "
            "save the model with save_pretrained."
        )
    return (single,)


def _header(file: Path, key: str) -> dict[str, Any]:
    """The parameter names, shapes and dtypes of a safetensors file; checks that the file is whole."""
    size = file.stat().st_size
    if not os.access(file, os.R_OK):
        raise UserError(f"{key}: {file} cannot be read (its permissions forbid it). Make it readable.")
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{key}: {file} is cut short ({size} bytes). Copy it again.")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{key}: {file} has a damaged header ({type(e).__name__}). Copy it again.") from e
    if end != size:
        raise UserError(f"{key}: {file} has {size} bytes, its header promises {end}. Copy it again.")
    return header


def _check_names(folder: ModelFolder, key: str) -> None:
    """Refuses weights that do not fill the model; from_pretrained says nothing about them under ZeRO-3."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(folder.config)
        inside = lm.state_dict()
        expected = revert_weight_conversion(lm, dict(inside))  # the usual files' layout: experts stand alone in them
    found: dict[str, list[int]] = {}
    for file in folder.weight_files:
        found |= {name: t["shape"] for name, t in _header(file, key).items()}
    if any(name in found for name in inside.keys() - expected.keys()):
        expected = inside  # saved as they are in the model, a layer's experts as one
    tied = {"lm_head.weight"} if folder.config.tie_word_embeddings else set()
    if tied and "lm_head.weight" in found and not _equal_tensors(folder, "lm_head.weight", EMBEDDING):
        raise UserError(
            f"{key}: {folder.path} says tie_word_embeddings, but its lm_head.weight differs from {EMBEDDING}. "
            "Set tie_word_embeddings to false in its config.json, or remove lm_head.weight."
        )
    missing = sorted(n for n in expected if n not in found and n not in tied)
    unknown = sorted(n for n in found if n not in expected and not n.endswith("rotary_emb.inv_freq"))
    shapes = [
        f"{n} {found[n]} instead of {list(expected[n].shape)}"
        for n in sorted(found)
        if n in expected and found[n] != list(expected[n].shape)
    ]
    faults = [
        f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''} ({len(names)} in all)"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise UserError(
            f"{key}: the weights in {folder.path} do not match its config.json. {'; '.join(faults)}. "
            "Missing weights would start at random: give a folder of a whole causal language model."
        )


def _equal_tensors(folder: ModelFolder, first: str, second: str) -> bool:
    """Whether two tensors of the weight files are equal, by their bytes."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for name in {first, second} & set(tensors.keys()):
                found[name] = tensors.get_tensor(name)
    return second not in found or torch.equal(found[first], found[second])
