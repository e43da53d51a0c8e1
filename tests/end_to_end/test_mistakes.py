"""Every mistake of the user ends with status 2 and one message, before a model is loaded, and leaves nothing.

A message has its place (dotted key or file:line), the value, the rule and the remedy: each test names words of all
four. What `Door.refused` looks at besides is said there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import patience
import pytest
import worlds
from door import Door, one_process_group, tree
from places import REPOSITORY
from tokenizers_for_tests import CHATML, INST, small_tokenizer

from prefopt_dist import model as model_package
from prefopt_dist.config import load_config
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.files import FileLock
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.objectives import DPO, SFT
from prefopt_dist.setup import checks, prepare_data

PAIR = {"prompt": "the cat", "chosen_response": "sings", "rejected_response": "sleeps"}
CHOSEN = {"prompt": "the cat", "chosen": "sings", "rejected": "sleeps"}
SHARDS = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}


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

    monkeypatch.setattr(model_package.load.AutoModelForCausalLM, "from_pretrained", loaded)  # type: ignore[attr-defined]
    return Door(tmp_path, capsys)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    target.mkdir()
    for file in source.iterdir():
        _copy(file, target / file.name)


# Model folders and tokenizers


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


# Data

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


# The loss, sizes and budgets


def test_the_loss(door: Door) -> None:
    door.fails(
        ["loss.name: ", "got 'dpq'", "must be one of dpo, robust, ipo", "choose one"], "loss.name=dpq", early=True
    )
    door.fails(["loss.beta: ", "got 0,", "must be greater than 0", "change it"], "loss.beta=0", early=True)
    words = [
        "loss.beta: ",
        "got 0.1",
        "not an option of the loss sft",
        "dpo, robust, ipo, hinge",
        "kto have it",
        "remove it or set loss.name",
    ]
    door.fails(words, "loss.name=sft", "loss.beta=0.1", early=True)


def test_a_mix_that_is_none(door: Door) -> None:
    words = ["loss.of.kto", "cannot be mixed"]
    door.fails(words, "loss.name=mix", "loss.of.dpo.weight=1", "loss.of.kto.weight=1", early=True)
    rated = door.lines("rated.jsonl", *({"prompt": c, "completion": c + c, "label": True} for c in "abc"))
    mix = ("loss.name=mix", "loss.of.dpo.weight=1", "loss.of.sft.weight=1")
    door.fails(["data.train: the rows are of the form 'rated'", "compares two"], *mix, f"data.train={rated}")


def test_rows_that_kto_cannot_use(door: Door) -> None:
    words = ["data.train: ", "of the form 'pair'", "prompt, completion and label", "loss.split_pairs=true"]
    door.fails(words, "loss.name=kto")
    rated = [{"prompt": f"{c} cat", "completion": f"{c} sings", "label": True} for c in ("a", "the")]
    one, two = door.lines("one.jsonl", rated[0]), door.lines("two.jsonl", *rated)
    same = door.lines("same.jsonl", rated[0], rated[0] | {"label": False}, rated[1])
    door.fails(
        ["data.train: 2 of 3 rows answer the same prompt", "more prompts"], "loss.name=kto", f"data.train={same}"
    )
    door.fails(["data.train: got 1 row, ", "needs at least two"], "loss.name=kto", f"data.train={one}")
    door.fails(["data.train: ", "'rated'", "compares two"], f"data.train={two}")
    # What is enough: the next mistake is another one. G counts responses, two of each pair.
    words = ["train.global_batch_pairs: ", "99 is more than the "]
    door.fails([*words, "2 rows"], "loss.name=kto", f"data.train={two}", "train.global_batch_pairs=99")
    door.fails([*words, "80 rows"], "loss.name=kto", "loss.split_pairs=true", "train.global_batch_pairs=99")


def test_more_rows_a_step_than_there_are(door: Door) -> None:
    words = ["train.global_batch_pairs: ", "41 is more than the 40 rows", "Lower it, or give more data"]
    door.fails(words, "train.global_batch_pairs=41")


LONG = PAIR | {"prompt": "the cat sings", "chosen_response": "the red house " * 12, "rejected_response": "a bird " * 9}


def budget_message(door: Door, *overrides: str) -> str:
    """The part that names the smallest budget that would do."""
    return door.fails(["raise it to at least "], *overrides).partition("raise it to at least ")[2].partition(",")[0]


def test_a_budget_below_the_longest_pair(door: Door) -> None:
    data = door.lines("long.jsonl", *[PAIR] * 12, LONG, *[PAIR] * 12)
    words = [
        "train.micro_batch_tokens: ",
        "got 40",
        f"{data}:13 ",
        "one micro-batch",
        "or lower data.max_length (now 256)",
    ]
    door.fails([*words, "(data.train)"], f"data.train={data}", "train.micro_batch_tokens=40")
    short = door.lines("short.jsonl", *[PAIR] * 12)
    door.fails([*words, "(data.eval)"], f"data.train={short}", f"data.eval={data}", "train.micro_batch_tokens=40")
    # What the message says is enough, and one token less is not.
    least = int(budget_message(door, f"data.train={data}", "train.micro_batch_tokens=40"))
    assert budget_message(door, f"data.train={data}", f"train.micro_batch_tokens={least - 1}") == str(least)
    enough = (f"data.train={data}", f"train.micro_batch_tokens={least}", "train.global_batch_pairs=99")
    door.fails(["train.global_batch_pairs: "], *enough)
    # Without a reference only the chosen response counts.
    sft = (f"data.train={data}", "loss.name=sft")
    assert int(budget_message(door, *sft, "train.micro_batch_tokens=40")) < least


def test_a_first_pass_budget_below_the_longest_sequence(door: Door) -> None:
    data = door.lines("long.jsonl", *[PAIR] * 12, LONG)
    small = (f"data.train={data}", "reference.micro_batch_tokens=30")
    words = [
        "reference.micro_batch_tokens: ",
        "got 30",
        f"{data}:13 (data.train)",
        "or lower data.max_length (now 256)",
    ]
    for stage in ("train", "reference"):
        door.fails(words, *small, stage=stage)
    least = int(budget_message(door, *small))
    assert least < int(budget_message(door, f"data.train={data}", "train.micro_batch_tokens=40"))
    enough = f"reference.micro_batch_tokens={least}"
    door.fails(["train.global_batch_pairs: "], f"data.train={data}", enough, "train.global_batch_pairs=99")
    # Evaluation packs pairs under this budget; and a loss without a reference has no first pass to fit in.
    short = door.lines("short.jsonl", *[PAIR] * 12)
    words = ["reference.micro_batch_tokens: ", f"got {least}", f"{data}:13 (data.eval)"]
    door.fails(words, f"data.train={short}", f"data.eval={data}", enough)
    door.fails(["train.global_batch_pairs: "], *small, "loss.name=sft", "train.global_batch_pairs=99")


def test_a_million_lengths_take_no_time(door: Door) -> None:
    n = 1_000_000
    lengths = np.random.default_rng(0).integers(1, 200, size=3 * n)
    of_row = lengths.reshape(n, 3)
    rows: Any = SimpleNamespace(
        n=n,
        responses=2,
        lengths=lambda: of_row,
        origin=str,
        unit=lambda i, responses: Unit(
            i,
            np.zeros(of_row[i, 0], dtype=np.int32),
            tuple(np.full(of_row[i, 1 + k], k, dtype=np.int32) for k in responses),
        ),
    )
    config = load_config(door.run(), ["train.micro_batch_tokens=600"])
    before = time.perf_counter()
    checks.check_lengths(config, rows, DPO(0.1, 0.0, 1e-6), "data.train", trained=True)
    checks.check_lengths(config, rows, SFT(), "data.train", trained=True)
    assert time.perf_counter() - before < 1
    longest = int((lengths.reshape(n, 3).sum(axis=1) - 2).argmax())
    config = load_config(door.run(), ["train.micro_batch_tokens=500"])
    with pytest.raises(UserError, match=rf"got 500, but {longest} \(data.train\)"):
        checks.check_lengths(config, rows, DPO(0.1, 0.0, 1e-6), "data.train", trained=True)


# DeepSpeed's files

DEEPSPEED: list[tuple[str, list[str]]] = [
    ('{"train_batch_size": 8}', ["train_batch_size: got 8", "train.global_batch_pairs alone", "remove it here"]),
    (
        '{"train_micro_batch_size_per_gpu": 2}',
        ["train_micro_batch_size_per_gpu: got 2", "train.micro_batch_tokens alone", "remove it here"],
    ),
    ('{"zero_optimisation": {}}', ["zero_optimisation is not a key", "rename or remove it", "zero_optimization?"]),
    (
        '{"zero_optimization": {"stage": 3, "stag": 1}}',
        ["zero_optimization.stag is not a key", "rename or remove it", "did you mean stage?"],
    ),
    ('{"zero_optimization": {"stage": 2}}', ["stage is 2", "must be 3", "set it to 3"]),
    (
        '{"zero_optimization": {"stage": 3, "offload_param": 5}}',
        ["offload_param: got 5", "DeepSpeed says", "change it"],
    ),
    ('{"zero_', [":1 ", "not JSON", "correct it"]),
    ("[]", ["must be an object", "got []", "write {"]),
    ("[" * 100_000, ["not JSON that can be read", "correct it"]),
    ('{"a": ' + "9" * 5000 + "}", ["not JSON that can be read", "correct it"]),
]


@pytest.mark.parametrize(("text", "words"), DEEPSPEED, ids=[d[0][:40] for d in DEEPSPEED])
def test_a_deepspeed_file(door: Door, text: str, words: list[str]) -> None:
    (door.folder / "ds.json").write_text(text)
    for key in ("deepspeed.policy", "deepspeed.reference"):
        door.fails([door.path("ds.json"), f"({key})", *words], f"{key}={door.path('ds.json')}", early=True)


def test_a_missing_deepspeed_file(door: Door) -> None:
    words = [door.path("none.json"), "the DeepSpeed file of deepspeed.policy does not exist", "check the path"]
    door.fails(words, f"deepspeed.policy={door.path('none.json')}", early=True)


def test_offloading_may_be_null(door: Door) -> None:
    (door.folder / "ds.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": null}}')
    assert door.ends(door.run(), f"deepspeed.policy={door.path('ds.json')}", "--check") == (0, "")


# Folders


@pytest.mark.parametrize("key", ["run.dir", "run.cache", "reference.store", "export.dir"])
@pytest.mark.parametrize("below", ["file/folder", "file", "/proc/nothing/folder"])
def test_a_folder_that_cannot_be_written(door: Door, key: str, below: str) -> None:
    """Below a file and in /proc nobody can make a folder, not even root."""
    if (key, below) == ("export.dir", "file"):
        below = "file/folder"  # as an existing path it is refused for what it is
    (door.folder / "file").write_text("")
    folder = str(door.folder / below)
    words = [f"{key}: ", folder, "cannot be written", "Choose a"]
    for stage in ("train", "reference", "evaluate"):
        if stage != "evaluate":
            door.fails(words, f"{key}={folder}", stage=stage)
        door.fails(words, f"{key}={folder}", "--check", stage=stage)


def test_a_cache_that_cannot_be_written_is_found_by_inspect(door: Door) -> None:
    (door.folder / "file").write_text("")
    words = ["run.cache: ", door.path("file"), "cannot be written", "name a folder"]
    door.fails(words, f"run.cache={door.path('file')}", stage="inspect")


def test_an_export_over_somebodys_model(door: Door) -> None:
    words = ["export.dir: ", door.path("model"), "is not an export of this job", "Choose another folder"]
    door.fails(words, f"export.dir={door.path('model')}", early=True)


@pytest.fixture
def begun(door: Door) -> Path:
    """A run whose first start ended in the first pass: on a request, the model never loaded."""
    run = door.run()
    folder = door.folder / "runs" / "run"
    with pytest.raises(AssertionError, match="a model was loaded"):
        door.ends(run)
    shutil.rmtree(folder / ".heartbeats")  # what a crash leaves, and the next start removes
    (folder / "STOPPED").write_text("asked by the file STOP\n")
    assert json.loads((folder / "run.json").read_text())["identity"]["loss.beta"] == 0.1
    return folder


def test_a_folder_of_another_run(door: Door, begun: Path) -> None:
    words = ["run.dir: ", str(begun), "holds another run", "loss.beta: was 0.1, now 0.3", "Choose another run.dir"]
    door.fails([*words, "set these keys back"], "loss.beta=0.3", early=True)


def test_a_later_start_with_a_mistake_leaves_the_record_as_it_was(door: Door, begun: Path) -> None:
    before = tree(begun)
    door.fails(["train.micro_batch_tokens: "], "train.micro_batch_tokens=9")
    assert tree(begun).keys() == before.keys()
    assert json.loads((begun / "run.json").read_text())["starts"] == json.loads(before["run.json"] or b"")["starts"]


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"identity": 5}', "{"])
def test_a_damaged_record(door: Door, begun: Path, content: str) -> None:
    (begun / "run.json").write_text(content)
    door.fails([str(begun / "run.json")], early=True)


def test_two_jobs_on_one_folder(door: Door, begun: Path) -> None:
    lock = FileLock(begun / ".lock")
    assert lock.acquire() is None
    words = ["run.dir: ", str(begun), "is held by another job", f"process {os.getpid()}", "since 20", "host "]
    door.fails([*words, "Wait for it", str(begun / "STOP"), "choose another run.dir"])
    lock.release()


def test_stages_that_need_a_run(door: Door) -> None:
    for stage in ("evaluate", "export"):
        words = ["run.dir: ", door.path("runs/run"), "holds no run", "train first"]
        door.fails(words, f"data.eval={door.path('pairs.jsonl')}", stage=stage)


def test_evaluate_finds_its_mistakes_before_the_first_pass(door: Door, begun: Path) -> None:
    data = f"data.eval={door.path('pairs.jsonl')}"
    door.fails(["run.dir: ", str(begun), "has no committed checkpoint", "Train first"], data, stage="evaluate")
    words = ["evaluate.model: ", "./nowhere", "is not a folder", "Give a Hugging Face model folder"]
    door.fails(words, data, "evaluate.model=./nowhere", stage="evaluate")
    door.fails(["data.eval: not set", "Name a data set"], stage="evaluate")


# Packages


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


# The whole way


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
