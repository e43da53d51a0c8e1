"""The store of prompts, answers and scores: what it holds, and damaged or late shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from prompts_and_answers import prompt, tokeniser

from prefopt_dist.config import DataSource
from prefopt_dist.rollouts.prompts import read_prompts
from prefopt_dist.rollouts.store import Answer, SampleStore


def test_a_row_may_hold_what_json_has_no_word_for(tmp_path: Path) -> None:
    """A missing number of a table is NaN there; rewards that look for it get it."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "what is blue?", "score": NaN, "date": Infinity}\n')
    sources = [DataSource(str(tmp_path / "p.jsonl"))]
    found = read_prompts(sources, tokeniser=tokeniser(), longest=99, on_bad_row="stop", key="k")
    store = SampleStore(tmp_path / "s")
    store.make_plan(found.all, {})
    row = store.prompts(0)[0].row
    assert np.isnan(row["score"])
    assert row["date"] == float("inf")


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s")
    many = [prompt(i, [1, 2, 3 + i], "a\u2028b") for i in range(70)]
    store.make_plan(many, {"model": "m"})
    store.make_plan([], {})  # there is one
    assert store.missing("samples") == ([0, 1], [])
    answers = [Answer([4, 5], "é\u2028\n", None, True)]
    store.write_answers(1, [answers] * 6)
    assert store.missing("samples") == ([0], [])
    assert store.answers(1) == [answers] * 6
    assert store.prompts(0) + store.prompts(1) == many
    store.write_scores("scores-r", 0, [[[0.5]]] * 64)
    store.write_scores("scores-r", 1, [[[0.5]]] * 6)
    assert store.missing("scores-r") == ([], [])
    file = tmp_path / "s" / "samples-00001.jsonl"
    file.write_bytes(file.read_bytes().replace(b"[4, 5]", b"[4, 6]", 1))
    numbers, (message,) = store.missing("samples")
    assert numbers == [0, 1]
    assert "does not match its checksum" in message
    assert not file.exists()
    store.write_answers(1, [[Answer([6], "another", None, True)]] * 6)
    assert store.missing("scores-r") == ([1], [])  # what was said of the lost answers is not of these


def test_a_shard_of_another_node_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may remember that a name was not there until the folder is read."""
    store = SampleStore(tmp_path / "s")
    store.make_plan([prompt(0, [1])], {})
    store.write_answers(0, [[]])
    exists, listdir, stale = Path.exists, os.listdir, True

    def look(path: Path) -> bool:
        return exists(path) and not (stale and path.name.startswith("samples"))

    def read(folder: Path) -> list[str]:
        nonlocal stale
        stale = False
        return listdir(folder)

    monkeypatch.setattr(Path, "exists", look)
    monkeypatch.setattr(os, "listdir", read)
    assert store.answers(0) == [[]]
    stale = True
    assert store.missing("samples") == ([], [])
