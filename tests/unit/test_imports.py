"""Which folder of the package may import which: docs/architecture.md shows the same lines."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
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


def imports_of(path: Path) -> set[str]:
    """Return the folders and top-level modules of the package that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = node.module.split(".")
            if names[0] == "prefopt_dist":
                found |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    level = {name: i for i, line in enumerate(LAYERS.splitlines()) for name in line.split()}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder in ("__init__", "__main__"):
            continue
        assert folder in level, f"{folder} has no line in LAYERS"
        for other in imports_of(path) - {folder, "__version__"}:
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
