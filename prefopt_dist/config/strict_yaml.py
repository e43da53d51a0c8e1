"""Strict YAML: every number is read as a number, and only true and false are booleans.

PyYAML implements YAML 1.1, where `5e-7` is a string, `no` is false, `010` is 8 and the last of two equal keys wins.
The loader and the dumper here share one table of scalars, so a dumped value loads back equal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist.errors import UserError, shorten

_SCALARS = [  # tag, pattern, the characters that a match can begin with
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?$"
            r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so that a value that occurs twice is written twice, without an anchor."""
        return True


for _tag, _pattern, _first in _SCALARS:  # in this order, because an int matches the pattern of float too
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"the key {shorten(repr(key))} is not a string; quote it", problem_mark=key_node.start_mark
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                problem=f"the key '{shorten(key)}' stands twice in one mapping; remove one of the two",
                problem_mark=key_node.start_mark,
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", node.value.lower()))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_text(path: Path, what: str) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: the file.
        what: its description in messages, such as 'the configuration'.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: {what} does not exist; check the path (the working folder is {Path.cwd()})") from None
    except IsADirectoryError:
        raise UserError(f"{path}: {what} must be a file, but this is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: {what} must be UTF-8 text; byte {error.object[error.start]:#04x} is not: save it as UTF-8"
        ) from None
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise UserError(f"{str(path)!r}: {what} cannot have this path ({error}); correct it") from None
    except OSError as error:
        raise UserError(
            f"{str(path)[:200]!r}: {what} cannot be read ({error.strerror}); check its path and permissions"
        ) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, or its top level is not a mapping.
    """
    value = _parse(read_text(path, "the configuration"), str(path))
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(
            f"{path}:1: the top level must be a mapping of sections, got {found}; write it as in run: {{dir: runs/a}}"
        )
    return value


def parse_value(text: str, place: str) -> Any:
    """Return the value that `text` holds by the same rules (for overrides); `place` names it in messages."""
    return _parse(text, place)


def dump_yaml(mapping: dict[str, Any]) -> str:
    """Return YAML text that `load_yaml` reads back equal, with the keys in the mapping's order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _parse(text: str, place: str) -> Any:
    try:
        # Safe: _Loader is a SafeLoader, which constructs plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        problem = (error.problem or error.context or "it cannot be read")[:300]
        raise UserError(f"{place}{line}: not valid YAML: {problem}; correct it") from None
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise UserError(
            f"{place}{line}: not valid YAML: it holds a character that YAML forbids ({error.reason}); remove it"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        # PyYAML's constructors do not check the value under a tag such as !!timestamp.
        raise UserError(
            f"{place}: a value does not fit its !!tag, or is nested too deep ({type(error).__name__}: "
            f"{str(error)[:100]}); write plain values without !!tags, at most some levels deep"
        ) from None
