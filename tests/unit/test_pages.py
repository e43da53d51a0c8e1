"""The pages: links lead somewhere, and named files, functions and classes exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import REPOSITORY

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "tests" / "README.md"],
)
LONGEST_README = 170


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as they are made by the usual hosts of repositories."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file) if file else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page: Path) -> None:
    """A path of the package, with or without its first folder, and what is named in it after a colon."""
    missing = []
    for path, names in re.findall(r"`((?:[\w-]+/)*\w+\.py)(?::([\w.]+))?`", page.read_text()):
        files = [root / path for root in (REPOSITORY / "prefopt_dist", REPOSITORY, REPOSITORY / "tests")]
        file = next((f for f in files if f.is_file()), None)
        if file is None or (names and not has(file, names.split("."))):
            missing.append(f"{path}:{names}")
    assert not missing


def has(file: Path, names: list[str]) -> bool:
    """Return whether a file defines a name, or a class with that member."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for name in names:
        found = None
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if getattr(node, "name", None) == name or any(getattr(t, "id", None) == name for t in targets):
                found = node
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def test_the_readme_is_a_front_door() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST_README
