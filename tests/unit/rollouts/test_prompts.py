"""Prompts: read from rows of every form, in parts of a turn, and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompts_and_answers import tokeniser, write
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import Prompt, Prompts, Turn, read_prompts


def test_prompts_are_read_from_rows_of_every_form(tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "what is blue?"}, {"role": "assistant", "content": "the sky"}
    rows = [
        {"prompt": "what is quick?", "answer": 7},
        {"prompt": "what is green?", "chosen_response": "grass", "rejected_response": "the sky"},
        {"prompt": "what is one?", "chosen": "a", "rejected": "b"},
        {"chosen": [user, reply], "rejected": [user, {"role": "assistant", "content": "grass"}]},
        {"messages": [user, reply, user]},
        {"messages": [{"role": "system", "content": "you are a helpful assistant"}, user, reply]},
        {"prompt": [user], "completion": "the sky", "label": True},
        {
            "chosen": "\n\nHuman: what is two?\n\nAssistant: yes",
            "rejected": "\n\nHuman: what is two?\n\nAssistant: no",
        },
    ]
    found = read_prompts(
        write(tmp_path / "p.jsonl", *rows), tokeniser=tokeniser(), longest=100, on_bad_row="stop", key="data.train"
    )
    in_order = sorted(found.all, key=lambda p: p.index)
    assert [p.origin.rpartition(":")[2] for p in in_order] == ["1", "2", "3", "4", "5", "6", "8"]
    assert found.repeated == 1  # row 7 asks what row 4 asks
    assert in_order[0].row == rows[0]
    lengths = [len(p.ids) for p in found.all]
    assert lengths == sorted(lengths)
    tokenizer = small_tokenizer(CHATML)
    for p in found.all:
        turns = [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert p.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_parts_of_the_prompts_take_turns() -> None:
    """Each prompt once before one comes again, in an order by the seed, whatever the order of the file."""
    everything = [Prompt(i, f"f:{i}", "x", None, {}, [i]) for i in range(10)]
    prompts = Prompts(everything, 10, 0, {})

    def taken(number: int, size: int, seed: int = 0, of: Prompts = prompts) -> list[int]:
        return [prompt.index for prompt in Turn(number, size, seed).of(of).all]

    first, second, third, fourth = (taken(number, 4) for number in range(4))
    assert [len(part) for part in (first, second, third, fourth)] == [4] * 4
    assert sorted([*first, *second, *(set(third) - set(first))]) == list(range(10))
    assert set(fourth).isdisjoint(third)
    assert all(part == sorted(part) for part in (first, second, third))  # by length, as before
    assert taken(0, 4, seed=1) != first
    assert taken(7, 20) == list(range(10))
    assert sorted(taken(1, 4, of=Prompts(everything[::-1], 10, 0, {}))) == second


def test_bad_prompts_stop_or_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "no prompt"}, {"prompt": "what is blue?"}, {"prompt": "sky " * 50}, {"prompt": "  "}]
    sources = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError, match=r"p\.jsonl:1: missing_field: a row needs a prompt"):
        read_prompts(sources, tokeniser=tokeniser(), longest=60, on_bad_row="stop", key="data.train")
    found = read_prompts(sources, tokeniser=tokeniser(), longest=60, on_bad_row="drop", key="data.train")
    assert [p.prompt for p in found.all] == ["what is blue?"]
    assert found.dropped == {"missing_field": 1, "prompt_too_long": 1, "empty_prompt": 1}
    with pytest.raises(UserError, match="no prompt is left"):
        read_prompts(
            write(tmp_path / "q.jsonl", {"text": 1}), tokeniser=tokeniser(), longest=60, on_bad_row="drop", key="k"
        )
