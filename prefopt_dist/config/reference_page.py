"""The page docs/configuration.md, generated from the schema.

python -m prefopt_dist.config.reference_page prints the page; with --write it replaces the file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from prefopt_dist.config.bounds import Text
from prefopt_dist.config.build import key_of
from prefopt_dist.config.data import DataSource
from prefopt_dist.config.load import identity_keys
from prefopt_dist.config.losses import LOSSES, MIX, Loss, MixedLoss, MixLoss
from prefopt_dist.config.schema import Config
from prefopt_dist.config.strict_yaml import dump_yaml
from prefopt_dist.files import write_atomic

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_INTRODUCTION = """\
# Look up a key of the configuration

<!-- Generated from the schema by: python -m prefopt_dist.config.reference_page --write -->

You want to know a key of RUN.yaml, its values or its default: look in the table of its section. To see all values of a
run, with the defaults: `python -m prefopt_dist train RUN.yaml --print-config`.

```yaml
# run.yaml: three keys are required, and every other key has a default
run:   {dir: runs/mine}
model: {name_or_path: /models/my-sft-model}
data:  {train: pairs.jsonl}
loss:  {name: dpo, beta: 0.3}
```

```
launch/run.sh train run.yaml loss.beta=0.5 tracking.wandb.mode=offline run.dir=runs/other
```

- **Overrides.** `SECTION.KEY=VALUE` on the command line replaces the value of the file. VALUE is YAML; quote it for the
  shell where it contains spaces or brackets: `'optim.betas=[0.9, 0.95]'`.
- **Layers.** A file may begin with `base: other.yaml`, a path relative to the file. It then takes all values of that
  file except for its own. A mapping is merged key by key; sources of rows and a loss with another name replace those of
  the base.
- **Values.** `null` stands for no value. `5e-7` is a number, only `true` and `false` are booleans, and numbers are
  never rounded: 3.0 is not a whole number. An unknown key, a wrong type and a value out of bounds are refused with
  status 2, before any work.
- **Paths.** Relative paths start from the working folder. Where a Hugging Face folder or a hub name is accepted, an
  existing folder has precedence.
"""

_LOSS_INTRODUCTION = """\
`loss.name` selects the loss, by default `{default}`; an option of another loss is refused. [losses.md](losses.md) helps
to choose.
"""

_MANY_VALUES = 8
"""Values of a key that are listed in its row; of more, only the first are."""


def render() -> str:
    """Return the text of the page."""
    hints, texts = get_type_hints(Config, include_extras=True), _field_texts(Config)
    parts = [_INTRODUCTION + _identity(), "## Sections\n", _section_list(texts)]
    for name, kind in hints.items():
        parts.append(f"## {name}\n")
        if kind == Loss:
            parts += _losses()
            continue
        section = _without_null(kind)
        parts.append(_paragraphs(section))
        if section is not kind:
            parts.append("The section is optional: by default it is `null`.\n")
        parts.append(_table(_rows(section, name)))
        if name == "data":
            parts += ["### Sources of rows\n", _paragraphs(DataSource), _table(_rows(DataSource, ""))]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Print the page, or write it with --write; return the exit status."""
    parser = argparse.ArgumentParser(prog="prefopt_dist.config.reference_page", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} instead of printing")
    if parser.parse_args(arguments).write:
        write_atomic(PAGE, render())
    else:
        print(render(), end="")
    return 0


def _identity() -> str:
    keys = ", ".join(f"`{key}`" for key in identity_keys())
    text = (
        f"- **Resuming.** A run continues only if these keys and sections have the values that it began with: {keys}; "
        "and if the section `inspect` drops the same kinds of rows. Other keys may change between two starts."
    )
    return _wrapped(text) + "\n"


def _section_list(texts: dict[str, str]) -> str:
    lines = [f"| [`{name}`](#{name}) | {_cell(text)} |" for name, text in texts.items()]
    return "\n".join(["| section | content |", "| --- | --- |", *lines, ""])


def _losses() -> list[str]:
    (default,) = (field.default_factory for field in dataclasses.fields(Config) if field.name == "loss")
    assert default is not dataclasses.MISSING
    parts = [_LOSS_INTRODUCTION.format(default=default().name)]
    for name, options in LOSSES.items():
        parts += [f"### {name}\n", _paragraphs(options)]
        rows = [row for row in _rows(options, "loss") if row.key != "loss.name"]
        parts.append(_table(rows) if rows else "It has no options.\n")
    parts += [f"### {MIX}\n", _paragraphs(MixLoss)]
    rows = [row for row in _rows(MixLoss, "loss") if row.key == "loss.of"]
    weight, loss = _rows(MixedLoss, "loss.of.LOSS")
    rows += [weight, dataclasses.replace(loss, key="loss.of.LOSS.OPTION", kind="as above", default="as above")]
    return [*parts, _table(rows)]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of a table."""

    key: str
    kind: str
    default: str
    meaning: str


def _rows(cls: type[Any], prefix: str) -> list[_Row]:
    """Return a row for each field of a dataclass, followed by the rows of a nested dataclass."""
    hints, texts = get_type_hints(cls, include_extras=True), _field_texts(cls)
    rows = []
    for field in dataclasses.fields(cls):
        key = f"{prefix}.{key_of(field.name)}" if prefix else key_of(field.name)
        kind = _without_null(hints[field.name])
        row = _Row(key, _kind(hints[field.name]), _default(field), texts[field.name])
        if dataclasses.is_dataclass(kind):
            # A nested section that always exists has no row of its own.
            rows += [] if kind is hints[field.name] else [row]
            rows += _rows(kind, key)  # type: ignore[arg-type]
            continue
        rows.append(row)
        if get_origin(kind) is tuple and dataclasses.is_dataclass(item := get_args(kind)[0]) and item is not DataSource:
            rows += _rows(item, f"{key}[]")  # type: ignore[arg-type]
    return rows


def _table(rows: Sequence[_Row]) -> str:
    lines = [f"| `{row.key}` | {row.kind} | {row.default} | {_cell(row.meaning)} |" for row in rows]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *lines, ""])


def _without_null(kind: Any) -> Any:
    """Return the type without None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    others = [argument for argument in get_args(kind) if argument is not types.NoneType]
    return others[0] if len(others) == 1 else kind


def _kind(kind: Any) -> str:
    """Return a type of the schema in words."""
    inner = _without_null(kind)
    if inner is not kind:
        return f"{_kind(inner)}; or `null`"
    if kind == tuple[DataSource, ...]:
        return "[source](#sources-of-rows), or list of sources"
    if kind == dict[str, tuple[DataSource, ...]]:
        return f"{_kind(tuple[DataSource, ...])}; or mapping of names to these"
    if kind == Text:
        return "string"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1].text)
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        items = _kind(arguments[0])
        return f"list of {_plural(items)}" if arguments[-1] is Ellipsis else f"list of {len(arguments)}, each a {items}"
    if origin is dict:
        return f"mapping of names to {'values' if arguments[1] is Any else _plural(_kind(arguments[1]))}"
    return {bool: "`true` or `false`", int: "whole number", float: "number", str: "string"}.get(kind, "mapping")


def _bounded(kind: Any, bound: str) -> str:
    if kind is str:
        return bound.removeprefix("a ")
    return f"{_kind(kind)}{' ' if bound.startswith('in ') else ', '}{bound}"


def _choice(values: Sequence[str]) -> str:
    quoted = [f"`{value}`" for value in values]
    if len(quoted) > _MANY_VALUES:
        return f"{', '.join(quoted[:2])}, … ({len(quoted)} values)"
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _plural(kind: str) -> str:
    return f"{kind}s" if kind.isalpha() else kind


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default as YAML."""
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, list):
        return f"`{value}`"
    text = dump_yaml({"key": value}).removeprefix("key: ").strip().strip("'")
    return f"`{text.replace('e-0', 'e-') if isinstance(value, float) else text}`"


def _field_texts(cls: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a class, on one line.

    Raises:
        ValueError: a field has no docstring.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
            raise ValueError(f"{cls.__name__}.{name} has no docstring under it; write one")
        texts[name] = " ".join(str(following.value.value).split())
    return texts


def _paragraphs(cls: type[Any]) -> str:
    """Return the docstring of a class as paragraphs."""
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    return "\n\n".join(_wrapped(_linked(" ".join(paragraph.split()))) for paragraph in paragraphs) + "\n"


def _cell(text: str) -> str:
    return _linked(text).replace("|", "\\|")


def _linked(text: str) -> str:
    """Return the text with links to the pages that it names, and with null as code."""
    text = re.sub(r"docs/([\w-]+)\.md", r"[\1.md](\1.md)", text)
    return re.sub(r"(?<![`\w])null(?![`\w])", "`null`", text)


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
