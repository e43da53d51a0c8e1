"""Checks of DeepSpeed's JSON files, which may hold ZeRO, communication and offload keys only.

DeepSpeed itself accepts any unknown top-level key without a message, so the keys that it reads (0.19) are listed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from prefopt_dist.config.build import suggest_names
from prefopt_dist.config.strict_yaml import read_text
from prefopt_dist.errors import UserError, shorten

_ALLOWED = {
    "zero_optimization",
    "communication_data_type",
    "data_types",
    "comms_logger",
    "aio",  # reading and writing of offloads to NVMe
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "log_level",
}
"""Top-level keys that a file may have."""

_MODEL_DTYPE = "the YAML's model.dtype"
_BATCH = "the YAML's train.global_batch_pairs and train.micro_batch_tokens"
_WANDB = "the YAML's tracking section"
_OWNED = {
    "train_batch_size": "the YAML's train.global_batch_pairs",
    "train_micro_batch_size_per_gpu": "the YAML's train.micro_batch_tokens",
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "the YAML's optim.max_grad_norm",
    "bf16": _MODEL_DTYPE,
    "bfloat16": _MODEL_DTYPE,
    "fp16": _MODEL_DTYPE,
    "torch_autocast": _MODEL_DTYPE,
    "amp": _MODEL_DTYPE,
    "data_types.param_dtype": _MODEL_DTYPE,
    "data_types.buffer_dtype": _MODEL_DTYPE,
    "data_types.keep_in_fp32_modules": _MODEL_DTYPE,
    "optimizer": "the YAML's optim section",
    "scheduler": "the YAML's optim.schedule and optim.warmup_ratio",
    "activation_checkpointing": "the YAML's model.checkpointing",
    "steps_per_print": "the YAML's tracking.log_every_steps",
    "wandb": _WANDB,
    "tensorboard": _WANDB,
    "csv_monitor": _WANDB,
    "comet": _WANDB,
    "checkpoint": "the YAML's checkpoint section",
    "datastates_ckpt": "the YAML's checkpoint section",
    "dataloader_drop_last": "the planning of batches (every pair is used)",
    "data_efficiency": "the YAML's data section",
}
"""Keys whose values come from the YAML, and from where in it."""

_UNUSED = {
    "autotuning",
    "compile",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "hybrid_engine",
    "pipeline",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "tensor_parallel",
    "timers",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "weight_quantization",
}
"""Keys that DeepSpeed reads, for features that this package does not support or that would change its numbers."""

_DTYPES = ("fp32", "bf16")


def load_deepspeed_json(path: str | Path, key: str) -> dict[str, Any]:
    """Return the mapping in a DeepSpeed JSON file, checked.

    Args:
        path: the file.
        key: the dotted key that names it, such as deepspeed.policy, for messages.

    Raises:
        UserError: the file cannot be read, or a key or value is not accepted.
    """
    path = Path(path)
    place = f"{path} ({key})"
    settings = _parse(read_text(path, f"the DeepSpeed file of {key}"), path, key)
    for name in settings:
        if name in _OWNED:
            raise UserError(
                f"{place}: {name}: got {_shown(settings[name])}, but it comes from {_OWNED[name]} alone; "
                "set it there and remove it here"
            )
        if name in _UNUSED:
            raise UserError(
                f"{place}: {name} is not supported here; remove it. Allowed keys: {', '.join(sorted(_ALLOWED))}"
            )
        if name not in _ALLOWED:
            raise UserError(
                f"{place}: {shorten(name)} is not a key that DeepSpeed knows; rename or remove it: "
                f"{suggest_names(name, _ALLOWED)}"
            )
    _refuse_auto(settings, "", place)
    _check_dtypes(settings, place)
    _check_by_deepspeed(settings, place)
    return settings


def _parse(text: str, path: Path, key: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        for name in mapping:
            if sum(other == name for other, _ in pairs) > 1:
                raise UserError(f"{path}: the key '{name}' stands twice in one object; remove one of the two")
        return mapping

    def refuse_constant(constant: str) -> NoReturn:
        raise UserError(f"{path}: {constant} is not a JSON number; write a finite one")

    try:
        settings = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} ({key}): not JSON: {error.msg}; correct it") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{path} ({key}): not JSON that can be read: {error}; correct it") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}:1 ({key}): the top level must be an object, got {_shown(settings)}; write {{…}}")
    return settings


def _shown(value: Any) -> str:
    return shorten(json.dumps(value))


def _refuse_auto(value: Any, dotted: str, place: str) -> None:
    """Refuse the value "auto", which other trainers' templates use and DeepSpeed silently replaces by its default."""
    if value == "auto":
        raise UserError(f'{place}: {dotted} is "auto", which this package does not fill in; write a value')
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_auto(item, f"{dotted}.{name}" if dotted else name, place)


def _check_dtypes(settings: dict[str, Any], place: str) -> None:
    data_types = _section(settings, "data_types", place)
    for name in data_types:
        dotted = f"data_types.{name}"
        if dotted in _OWNED:
            raise UserError(f"{place}: {dotted} comes from {_OWNED[dotted]} alone; set it there and remove it here")
        if name != "grad_accum_dtype":
            raise UserError(f"{place}: {dotted} is not a key that may be set here; only grad_accum_dtype is: remove it")
    for dotted, mapping, name in (
        ("communication_data_type", settings, "communication_data_type"),
        ("data_types.grad_accum_dtype", data_types, "grad_accum_dtype"),
    ):
        if name in mapping and mapping[name] not in _DTYPES:
            raise UserError(f"{place}: {dotted}: got {mapping[name]!r}, must be one of {', '.join(_DTYPES)}; change it")


def _section(settings: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    section = settings.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{place}: {name}: got {_shown(section)}, must be an object; write {{…}}")
    return section


def _check_by_deepspeed(settings: dict[str, Any], place: str) -> None:
    # Imported here: DeepSpeed takes seconds to import, and several stages do not need it.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for name in _section(settings, "aio", place):
        if name not in AIO_DEFAULT_DICT:
            raise UserError(
                f"{place}: aio.{name} is not a key that DeepSpeed knows; {suggest_names(name, AIO_DEFAULT_DICT)}"
            )
    for section, model in (("zero_optimization", DeepSpeedZeroConfig), ("comms_logger", CommsLoggerConfig)):
        fields = model.model_fields
        known = {*fields, *(field.alias for field in fields.values() if field.alias)}
        try:
            model(**_section(settings, section, place))
        except ValidationError as error:
            raise UserError(_first_fault(error.errors()[0], section, known, place)) from None


def _first_fault(fault: Any, section: str, known: set[str], place: str) -> str:
    """Return the message for DeepSpeed's own complaint, one of pydantic's error mappings."""
    dotted = ".".join([section, *map(str, fault["loc"])])
    if fault["type"] == "extra_forbidden":
        top = len(fault["loc"]) == 1
        hint = suggest_names(str(fault["loc"][0]), known) if top else "see DeepSpeed's documentation"
        return f"{place}: {dotted} is not a key that DeepSpeed knows; rename or remove it: {hint}"
    return f"{place}: {dotted}: got {fault['input']!r}; DeepSpeed says: {fault['msg']}; change it"
