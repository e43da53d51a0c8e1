"""Mistakes in rows and files of data, policies, the launcher: status 2 and one message, as conftest.py says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import patience
import pytest
from door import PAIR, Door, tree
from places import REPOSITORY
from tokenizers_for_tests import INST

from prefopt_dist.config import load_config
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.objectives import DPO
from prefopt_dist.setup import prepare_data

CHOSEN = {"prompt": "the cat", "chosen": "sings", "rejected": "sleeps"}


STOPS = "leave such rows out with data.on_bad_row=drop"
BAD_ROWS: list[tuple[str, Any, list[str]]] = [
    ("list", [1, 2], ["not_an_object", "one JSON object", "[1, 2]"]),
    ("string", '"text"', ["not_an_object", "one JSON object", "'text'"]),
    ("field", {"prompt": "a", "chosen_response": "b"}, ["missing_field", "'rejected_response'", "['chosen_response"]),
    ("null", PAIR | {"prompt": None}, ["missing_field", "'prompt'"]),
    ("type", PAIR | {"chosen_response": 5}, ["wrong_type", "chosen_response must be a string", "got 5"]),
    ("json", '{"prompt": ', ["not_json", "one JSON object", 'got \'{"prompt": ']),
    ("utf8", b'{"prompt": "\xff"}', ["not_utf8", "must be valid UTF-8", 'got b\'{"prompt": ']),
    ("surrogate", '{"prompt": "\\ud800"}', ["not_utf8", "must be valid UTF-8"]),
    ("blank", "", ["blank_line", "one JSON object"]),
    (
        "empty",
        PAIR | {"rejected_response": " \n"},
        ["empty_response", "a character that is not white space", "got ' \\n'"],
    ),
    ("prompt", PAIR | {"prompt": ""}, ["empty_prompt", "a character that is not white space", "got ''"]),
    ("same", PAIR | {"rejected_response": "sings"}, ["identical_responses", "must differ", "got 'sings'"]),
]


@pytest.mark.parametrize(("name", "row", "words"), BAD_ROWS, ids=[b[0] for b in BAD_ROWS])
def test_a_row_that_cannot_be_used(door: Door, name: str, row: Any, words: list[str]) -> None:
    data = door.lines(f"{name}.jsonl", PAIR, row, PAIR)
    said = [f"{data}:2: ", *words, "correct the row" if "not_" not in words[0] and name != "blank" else "", STOPS]
    door.fails(said, f"data.train={data}")
    door.fails(said, f"data.eval={data}")
    assert door.ends(door.run(), f"data.train={data}", stage="inspect") == (
        2,
        door.fails(said, f"data.train={data}"),
    )


def test_a_finding_whose_policy_is_stop(door: Door) -> None:
    data = door.lines("twice.jsonl", PAIR, PAIR | {"prompt": "a dog"}, PAIR)
    said = [
        "inspect.duplicates: got stop",
        "1 duplicates",
        f"{data}:3 repeats {data}:1",
        "set inspect.duplicates to drop or keep",
    ]
    message = door.fails(said, f"data.train={data}", "inspect.duplicates=stop")
    assert door.ends(door.run(), f"data.train={data}", "inspect.duplicates=stop", stage="inspect") == (2, message)
    words = ["inspect.few_rows: got 'drop'", "one of keep, stop"]
    door.fails(words, "inspect.few_rows=drop", early=True)


def test_training_reads_what_the_policies_leave(door: Door) -> None:
    """What load_train gives every rank, and what it says."""
    data = door.lines("twice.jsonl", PAIR, PAIR | {"prompt": "a dog"}, PAIR)
    tokenizer = load_tokenizer(door.folder / "model", "model.tokenizer")
    made = SimpleNamespace(vocab_size=300, max_position_embeddings=5)
    policy = SimpleNamespace(config=made, path="m", key="model.name_or_path")
    for overrides, left in (([], [1, 2, 3]), (["inspect.duplicates=drop"], [1, 2])):
        config = load_config(str(door.run()), [f"data.train={data}", *overrides])
        models: Any = SimpleNamespace(tokenizer=tokenizer, policy=policy, reference=policy, path="shared")
        rows = prepare_data.load_train(config, models, DPO(0.1, 0.0, 0.0, False))
        assert rows.line.tolist() == left
        facts = prepare_data.data_facts(rows, {})["train"]
        assert (facts["rows"], facts["used"], sum(facts["dropped"].values())) == (3, len(left), 3 - len(left))
    assert not config.run_dir.exists()
    config.run_dir.mkdir(parents=True)
    prepare_data.load_train(config, models, DPO(0.1, 0.0, 0.0, False))
    (first, second) = json.loads((config.run_dir / "shown.json").read_text())
    assert (first["origin"], second["origin"]) == (f"{data}:1", f"{data}:2")
    said = door.capsys.readouterr().out
    assert f"dropped 1 duplicates\n    {data}:3 repeats {data}:1" in said
    assert "data.train: 3 rows are longer than the 5 positions of model.name_or_path" in said
    made.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # made for longer ones
    prepare_data.load_train(config, models, DPO(0.1, 0.0, 0.0, False))
    assert "positions" not in door.capsys.readouterr().out


@pytest.mark.parametrize(("name", "content"), [("zero.jsonl", b""), ("blank.jsonl", b"\n  \n\n"), ("z.jsonl.gz", b"")])
def test_an_empty_data_file(door: Door, name: str, content: bytes) -> None:
    (door.folder / name).write_bytes(content)
    for key in ("data.train", "data.eval"):
        words = [f"{key}: ", door.path(name), "holds no rows", "name a source with at least one row"]
        door.fails(words, f"{key}={door.path(name)}")


def test_a_missing_data_file(door: Door) -> None:
    for key in ("data.train", "data.eval"):
        door.fails([f"{key}: ", door.path("no.jsonl"), "does not exist", "correct"], f"{key}={door.path('no.jsonl')}")
        words = [f"{key}: ", door.path("no.jsonl"), "does not exist", "Give a file"]
        door.fails(words, f"{key}={door.path('no.jsonl')}", "--check")


def test_a_prompt_that_cannot_be_cut(door: Door) -> None:
    turns = [{"role": "system", "content": "the " * 60}, {"role": "user", "content": "the cat"}]
    data = door.lines("long.jsonl", CHOSEN, {"prompt": turns, "chosen": "sings", "rejected": "sleeps"})
    words = [f"{data}:2: ", "prompt_too_long", "data.max_prompt_length=20", "tokens'", "raise data.max_prompt_length"]
    door.fails([*words, STOPS], f"data.train={data}", "data.format=pair", "data.max_length=60",
                 "data.max_prompt_length=20")  # fmt: skip


def test_a_doubled_template(door: Door) -> None:
    folder = door.model("templated")
    (folder / "chat_template.jinja").write_text(INST)
    data = door.lines("doubled.jsonl", PAIR, PAIR | {"prompt": "[INST] the cat [/INST]"})
    words = [f"{data}:2: ", "doubled_template", "'[INST]'", "got '[INST] the cat", "remove the markers", STOPS]
    door.fails(words, f"data.train={data}", "data.template=chat", f"model.tokenizer={folder}")


def test_through_the_launcher(door: Door) -> None:
    """Two ranks find the mistake in the data: said once by rank 0, and once more below torchrun's block."""
    data = door.lines("bad.jsonl", PAIR, [1])
    run, before = door.run(), tree(door.folder)
    done = subprocess.run(
        ["launch/run.sh", "-n", "2", "train", str(run), f"data.train={data}"],
        env=os.environ | {"PREFOPT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=patience.QUIET_SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith(f"error: {data}:2: not_an_object")
    assert done.stderr.count("error: ") == 2
    assert {path for path in tree(door.folder) if not path.startswith("cache")} == before.keys()
