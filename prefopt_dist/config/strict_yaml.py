"""YAML without surprises: what looks like a number is one, only true and false are booleans.

PyYAML speaks YAML 1.1, where `5e-7` is a string, `no` is false, `010` is 8 and the last of two equal
keys wins. Loader and dumper here share one table of scalars, so what is dumped loads back equal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist.errors import UserError, shortened

_SCALARS = [  # tag, pattern, the characters that it can begin with
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
        """No anchors: a value that stands twice is written twice."""
        return True


for _tag, _pattern, _first in _SCALARS:  # the order decides: an int matches the float's pattern too
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"the key {shortened(repr(key))} is not a string; quote it", problem_mark=key_node.start_mark
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                problem=f"the key '{shortened(key)}' stands twice in one mapping; remove one of them",
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
    """The file's text; `what` names it in the message ('the configuration')."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: {what} does not exist; check the path (now in {Path.cwd()})") from None
    except IsADirectoryError:
        raise UserError(f"{path}: {what} must be a file, this is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: {what} must be UTF-8 text, byte {error.object[error.start]:#04x} is not; save it as UTF-8"
        ) from None
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise UserError(f"{str(path)!r}: {what} cannot have this path ({error}); correct it") from None
    except OSError as error:
        raise UserError(f"{str(path)[:200]!r}: {what} cannot be read: {error.strerror}; check it") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    value = _parse(read_text(path, "the configuration"), str(path))
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path}:1: the top level must be a mapping, got {found}; write sections")
    return value


def parse_value(text: str, place: str) -> Any:
    """One value by the same rules, for overrides; `place` names it in messages."""
    return _parse(text, place)


def dump_yaml(mapping: dict[str, Any]) -> str:
    """Text that `load_yaml` reads back equal, keys in the mapping's order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _parse(text: str, place: str) -> Any:
    try:
        # A subclass of SafeLoader: it constructs plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        problem = (error.problem or error.context or "it cannot be read")[:300]
        raise UserError(f"{place}{line}: {problem}; mend it, as this is no YAML that can be read") from None
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"{place}{line}: a character that YAML forbids ({error.reason}); remove it") from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        # PyYAML's constructors trust what a tag such as !!timestamp says of its value.
        raise UserError(
            f"{place}: a value is not what its tag or its nesting says ({type(error).__name__}: "
            f"{str(error)[:100]}); write plain values without !!tags, at most some levels deep"
        ) from None
