"""What a text is, what a response says and how it ends, under templates of our own that do what real ones do."""

from pathlib import Path
from typing import Any

import pytest
from data_for_tests import TOKENIZER, lines, prepare
from encoding import encode, fault, pair
from tokenizers_for_tests import CHATML, INST, ids, small_tokenizer

from prefopt_dist.config.data import Data
from prefopt_dist.data import open_rows
from prefopt_dist.data.example import Example, Message
from prefopt_dist.data.frame import Frame
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import PLAIN_TEMPLATE, read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError

SPOKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'A: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
# A system text stands at the beginning without a marker of its own.
BARE_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}</s>{{ m['content'] }}<|im_end|>{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
    "{{ m['content'] }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}</s>{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# tools #}"
)


def frame(template: str | None, **changes: Any) -> Frame:
    return read_template(small_tokenizer(template, **changes), "auto").frame


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "<s><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant"),
        (CHATML, "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nthe"),
        (CHATML, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"),
        (WITH_SYSTEM, "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"),
        (INST, "<s>[INST] what? [/INST]"),
        (INST, "[INST] what? [/INST]"),
        (None, "### user:\nwhat?\n\n### assistant:\n"),
        (BARE_SYSTEM, "<s><|im_start|>what?</s>"),
        (BARE_SYSTEM, "<|im_start|>what?</s><think>\n"),
    ],
)
def test_rendered_turns_are_known_by_their_order(template: str | None, turns: str) -> None:
    assert frame(template).is_conversation(turns)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "what does <|im_start|>user do?"),
        (CHATML, "what is <|im_start|>assistant\n, and <|im_start|>user\n?"),
        (CHATML, "<|im_start|>"),
        (CHATML, "<s> strikes through"),
        (INST, "why [INST] and [/INST]?"),
        (INST, "<s>what?"),
        (INST, "[INST] what?"),
        (SPOKEN, "what is Q: and A: in this text?"),
        (BARE_SYSTEM, "does <|im_start|> come before <think>?"),
        (BARE_SYSTEM, "<|im_start|>, </s> and <think>?"),
        (None, "a headline is ### user: here"),
        (None, "${content} and ### assistant:"),
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", "a|"),
    ],
)
def test_a_text_that_mentions_a_marker_is_no_conversation(template: str | None, text: str) -> None:
    assert not frame(template).is_conversation(text)


def test_a_question_about_a_marker_is_templated_all_the_same() -> None:
    tokenizer = small_tokenizer(CHATML)
    row = encode(tokenizer, pair("what is <|im_start|>user?", "it opens <|im_start|>", "no"))
    expected = "<|im_start|>user\nwhat is <|im_start|>user?<|im_end|>\n<|im_start|>assistant\n"
    assert (row.prompt, row.as_is) == (ids(tokenizer, expected), False)
    assert row.responses[0] == ids(tokenizer, "it opens <|im_start|><|im_end|>")


TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_the_first_rows_decide_for_the_source(tmp_path: Path) -> None:
    def row(prompt: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": "yes", "rejected": "no"}

    plain, carried = [row(f"what {k}?") for k in range(3)], [row(TURNS.format(k)) for k in range(3)]
    said: list[str] = []
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "carried.jsonl", carried), said=said))
    assert rows.report.as_is == 3
    assert any("carried.jsonl are rendered turns already and are taken as they are" in line for line in said)
    mixed = lines(tmp_path / "mixed.jsonl", [*plain, carried[0], carried[1]])
    with pytest.raises(UserError, match=r"mixed\.jsonl:4: mixed_texts: .* source are plain text"):
        prepare(tmp_path, mixed)
    assert open_rows(prepare(tmp_path, mixed, on_bad_row="drop")).report.dropped == {"mixed_texts": 2}
    mixed = lines(tmp_path / "mixed.jsonl", [*carried, plain[0]])
    with pytest.raises(UserError, match=r"mixed\.jsonl:4: mixed_texts: .* are rendered turns of the template"):
        prepare(tmp_path, mixed)
    assert open_rows(prepare(tmp_path, mixed, template="none")).report.as_is == 4
    with pytest.raises(UserError, match=r"mixed\.jsonl:1: doubled_template"):
        prepare(tmp_path, mixed, template="chat")


def call(name: str, **arguments: Any) -> tuple[tuple[str, Any], ...]:
    return (("tool_calls", [{"type": "function", "function": {"name": name, "arguments": arguments}}]),)


def says(content: str, extra: tuple[tuple[str, Any], ...] = ()) -> tuple[Message, ...]:
    return (Message("assistant", content, extra),)


ASKED = (Message("user", "what is blue?"),)


@pytest.mark.parametrize(
    ("template", "response", "part"),
    [
        (CHATML, says("", call("look", at="sky")), "name of a call"),
        (CHATML, says("the sky", call("look", at="sky")), "name of a call"),
        (CHATML, says("the sky", (("reasoning_content", "grass is green"),)), "reasoning"),
        (CHATML, says("the sky", (("thinking", "sky"),)), "reasoning"),
        (CALLS.replace("| tojson", ".at"), says("", call("look", at="sky", how="up")), "argument 'how'"),
        (CALLS.replace("{{ m['content'] }}", "{{ '' if m.tool_calls else m['content'] }}"),
         says("the sky", call("look", at="sky")), "text"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_of_a_response_is_named(template: str, response: Any, part: str) -> None:
    with pytest.raises(Exception, match=rf"leaves out its {part}"):
        encode(small_tokenizer(template), Example(ASKED, (response, says("grass"))))
    assert fault(small_tokenizer(template), Example(ASKED, (response, says("grass")))) == "unwritten_part"


def test_what_is_written_passes() -> None:
    tokenizer = small_tokenizer(CALLS)
    thought = says("the sky", (("thinking", "grass"),))
    row = encode(tokenizer, Example(ASKED, (thought, says("", call("look", at="sky")))))
    assert row.responses == (
        ids(tokenizer, "<think>grass</think>the sky<|im_end|>"),
        ids(tokenizer, 'look({"at": "sky"})</s>'),
    )
    tagged = small_tokenizer(CHATML.replace("message['content']", "message['content'] | replace('\\n', ' ')"))
    row = encode(tagged, pair("what?", "<think>\nsky\n</think>\n<b>blue</b>", "no"))
    assert tagged.decode(row.responses[0]) == "<think> sky </think> <b>blue</b><|im_end|>"


def test_a_turn_ends_once_as_the_template_ends_it() -> None:
    tokenizer = small_tokenizer(CALLS)
    template = read_template(tokenizer, "auto")
    assert (template.end_token, template.end_tokens) == ("<|im_end|>", ("<|im_end|>", "</s>"))
    row = encode(tokenizer, Example(ASKED, (says("", call("look", at="sky")), says("grass"))))
    assert [tokenizer.decode(response[-1:]) for response in row.responses] == ["</s>", "<|im_end|>"]
    assert sum(token in tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]) for token in row.responses[0]) == 1


def test_reasoning_that_earlier_turns_lose_is_counted(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "<think>two</think>three"},
        {"role": "user", "content": "four?"},
    ]  # fmt: skip
    rows = [
        {"prompt": turns, "chosen": "<think>sky</think>five", "rejected": "six"},
        {"prompt": turns[2:], "chosen": "<think>sky</think>five", "rejected": "six"},
    ]
    made = open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", rows), tokenizer=tokenizer))
    assert made.flagged("lost_reasoning").tolist() == [True, False]
    assert "two" not in tokenizer.decode(made.prompt(0))
    assert tokenizer.decode(made.response(0, 0)) == "<think>sky</think>five<|im_end|>"


CALLED = "{% if tools %}{{ tools[0].name }}{% endif %}" + CALLS


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (CALLED, []),
        (CALLED.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"), ["tool"]),
        (CALLED.replace("c.function.name", "''"), ["tool"]),
        (CALLED.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"), ["system"]),
        (CALLED.replace("tools[0].name", "''"), ["tools"]),
        (CALLED.replace("{{ m['content'] }}", "{{ m['content'] | trim | replace('a', 'A') }}"), []),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_of_a_prompt_is_counted(tmp_path: Path, template: str, lost: list[str]) -> None:
    def turn(role: str, content: str, **extra: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **extra}

    calling = turn("assistant", "", tool_calls=call("look", at="sky")[0][1])
    prompts = {
        "tool": [turn("user", "what is blue?"), calling, turn("tool", "sky")],
        "system": [turn("user", "a?"), turn("assistant", "b"), turn("system", "be kind"), turn("user", "what?")],
        "tools": [turn("user", "what?")],
        "none": [turn("user", "a thought? "), turn("assistant", "b", thinking="<think>"), turn("user", "what?")],
    }
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts.values()]
    rows[2]["tools"] = [{"name": "seek"}]
    tokenizer = small_tokenizer(template)
    made = open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", rows), tokenizer=tokenizer))
    found = dict(zip(prompts, made.flagged("lost_prompt").tolist(), strict=True))
    assert [name for name, is_lost in found.items() if is_lost] == lost


def test_the_date_of_a_template_is_fixed(tmp_path: Path) -> None:
    dated = "{% set day = strftime_now('%d %b %Y, %-d.%-m.') %}{{ day }}: {{ strftime_now('%A %Y-%m-%d') }}\n" + CHATML
    tokenizer = small_tokenizer(dated)
    row = encode(tokenizer, pair("what?", "yes", "no"))
    assert tokenizer.decode(row.prompt).startswith("26 Jul 2024, 26.7.: Friday 2024-07-26\n<|im_start|>user")
    path = lines(tmp_path / "r.jsonl", [{"prompt": "what?", "chosen": "yes", "rejected": "no"}])
    said: list[str] = []
    folder = prepare(tmp_path, path, tokenizer=tokenizer, said=said)
    assert any("writes a date, which is fixed to 2024-07-26 (data.template_date)" in line for line in said)
    other = prepare(tmp_path, path, tokenizer=tokenizer, options=TextOptions(template_date="2025-01-03"))
    assert folder != other
    assert tokenizer.decode(open_rows(other).prompt(0)).startswith("03 Jan 2025, 3.1.: Friday 2025-01-03")
    with pytest.raises(UserError, match=r"^data\.template_date: '2024-13-01' is not a date"):
        prepare(tmp_path, path, tokenizer=tokenizer, options=TextOptions(template_date="2024-13-01"))


def test_a_template_keeps_the_line_break_it_begins_with() -> None:
    template = "\n{{ strftime_now('%Y') }}" + CHATML
    prompt = encode(small_tokenizer(template), pair("a", "yes", "no")).prompt
    assert TOKENIZER.decode(prompt).startswith("\n2024<|im_start|>")


def test_options_are_those_of_the_configuration() -> None:
    section = {field: getattr(Data, field) for field in ("template_date", "learn", "system", "thinking")}
    assert TextOptions(**section) == TextOptions()
    assert Tokeniser(read_template(TOKENIZER, "auto"), 9, 3).template.text == TOKENIZER.chat_template
    assert read_template(small_tokenizer(), "auto").text == PLAIN_TEMPLATE


def test_a_system_turn_without_a_place(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(INST)
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what?"}]
    row = {"prompt": turns, "chosen": "yes", "rejected": "no"}
    path = lines(tmp_path / "r.jsonl", [row, row | {"prompt": "what?", "system": "be kind"}])
    with pytest.raises(UserError, match=r"template_refused: .* no place for a system turn; got 'be kind'; set"):
        prepare(tmp_path, path, tokenizer=tokenizer)
    for system, prompt, counted in (
        ("merge", "be kind\n\nwhat?", "system_merged"),
        ("drop", "what?", "system_dropped"),
    ):
        made = open_rows(prepare(tmp_path, path, tokenizer=tokenizer, options=TextOptions(system=system)))  # type: ignore[arg-type]
        assert {tokenizer.decode(made.prompt(i)) for i in (0, 1)} == {f"<s>[INST] {prompt} [/INST]"}
        assert made.report.repaired == {counted: 2}
