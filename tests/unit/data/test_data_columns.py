"""Columns beside the form's own: each is used, refused, or named as ignored; `generate` asks the same prompts."""

from pathlib import Path
from typing import Any

import pytest
from data_for_tests import TOKENIZER, lines, prepare
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows
from prefopt_dist.data.example import BadRow
from prefopt_dist.data.forms import read_form
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import read_prompts

USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LOUD = "{% if loud %}!{% endif %}" + CHATML
CALLING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
)


def texts(tmp_path: Path, *rows: dict[str, Any], tokenizer: Any = TOKENIZER, **changes: Any) -> list[list[str]]:
    """Prompt and responses of each row, decoded; what generation would ask is the same prompt."""
    path = lines(tmp_path / "rows.jsonl", list(rows))
    made = open_rows(prepare(tmp_path, path, tokenizer=tokenizer, **changes))
    mode = changes.get("template", "auto")
    asked = read_prompts(
        [DataSource(path)], tokeniser=Tokeniser(read_template(tokenizer, mode), 512, 256), longest=500,
        on_bad_row="stop", key="k",
    )  # fmt: skip
    assert sorted(p.ids for p in asked.all) == sorted(
        map(list, {tuple(made.prompt(i).tolist()) for i in range(made.n)})
    )
    return [
        [tokenizer.decode(ids) for ids in (made.prompt(i), *(made.response(i, k) for k in range(made.responses)))]
        for i in range(made.n)
    ]


PAIR = {"prompt": "what?", "chosen": "yes", "rejected": "no"}
SYSTEM = "<|im_start|>system\nbe kind<|im_end|>\n"


def test_a_system_column_is_the_first_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what?"}]
    held = [{"role": "system", "content": "be kind"}, *turns]
    for prompt in ("what?", turns, held):
        (row,) = texts(tmp_path, PAIR | {"prompt": prompt, "system": "be kind"})
        assert row == [SYSTEM + USER.format("what?"), "yes<|im_end|>", "no<|im_end|>"]
    assert texts(tmp_path, PAIR | {"system": ""})[0][0] == USER.format("what?")
    for row, kind in (
        (PAIR | {"prompt": held, "system": "be rude"}, "two_systems"),
        (PAIR | {"system": ["be kind"]}, "wrong_type"),
        (PAIR | {"prompt": USER.format("what?"), "system": "be kind"}, "no_place_for_system"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: {kind}"):
            prepare(tmp_path, lines(tmp_path / "rows.jsonl", [row]))


def test_a_long_string_is_cut_behind_its_system_turn(tmp_path: Path) -> None:
    row = PAIR | {"prompt": "one two three four five six " * 9, "system": "be kind", "chosen": "yes " * 40}
    path = lines(tmp_path / "rows.jsonl", [row])
    made = open_rows(prepare(tmp_path, path, max_length=100, max_prompt_length=60))
    assert made.report.cut["prompt"] == 1
    assert TOKENIZER.decode(made.prompt(0)).startswith(SYSTEM + "<|im_start|>user\n")


def test_a_transcript_in_the_prompt_is_its_turns(tmp_path: Path) -> None:
    prompt = "\n\nHuman: one?\n\nAssistant: two\n\nHuman: three?\n\nAssistant:"
    row = {"prompt": prompt, "chosen": " four", "rejected": " no"}
    start = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    expected = [start + USER.format("three?"), "four<|im_end|>", "no<|im_end|>"]
    assert texts(tmp_path, row) == [expected]
    assert texts(tmp_path, row, template="chat") == [expected]
    assert texts(tmp_path, row | {"prompt": prompt.strip() + " "}) == [expected]
    as_text = [prompt, " four</s>", " no</s>"]
    assert texts(tmp_path, row, template="none") == [as_text]
    said: list[str] = []
    path = lines(tmp_path / "mixed.jsonl", [row, row, PAIR])
    with pytest.raises(UserError, match=r"mixed\.jsonl:3: mixed_texts: .* are Human/Assistant transcripts, but this"):
        prepare(tmp_path, path, said=said)
    assert any("mixed.jsonl are whole Human/Assistant transcripts" in line for line in said)
    with pytest.raises(UserError, match=r"mixed\.jsonl:3: mixed_texts"):
        prepare(tmp_path, lines(tmp_path / "mixed.jsonl", [PAIR, PAIR, row]))


def test_arguments_of_the_template(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(LOUD)
    row = PAIR | {"chat_template_kwargs": {"loud": True}}
    for given in ({"loud": True}, '{"loud": true}'):
        ((prompt, *_), (quiet, *_)) = texts(tmp_path, row | {"chat_template_kwargs": given}, PAIR, tokenizer=tokenizer)
        assert prompt == "!" + USER.format("what?")
        assert quiet == USER.format("what?")
    for bad in ({"tokenize": True}, "[1]", "{", 3):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: wrong_type: chat_template_kwargs"):
            prepare(tmp_path, lines(tmp_path / "rows.jsonl", [PAIR | {"chat_template_kwargs": bad}]))


def test_arguments_of_a_call_may_be_json_text(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(CALLING)

    def row(arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        return PAIR | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]}

    for arguments in ({"at": "sky"}, '{"at": "sky"}'):
        assert texts(tmp_path, row(arguments), tokenizer=tokenizer)[0][1] == 'look{"at": "sky"}<|im_end|>'
    assert texts(tmp_path, row(""), tokenizer=tokenizer)[0][1] == "look{}<|im_end|>"
    for bad in ('{"at": ', '["sky"]', '"\\ud800"'):
        with pytest.raises(BadRow) as caught:
            read_form("pair", row(bad))
        assert caught.value.kind == "wrong_type"


def test_messages_may_be_json_text(tmp_path: Path) -> None:
    row = {
        "prompt": '[{"role": "user", "content": "what?"}]',
        "chosen": '[{"role": "assistant", "content": "yes"}]',
        "rejected": '[{"role": "assistant", "content": "no"}]',
    }
    assert texts(tmp_path, row) == texts(tmp_path, PAIR)
    whole = {"messages": '[{"role": "user", "content": "what?"}, {"role": "assistant", "content": "yes"}]'}
    assert texts(tmp_path, whole)[0][1] == "yes<|im_end|>"
    assert texts(tmp_path, PAIR | {"chosen": '["role"]'})[0][1] == '["role"]<|im_end|>'


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    rows = [PAIR | {"score": 3, "source": "web", "empty": None}, PAIR | {"score": 4, "system": "x", "tools": None}]
    path = lines(tmp_path / "rows.jsonl", rows)
    report = open_rows(prepare(tmp_path, path)).report
    assert report.ignored == {path: {"score": 2, "source": 1}}
    assert f"columns of {path} that are ignored: score (2 rows), source (1 rows)" in report.text()
