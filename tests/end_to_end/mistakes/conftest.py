"""The world of tests of mistakes, which each end with status 2 and one message, before a model is loaded.

A message has its place (dotted key or file:line), the value, the rule and the remedy: each test names words of all
four. What `Door.fails` looks at besides is said there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worlds
from door import Door, one_process_group

from prefopt_dist.model import load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    worlds.write_model(folder / "model", seed=1)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    with one_process_group():
        yield folder


@pytest.fixture
def door(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Door:
    """A fresh world, in which loading a model's weights is a failure of the test."""
    for name in ("model", "pairs.jsonl"):
        source = made / name
        _copy(source, tmp_path / name)

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", loaded)
    return Door(tmp_path, capsys)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    target.mkdir()
    for file in source.iterdir():
        _copy(file, target / file.name)
