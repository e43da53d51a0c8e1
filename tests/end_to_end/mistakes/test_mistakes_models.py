"""Mistakes in model folders, tokenizers, absent packages: status 2 and one message, as conftest.py says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from door import PAIR, Door
from tokenizers_for_tests import CHATML, small_tokenizer

SHARDS = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}


def test_a_missing_model_folder(door: Door) -> None:
    where = door.path("nowhere")
    for key in ("model.name_or_path", "reference.name_or_path", "model.tokenizer"):
        door.fails([key, where, "is not a folder", "Give a Hugging Face model folder"], f"{key}={where}", early=True)


HALF: list[tuple[str, Callable[[Path], object], list[str]]] = [
    ("config", lambda f: (f / "config.json").unlink(), ["has no config.json", "Give a folder written by"]),
    ("json", lambda f: (f / "config.json").write_text('{"a":'), ["config.json cannot be read", "Copy the folder"]),
    (
        "cut",
        lambda f: os.truncate(f / "model.safetensors", 9000),
        ["model.safetensors has 9000 bytes", "its header promises", "Copy it again"],
    ),
    ("head", lambda f: os.truncate(f / "model.safetensors", 100), ["is cut short (100 bytes)", "Copy it again"]),
    (
        "shard",
        lambda f: [
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text(json.dumps(SHARDS)),
        ],
        ["lacks model-00001-of-00002.safetensors", "named in model.safetensors.index.json", "Copy the folder again"],
    ),
    ("none", lambda f: (f / "model.safetensors").unlink(), ["has no model.safetensors", "save_pretrained"]),
]


@pytest.mark.parametrize(("name", "spoil", "words"), HALF, ids=[h[0] for h in HALF])
def test_a_half_written_model_folder(door: Door, name: str, spoil: Callable[[Path], object], words: list[str]) -> None:
    spoil(door.model(name))
    for key in ("model.name_or_path", "reference.name_or_path"):
        door.fails([f"{key}: ", door.path(name), *words], f"{key}={door.path(name)}", early=True)


def test_a_tokenizer_without_an_end(door: Door) -> None:
    endless = small_tokenizer(None, eos=None)
    endless.save_pretrained(door.path("endless"))
    said = ["model.tokenizer: ", door.path("endless"), "neither an eos token nor", "set eos_token in"]
    door.fails(said, f"model.tokenizer={door.path('endless')}", early=True)
    # A template that ends a turn with ordinary text ends nothing either.
    endless.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    endless.save_pretrained(door.path("endless"))
    door.fails(said, f"model.tokenizer={door.path('endless')}", early=True)


def test_a_tokenizer_of_another_vocabulary(door: Door) -> None:
    small_tokenizer(CHATML).save_pretrained(door.path("other"))
    tokens = len(small_tokenizer(CHATML))
    words = ["model.tokenizer: ", f"it has {tokens} tokens", "vocab_size is 300", "give the model's own tokenizer"]
    door.fails(words, f"model.tokenizer={door.path('other')}", early=True)


def test_a_tokenizer_whose_added_tokens_the_model_lacks(door: Door) -> None:
    """Only tokens that the data has count: many a model has a padding token that it never sees."""
    folder = door.model("grown")
    grown = json.loads((folder / "tokenizer.json").read_text())
    grown["added_tokens"].append({**grown["added_tokens"][0], "id": 300, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(grown))
    data = door.lines("grown.jsonl", *[PAIR | {"prompt": f"say <|new|> {i}"} for i in range(20)])
    words = ["data.train: ", "makes token 300", "vocabulary has 300 entries", "must be the tokenizer of the model"]
    door.fails(words, f"model.tokenizer={folder}", f"data.train={data}")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package absent."""

    def hide(package: str) -> None:
        for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]

    return hide


def test_an_absent_package(door: Door, without: Callable[[str], None]) -> None:
    import pandas  # writes the Parquet file, as long as pyarrow is there

    pandas.DataFrame([PAIR] * 20).to_parquet(door.folder / "rows.parquet")
    (door.folder / "saved").mkdir()
    (door.folder / "saved" / "state.json").write_text("{}")
    without("pyarrow")
    words = ["data.train: ", door.path("rows.parquet"), "needs the package pyarrow", "pip install pyarrow", ".jsonl"]
    door.fails(words, f"data.train={door.path('rows.parquet')}")
    without("datasets")
    words = ["needs the package datasets", "pip install datasets", "or give the rows as .jsonl"]
    for name in (door.path("saved"), "nobody/pairs"):
        door.fails(["data.train: ", f"'{name}'", *words], f"data.train={name}")
    without("accelerate")
    words = ["model.name_or_path: ", "needs the package accelerate", "pip install accelerate"]
    door.fails(words, early=True)


def test_an_absent_wandb(door: Door, without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    without("wandb")
    words = ["'offline' needs the package wandb", "pip install wandb", "tracking.wandb.mode=disabled"]
    door.fails(["tracking.wandb.mode: ", *words], "tracking.wandb.mode=offline", early=True)
    assert door.ends(door.run(), "--check") == (0, "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert door.ends(door.run(), "tracking.wandb.mode=online", "--check") == (0, "")
