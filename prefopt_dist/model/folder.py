"""Checks of a model folder: configuration, family, weight files, names and shapes of tensors."""

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
"""The `model_type`s whose log-probs in packed rows are tested against those of the plain model."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Types of layers that can compute a packed row; any other carries state along the row or attends differently."""

RECURRENT = ("mamba", "ssm", "conv_kernel", "conv_l_cache", "state_size", "linear_attention", "lru_", "rwkv", "xlstm")
"""Parts of a model_type, of a field or of a layer type that show that a family carries state along the row."""

ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary scalings that depend on a token's own position only, never on the longest sequence of the row."""

EMBEDDING = "model.embed_tokens.weight"
"""The input embedding's name in all of these families."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked local folder with config, tokenizer and safetensors weights."""

    path: Path
    config: PreTrainedConfig
    weight_files: tuple[Path, ...]
    """The safetensors files, sorted by name."""
    key: str
    """The configuration key that named the folder, for messages."""


def resolve(name_or_path: str, key: str, *, weights: bool = True) -> Path:
    """Return a local folder as it is, or the local snapshot of a hub model, which is downloaded where necessary.

    Args:
        name_or_path: a folder or a hub name.
        key: the configuration key that names it, for messages.
        weights: False to leave out the weight files, for a tokenizer or for the data alone.

    Raises:
        UserError: neither a folder nor a model that the hub gave.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{key}: {name_or_path!r} is not a folder. Give a Hugging Face model folder or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    patterns = ["*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges*"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except GatedRepoError as e:
        raise UserError(
            f"{key}: {name_or_path!r} is gated on the hub. Accept its licence there and set HF_TOKEN, or give a folder."
        ) from e
    except Exception as e:  # also those of the http library, which differs between versions of huggingface_hub
        raise UserError(
            f"{key}: {name_or_path!r} is neither a local folder nor a model that the hub gave "
            f"({type(e).__name__}). Check the name and the network, or download the model first and give its folder."
        ) from e


def inspect_folder(path: Path, key: str, max_length: int | None = None) -> ModelFolder:
    """Check a model folder without loading weights: config, family, weight files and their parameter names.

    Args:
        path: the folder.
        key: the configuration key that names it, for messages.
        max_length: tokens of the run's longest sequence, or None where unknown; only where it is known a longrope
            model is accepted.

    Raises:
        UserError: the folder is incomplete, damaged or of a model that is not supported.
    """
    config = read_config(path, key)
    check_config(config, path, key, max_length)
    config.return_dict = True  # the scoring module reads results by name
    folder = ModelFolder(path=path, config=config, weight_files=weight_files(path, key), key=key)
    _check_names(folder, key)
    return folder


def check_config(config: PreTrainedConfig, path: Path, key: str, max_length: int | None) -> None:
    """Check a model by its configuration alone; `max_length` as in `inspect_folder`."""
    _check_family(config, path, key)
    _check_experts(config, path, key)
    _check_rope(config, path, key, max_length)


def _check_family(config: PreTrainedConfig, path: Path, key: str) -> None:
    """Refuse a family that computes other numbers in a packed row than alone, or that was not tested."""
    plain = config.to_dict()
    # The fields show whether a family has recurrent or convolutional layers; its name may be unknown.
    kinds = (plain.get("layer_types") or []) + (plain.get("block_types") or [])
    described = " ".join([config.model_type, *plain, *map(str, kinds)]).lower()
    if config.model_type in FAMILIES:
        why = ""
    elif "vision_config" in plain:
        why = "it takes images too; save its language model alone" + (
            " (Gemma3ForCausalLM, model_type gemma3_text)" if config.model_type == "gemma3" else ""
        )
    elif any(field in described for field in RECURRENT):
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
        raise UserError(
            f"{key}: {path} sets use_bidirectional_attention, so it is not a causal language model. Give a causal one."
        )


def _check_experts(config: PreTrainedConfig, path: Path, key: str) -> None:
    """Refuse layers that differ, because memory and FLOP are counted on one layer and multiplied."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise UserError(
            f"{key}: some layers of {path} have experts and others have none (mlp_only_layers, decoder_sparse_step), "
            "which is not supported. Give a model in which every layer has experts."
        )


def _check_rope(config: PreTrainedConfig, path: Path, key: str, max_length: int | None) -> None:
    """Refuse a rotary scaling by which a neighbour in a packed row would change a sequence's numbers."""
    found = config.rope_parameters or {}
    # Gemma 3 has a set of parameters for each type of layer.
    by_layer = [p for p in found.values() if isinstance(p, dict)] or [found]
    for parameters in by_layer:
        rope = parameters.get("rope_type", "default")
        if rope == "longrope" and max_length is not None:
            # The factors are chosen by the row's largest position. Positions restart with each sequence, so up to this
            # length the short factors are chosen for every row, as for every sequence alone.
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
    """Read the config.json of a model folder."""
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: {path} holds adapters, not a whole model. Give a whole model; for a run with adapters, the stage "
            "export writes one with export.merged=true."
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json. Give a folder written by save_pretrained.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as e:  # transformers' exceptions have no common class
        why = str(e).rstrip(".")
        raise UserError(f"{key}: {path / 'config.json'} cannot be read: {why}. Copy the folder again.") from e
    return config


def read_generation_config(path: Path, key: str) -> GenerationConfig | None:
    """Read the generation_config.json of a model folder; return None where there is none."""
    if not (path / "generation_config.json").is_file():
        return None
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(path)
    except Exception as e:  # transformers' exceptions have no common class
        why = str(e).strip().rstrip(".").splitlines()[0]
        raise UserError(
            f"{key}: {path / 'generation_config.json'} cannot be read: {why}. Copy it again, or remove it."
        ) from e
    return found


def weight_files(path: Path, key: str) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, sorted by name; all files that its index names must exist."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file() and single.is_file():
        raise UserError(
            f"{key}: {path} has both {single.name} and {index.name}; one of them is left from an earlier save. "
            "Remove the one that does not belong to the model."
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
    """Read the parameter names, shapes and dtypes of a safetensors file, and check that the file is complete."""
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
        raise UserError(f"{key}: {file} has {size} bytes, but its header promises {end}. Copy it again.")
    return header


def _check_names(folder: ModelFolder, key: str) -> None:
    """Refuse weights that do not fill the model; under ZeRO-3 from_pretrained does not report them."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(folder.config)
        in_model = lm.state_dict()
        expected = revert_weight_conversion(
            lm, dict(in_model)
        )  # layout of the usual files, in which each expert has its own tensors
    found: dict[str, list[int]] = {}
    for file in folder.weight_files:
        found |= {name: t["shape"] for name, t in _header(file, key).items()}
    if any(name in found for name in in_model.keys() - expected.keys()):
        expected = in_model  # saved as in the model, with all experts of a layer in one tensor
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
    """Return whether two tensors of the weight files are equal; True where the second is missing."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for name in {first, second} & set(tensors.keys()):
                found[name] = tensors.get_tensor(name)
    return second not in found or torch.equal(found[first], found[second])
