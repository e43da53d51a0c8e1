"""Construction of the schema's dataclasses from plain mappings, with strict types.

The type of a field is its rule: the accepted values, their bounds (`Bound`) and the default. Only data sources (several
accepted shapes) and the loss (a union chosen by name) have functions of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from prefopt_dist.config.bounds import Bound, Positive
from prefopt_dist.config.data import DataSource
from prefopt_dist.config.losses import LOSSES, MIX, NOT_MIXED, Loss, MixedLoss, MixLoss
from prefopt_dist.config.schema import Config
from prefopt_dist.config.secrets import mask_secrets
from prefopt_dist.errors import UserError, shorten

T = TypeVar("T")

REPLACED_KEYS = {
    "tracking.samples": "the section answers replaces it: answers.number is the number of prompts that are "
    "answered before and after training (0: none)"
}
"""Keys of earlier versions, and what replaces each."""

REPLACED_VALUES = {
    ("generate.engine", "vllm"): "start vLLM as a server in an environment of its own, and set generate.engine=server "
    "and generate.servers"
}
"""Values of earlier versions, and what replaces each."""


def build_config(raw: dict[str, Any]) -> Config:
    """Return the configuration that a merged mapping of sections describes.

    Raises:
        UserError: a key is unknown or missing, or a value breaks its rule.
    """
    tracking = raw.get("tracking")
    if isinstance(tracking, dict) and tracking.get("samples") == 0:
        # 0 meant no samples, and every config.yaml from before the section answers has this key.
        raw = raw | {"tracking": {key: value for key, value in tracking.items() if key != "samples"}}
    return _build_dataclass(Config, raw, "")


def key_of(name: str) -> str:
    """Return the key of a field; a name that is a word of Python, such as `from`, has an underscore at its end."""
    return name.removesuffix("_")


def refuse_value(key: str, value: Any, rule: str, remedy: str) -> NoReturn:
    """Raise the UserError for a value at a dotted key that must be `rule`; `remedy` is an imperative."""
    raise UserError(f"{key}: got {_shown(value)}, must be {rule}; {remedy}")


def _shown(value: Any) -> str:
    as_yaml = {None: "null", True: "true", False: "false"}
    text = as_yaml[value] if value is None or isinstance(value, bool) else mask_secrets(repr(value))
    return shorten(text)


def suggest_names(key: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" with the known names similar to `key`, or the list of all where none is similar."""
    known = sorted(known)
    similar = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"known here: {', '.join(known)}"


def _is_writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _join(path: str, key: str) -> str:
    if len(key) > 80 or not re.fullmatch(r"[\w./-]+", key):
        key = repr(key[:80])  # otherwise a message could name a place such as ':' or be a page long
    return f"{path}.{key}" if path else key


def _build_dataclass(cls: type[T], raw: Any, path: str) -> T:
    if not isinstance(raw, dict):
        refuse_value(path, raw, "a mapping of options", f"write {path}: {{option: value}} or leave it out")
    # `dataclasses.fields` requires a dataclass, which a plain TypeVar cannot express.
    fields = {key_of(field.name): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            remedy = REPLACED_KEYS.get(_join(path, key)) or suggest_names(key, fields)
            raise UserError(f"{_join(path, shorten(key))}: unknown key; {remedy}")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for name, field in fields.items():
        key = _join(path, name)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        hint = hints[field.name]
        if name in raw:
            values[field.name] = _build(hint, raw[name], key)
        elif dataclasses.is_dataclass(hint) and required:
            values[field.name] = _build(hint, {}, key)  # so that the message names the missing option, not the section
        elif required:
            raise UserError(f"{key}: missing, and it has no default; set it in the file or as {key}=VALUE")
    return cls(**values)


def _build(kind: Any, value: Any, key: str) -> Any:
    """Return `value` as the annotated type `kind`, or raise the UserError that names `key`."""
    if kind == tuple[DataSource, ...]:
        return _build_sources(value, key)
    if kind == dict[str, tuple[DataSource, ...]]:
        return _build_named_sources(value, key)
    if kind == Loss:
        return _build_loss(value, key)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)  # type: ignore[arg-type]

    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _build(inner, value, key)
    if origin is Annotated:
        rule = arguments[1]
        assert isinstance(rule, Bound)
        built = _build(arguments[0], value, key)
        if not rule.holds(built):
            refuse_value(key, value, rule.text, "change it")
        return built
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            remedy = REPLACED_VALUES.get((key, value), "choose one of them") if isinstance(value, str) else None
            refuse_value(key, value, f"one of {', '.join(arguments)}", remedy or "choose one of them")
        return value
    if origin is tuple:
        return _build_tuple(arguments, value, key)
    if origin is dict:
        return _build_map(arguments[1], value, key)
    return _build_scalar(kind, value, key)


def _build_scalar(kind: type, value: Any, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        if not isinstance(value, bool):
            refuse_value(key, value, "true or false", "write true or false without quotes")
        return value
    if kind is str:
        if not isinstance(value, str):
            refuse_value(key, value, "a string", "quote it" if is_number else "write a string")
        if not _is_writable(value):
            refuse_value(
                key, value, "text without NUL and lone surrogates", "remove them: a file or path cannot contain them"
            )
        return value
    if kind is int:
        if isinstance(value, float):
            refuse_value(key, value, "a whole number", "numbers are not rounded: write digits only")
        if not is_number:
            refuse_value(key, value, "a whole number", "write digits without quotes")
        return value
    assert kind is float, kind
    if not is_number:
        refuse_value(key, value, "a number", "write it without quotes, such as 0.1 or 5e-7")
    if isinstance(value, int) and abs(value) > 2**53:
        refuse_value(key, value, "a number that a double represents exactly", "numbers are not rounded: shorten it")
    if not math.isfinite(value):
        refuse_value(key, value, "a finite number", "if you mean 'no limit', write null where the option accepts it")
    return float(value)


def _build_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        refuse_value(key, value, "a list", "write [a, b]")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        refuse_value(key, value, f"a list of {len(arguments)} values", "write exactly as many")
    return tuple(
        _build(kind, item, f"{key}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _build_map(kind: Any, value: Any, key: str) -> dict[str, Any]:
    """Return a mapping of names to values of the type `kind`; Any stands for every scalar type."""
    if not isinstance(value, dict):
        refuse_value(key, value, "a mapping of names", "write {name: value}")
    built = {}
    for name, item in value.items():
        if not isinstance(name, str) or not name or not _is_writable(name):
            refuse_value(key, name, "a mapping with names as keys", "write {name: value}")
        scalar = kind if kind is not Any else type(item)
        if scalar not in (str, bool, int, float):
            refuse_value(_join(key, name), item, "a string, a number, true or false", "write one of them")
        built[name] = _build_scalar(scalar, item, _join(key, name))
    return built


def _build_sources(value: Any, key: str) -> tuple[DataSource, ...]:
    if isinstance(value, list):
        if not value:
            refuse_value(key, value, "at least one source", "name a path")
        return _check_shares(tuple(_build_source(item, f"{key}[{index}]") for index, item in enumerate(value)), key)
    return _check_shares((_build_source(value, key),), key)


def _check_shares(sources: tuple[DataSource, ...], key: str) -> tuple[DataSource, ...]:
    """Return the sources; raise UserError where some have a share and others not, or one has a weight too."""
    if any(source.share is not None for source in sources):
        for index, source in enumerate(sources):
            if source.share is None:
                raise UserError(
                    f"{key}[{index}].share: missing, while another source of {key} has one; give each source a share, "
                    "or none"
                )
            if source.weight != 1:
                raise UserError(
                    f"{key}[{index}].weight: got {source.weight:g} beside share {source.share:g}, which decides the "
                    "passes; remove one of them"
                )
    return sources


def _build_source(value: Any, key: str) -> DataSource:
    if isinstance(value, str):
        return _build_dataclass(DataSource, {"path": value}, key)
    if not isinstance(value, dict):
        refuse_value(key, value, "a path, {path, split, weight}, or a list of these", "name a path")
    return _build_dataclass(DataSource, value, key)


def _build_named_sources(value: Any, key: str) -> dict[str, tuple[DataSource, ...]]:
    if not isinstance(value, dict) or "path" in value:
        return {"": _build_sources(value, key)}
    if not value:
        refuse_value(key, value, "a path or a mapping of named sets", "name a set, or write null for no evaluation")
    options = {field.name for field in dataclasses.fields(DataSource)}
    for name in value:
        if name in options:
            refuse_value(key, value, "a source with its path, or a mapping of named sets", f"add path beside {name}")
        # The name becomes part of the names of metrics, eval/<name>/…
        if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
            refuse_value(_join(key, name), name, "made of letters, digits, '_', '-' and '.'", "rename the set")
    return {name: _build_sources(item, _join(key, name)) for name, item in value.items()}


def _build_loss(raw: Any, key: str) -> Loss:
    if not isinstance(raw, dict):
        refuse_value(key, raw, "a mapping of options", "write loss: {name: dpo}")
    name = raw.get("name", "dpo")
    if name == MIX:
        return _build_mix(raw, key)
    if not isinstance(name, str) or name not in LOSSES:
        refuse_value(f"{key}.name", name, f"one of {', '.join([*LOSSES, MIX])}", "choose one of them")
    if "of" in raw:
        raise UserError(f"{key}.of: got {_shown(raw['of'])}, but only the loss {MIX} has it; set {key}.name={MIX}")
    _refuse_foreign_options(name, raw, key, remedy=f"remove it or set {key}.name")
    return _build_dataclass(LOSSES[name], raw, key)


def _refuse_foreign_options(name: str, raw: dict[str, Any], key: str, remedy: str) -> None:
    for option in raw:
        others = [other for other, cls in LOSSES.items() if option in _field_names(cls)]
        if option not in _field_names(LOSSES[name]) and others:
            raise UserError(
                f"{key}.{option}: got {_shown(raw[option])}, but it is not an option of the loss {name}; "
                f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it: {remedy}"
            )


def _build_mix(raw: dict[str, Any], key: str) -> MixLoss:
    for option in raw:
        if option not in ("name", "of"):
            _refuse_option_of_a_part(option, raw, key)
    parts = raw.get("of")
    shape = "write of: {dpo: {weight: 1, beta: 0.1}, sft: {weight: 0.2}}"
    if not isinstance(parts, dict) or len(parts) < 2:
        refuse_value(f"{key}.of", parts, "a mapping of two losses or more", shape)
    mixed = [name for name in LOSSES if name not in NOT_MIXED]
    for name in parts:
        if name in NOT_MIXED:
            raise UserError(f"{key}.of.{name}: {name} cannot be mixed: {NOT_MIXED[name]}; remove it")
        if name not in mixed:
            refuse_value(_join(f"{key}.of", name), name, f"one of {', '.join(mixed)}", "choose one of them")
    return MixLoss({name: _build_part(name, parts[name], f"{key}.of.{name}") for name in mixed if name in parts})


def _refuse_option_of_a_part(option: str, raw: dict[str, Any], key: str) -> NoReturn:
    if any(option in _field_names(cls) for cls in LOSSES.values()):
        raise UserError(
            f"{key}.{option}: got {_shown(raw[option])}, but each loss of a mix has its own options; "
            f"set it as {key}.of.LOSS.{option}"
        )
    raise UserError(f"{_join(key, shorten(option))}: unknown key; {suggest_names(option, ('name', 'of'))}")


def _build_part(name: str, raw: Any, key: str) -> MixedLoss:
    if not isinstance(raw, dict):
        refuse_value(key, raw, "a mapping of its weight and options", "write {weight: 1}")
    if "weight" not in raw:
        raise UserError(f"{key}.weight: missing, and it has no default; set it in the file or as {key}.weight=VALUE")
    if "name" in raw:
        raise UserError(f"{key}.name: got {_shown(raw['name'])}, but the key names the loss; remove it")
    if "sft_weight" in raw:
        raise UserError(
            f"{key}.sft_weight: got {_shown(raw['sft_weight'])}, but in a mix SFT is a separate part; "
            f"write sft: {{weight: …}} beside {name}"
        )
    options = {option: value for option, value in raw.items() if option != "weight"}
    _refuse_foreign_options(name, options, key, remedy="remove it")
    if "sft_weight" in _field_names(LOSSES[name]):
        options["sft_weight"] = 0.0  # also where a loss has such a term by default
    # mypy cannot know that a name other than kto gives an option class of a loss on pairs.
    loss: Any = _build_dataclass(LOSSES[name], options, key)
    return MixedLoss(_build(Positive, raw["weight"], f"{key}.weight"), loss)


def _field_names(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
