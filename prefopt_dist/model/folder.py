"""A model folder: its configuration and generation settings, and the check that its weights fill the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)

from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import WEIGHTS
from prefopt_dist.model.larger import check_language_part
from prefopt_dist.model.published import quantization
from prefopt_dist.model.weight_files import stored_tensors, weight_files
from prefopt_dist.model.weight_names import Names, match


@dataclass(frozen=True)
class ModelFolder:
    """A checked local folder with config, tokenizer and safetensors weights."""

    path: Path
    config: PreTrainedConfig
    """The language model's configuration."""
    weight_files: tuple[Path, ...]
    """The safetensors files, sorted by name."""
    key: str
    """The configuration key that named the folder, for messages."""
    names: Names = field(default_factory=Names)
    """The names of the files' tensors."""
    part_of_more: bool = False
    """Whether the folder's model has other parts than the language model, such as one for images; they are not loaded,
    and `config` is the language model's."""
    adapter: Path | None = None
    """A folder of saved adapters that belong to the model: it is loaded with them."""
    quantised: bool = False
    """Whether the linear layers are quantised to 4 bit as they are loaded."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Return all files that decide the numbers of the model's weights, those of its adapter last."""
        return self.weight_files if self.adapter is None else (*self.weight_files, self.adapter / WEIGHTS)

    def equals(self, other: ModelFolder) -> bool:
        """Return whether both are the same model."""
        return (self.path, self.adapter, self.quantised) == (other.path, other.adapter, other.quantised)


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
        found = Path(snapshot_download(name_or_path, allow_patterns=patterns))
        if weights and not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name_or_path, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return found
    except GatedRepoError as e:
        raise UserError(
            f"{key}: {name_or_path!r} is gated on the hub. Accept its licence there and set HF_TOKEN, or give a folder."
        ) from e
    except Exception as e:  # also those of the http library, which differs between versions of huggingface_hub
        raise UserError(
            f"{key}: {name_or_path!r} is neither a local folder nor a model that the hub gave "
            f"({type(e).__name__}). Check the name and the network, or download the model first and give its folder."
        ) from e


def inspect_folder(path: Path, key: str) -> ModelFolder:
    """Check a model folder without loading weights: config, family, weight files and their parameter names.

    Args:
        path: the folder.
        key: the configuration key that names it, for messages.

    Raises:
        UserError: the folder is incomplete, damaged or of a model that is not supported.
    """
    whole = read_config(path, key)
    config = language_config(whole, path, key)
    check_config(config, path, key)
    if quantization(whole.to_dict()) is not None:
        raise UserError(f"{key}: the weights of {path} are quantised. Give a folder of the model in bfloat16.")
    config.return_dict = True  # the scoring module reads results by name
    files = weight_files(path, key)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    part_of_more = whole is not config
    if part_of_more:
        check_language_part(whole, lm, path, key)
    names = match(lm, stored_tensors(files, key), path, key, part_of_more=part_of_more)
    return ModelFolder(path, config, files, key, names, part_of_more)


def check_config(config: PreTrainedConfig, path: Path, key: str) -> None:
    """Check a language model by its configuration alone."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{key}: transformers {transformers.__version__} has no causal language model for the model_type "
            f"{config.model_type!r} of {path}. Give a folder of one that it has."
        )
    plain = config.to_dict()
    # Gemma 4 says "vision" where only the tokens of an image see those that follow.
    if plain.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise UserError(
            f"{key}: {path} sets use_bidirectional_attention, so it is not a causal language model. Give a causal one."
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


def read_language_config(path: Path, key: str) -> PreTrainedConfig:
    """Read the configuration of a folder's language model, which may be a part of a model that also takes images."""
    return language_config(read_config(path, key), path, key)


def language_config(config: PreTrainedConfig, path: Path, key: str) -> PreTrainedConfig:
    """Return the configuration of the language model of a larger model; of a language model the same object."""
    try:
        found: PreTrainedConfig = config.get_text_config(decoder=True)
    except ValueError as e:
        raise UserError(
            f"{key}: {path} has several language models ({e}). Give the folder of one language model."
        ) from e
    if found is config:
        return config
    found = copy.deepcopy(found)
    # The larger model ties its embeddings by its own field, and its files have one dtype.
    if hasattr(config, "tie_word_embeddings"):
        found.tie_word_embeddings = config.tie_word_embeddings
    if found.dtype is None:
        found.dtype = config.dtype
    return found


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
