"""docs/configuration.md is the page that the schema gives, and has every key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import REPOSITORY

from prefopt_dist.config import load_config, to_dict
from prefopt_dist.config.load import identity, identity_keys
from prefopt_dist.config.losses import LOSSES
from prefopt_dist.config.reference_page import _field_texts, main, render

PAGE = REPOSITORY / "docs" / "configuration.md"
FILE = """\
run: {dir: runs/a}
model: {name_or_path: m}
data: {train: rows.jsonl, pairs_from: {responses: a, scores: b}}
lora: {}
train: {early_stop: {}}
generate: {rewards: [{function: "m:f"}]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def flat(value: Any, key: str) -> list[str]:
    """Return the dotted keys below a mapping."""
    if isinstance(value, dict) and value:
        return [dotted for name, item in value.items() for dotted in flat(item, f"{key}.{name}" if key else name)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return flat(value[0], f"{key}[]")
    return [key]


def test_the_page_is_the_one_that_the_schema_gives() -> None:
    assert PAGE.read_text() == render(), "stale: run python -m prefopt_dist.config.reference_page --write"


def test_the_page_has_every_key(file: Path) -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|", text, re.MULTILINE)
    for name in LOSSES:
        keys = flat(to_dict(load_config(file, [f"loss.name={name}"])), "")
        keys = [key for key in keys if key != "loss.name" and not key.startswith("data.train[]")]
        assert set(keys) <= set(rows)
        part = text.split(f"\n### {name}\n")[1].split("\n#")[0]
        assert set(re.findall(r"^\| `(loss[\w.]+)` \|", part, re.MULTILINE)) == {k for k in keys if k[:5] == "loss."}
    section = text.split("### Sources of rows")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == ["path", "split", "weight", "name", "share"]


def test_the_page_links_to_pages_that_exist() -> None:
    text = PAGE.read_text()
    for page in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (PAGE.parent / page).is_file()
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert re.search(rf"^##+ {anchor.replace('-', ' ')}$", text, re.MULTILINE | re.IGNORECASE), anchor


def test_the_page_names_the_keys_of_a_runs_identity(file: Path) -> None:
    found = identity(load_config(file, ["data.columns={prompt: p}", "data.learn=last"]))
    known = identity_keys()
    assert all(any(key == k or key.startswith((f"{k}.", f"{k}[")) for k in known) for key in found)
    assert all(f"`{key}`" in PAGE.read_text() for key in known)


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == render()


def test_a_key_without_a_docstring_is_refused() -> None:
    @dataclass(frozen=True)
    class Section:
        """A section."""

        first: int
        """The first."""
        second: int

    with pytest.raises(ValueError, match=r"Section\.second has no docstring"):
        _field_texts(Section)
