"""Mistakes in the loss, sizes and budgets, DeepSpeed's files: status 2 and one message, as conftest.py says."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from door import PAIR, Door

from prefopt_dist.config import load_config
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.objectives import DPO, SFT
from prefopt_dist.setup import checks


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
