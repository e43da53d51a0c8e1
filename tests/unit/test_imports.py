"""Which folder of the package may import which: docs/architecture.md shows the same lines."""

from __future__ import annotations

import ast

import pytest
from places import REPOSITORY

PACKAGE = REPOSITORY / "prefopt_dist"
LAYERS = """
errors
files  packages  shipped
config
objectives
data
monitoring
distributed
batching
model
reference
checkpoint  planning  rollouts
training
setup  report  preflight
commands
cli  demo
""".strip()


def imports_of(text: str, place: str) -> set[str]:
    """Return the folders and top-level modules of the package that a file imports anywhere.

    Args:
        text: the file's content.
        place: its path below the package, such as `data/rows.py`.
    """
    inside = ["prefopt_dist", *place.split("/")[:-1]]
    imported: list[list[str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            imported += [[*base, alias.name] for alias in node.names]
    return {names[1] for names in imported if names[0] == "prefopt_dist" and len(names) > 1}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from prefopt_dist.model.head import loss", {"model"}),
        ("from prefopt_dist import files, errors", {"files", "errors"}),
        ("import torch, prefopt_dist.model.head as head", {"model"}),
        ("def f():\n    import prefopt_dist.training", {"training"}),
        ("from . import rows", {"data"}),
        ("from .rows import Row", {"data"}),
        ("from .. import files", {"files"}),
        ("from ..model.head import loss", {"model"}),
        ("import prefopt_dist, prefopt_other.model\nfrom torch import files", set()),
    ],
)
def test_every_form_of_import_is_seen(text: str, found: set[str]) -> None:
    assert imports_of(text, "data/forms.py") == found


def test_imports_go_one_way() -> None:
    level = {name: i for i, line in enumerate(LAYERS.splitlines()) for name in line.split()}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder in ("__init__", "__main__"):
            continue
        assert folder in level, f"{folder} has no line in LAYERS"
        place = path.relative_to(PACKAGE).as_posix()
        for other in imports_of(path.read_text(), place) - {folder, "__version__"}:
            if level[other] >= level[folder]:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {other}")
    assert not wrong


def test_the_page_shows_the_same_lines() -> None:
    assert f"```\n{LAYERS}\n```" in (REPOSITORY / "docs" / "architecture.md").read_text()


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(REPOSITORY)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
