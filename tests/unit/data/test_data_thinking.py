"""Templates that open reasoning for generation, render it otherwise when finished, or leave it out; of our own."""

from pathlib import Path
from typing import Any

import pytest
from data_for_tests import lines, prepare
from encoding import LONG
from tokenizers_for_tests import CHATML, ids, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows
from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.quality.findings import row_findings
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.rollouts.prompts import read_prompts

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
PLAIN_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def turns(answer: str, ask: str = ASK) -> str:
    """A template of which a user's turn is plain and an assistant's is `answer`."""
    return (
        "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        + answer
        + "<|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ c }}<|im_end|>\n{% endif %}{% endfor %}"
        + ask
    )


OPENS = turns("{{ c }}")  # the finished conversation has no reasoning of its own accord
DROPS = turns("{{ c.split('</think>')[-1] | trim }}")
WRITES_EMPTY = turns(
    "<think>\n{{ (m.reasoning_content or c.split('</think>')[0].split('<think>')[-1] if '</think>' in c or"
    " m.reasoning_content else '') | trim }}\n</think>\n\n{{ c.split('</think>')[-1] | trim }}"
)
HIDES = turns("{{ c.split('</think>')[-1] | trim }}", PLAIN_ASK)
OF_LAST_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}<s>{% for m in rest %}{% if m['role'] == 'user' %}"
    "[INST]{% if loop.last and s %}{{ s }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
QUESTION: Messages = (Message("user", "what is blue?"),)
START = "<|im_start|>user\nwhat is blue?<|im_end|>\n<|im_start|>assistant\n"
OPENED = START + "<think>\n"
THOUGHT = "<think>\nthe sky\n</think>\n\nyes"
EMPTY, KEEP = TextOptions(thinking="empty"), TextOptions(thinking="keep")


def said(
    template: str, *answers: Message, options: TextOptions | None = None, prompt: Messages = QUESTION
) -> list[str]:
    """Prompt and responses, decoded; also that generation asks the same prompt."""
    tokenizer = small_tokenizer(template)
    of = Tokeniser(read_template(tokenizer, "auto", options or TextOptions()), LONG, LONG - 1)
    example = Example(prompt, tuple((answer,) for answer in answers))
    (row,) = of.encode([example])
    if isinstance(row, BadRow):
        raise row
    return [tokenizer.decode(part) for part in (row.prompt, *row.responses)]


def a(content: str, **extra: Any) -> Message:
    return Message("assistant", content, tuple(extra.items()))


@pytest.mark.parametrize("template", [OPENS, DROPS, WRITES_EMPTY])
@pytest.mark.parametrize("options", [TextOptions(), EMPTY])
def test_a_plain_answer_closes_the_reasoning_that_is_open(template: str, options: TextOptions) -> None:
    prompt, yes, no = said(template, a("yes"), a("no"), options=options)
    assert prompt + yes == OPENED + "\n</think>\n\nyes<|im_end|>"
    assert prompt + no == OPENED + "\n</think>\n\nno<|im_end|>"
    assert prompt == OPENED or (template == WRITES_EMPTY and options.thinking is None)


@pytest.mark.parametrize("template", [OPENS, DROPS, WRITES_EMPTY])
def test_keep_is_the_finished_conversation(template: str) -> None:
    tokenizer = small_tokenizer(template)
    of = Tokeniser(read_template(tokenizer, "auto", KEEP), LONG, LONG - 1)
    (row,) = of.encode([Example(QUESTION, ((a("yes"),), (a("no"),)))])
    assert isinstance(row, TokenisedRow)
    for response, answer in zip(row.responses, ("yes", "no"), strict=True):
        talk = [{"role": "user", "content": "what is blue?"}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(talk, tokenize=False).removesuffix("\n")
        assert row.prompt + response == ids(tokenizer, whole)


@pytest.mark.parametrize("template", [OPENS, DROPS, WRITES_EMPTY])
def test_generations_prompt_begins_the_ids_under_empty(template: str) -> None:
    tokenizer = small_tokenizer(template)
    of = Tokeniser(read_template(tokenizer, "auto", EMPTY), LONG, LONG - 1)
    (row,) = of.encode([Example(QUESTION, ((a("yes"),), (a(THOUGHT),)))])
    assert isinstance(row, TokenisedRow)
    assert row.prompt == ids(tokenizer, OPENED)


@pytest.mark.parametrize("template", [OPENS, DROPS, WRITES_EMPTY])
def test_a_thought_is_said_behind_the_open_reasoning(template: str) -> None:
    prompt, with_, same = said(template, a(THOUGHT), a("<think>\ngrass\n</think>\n\nyes"))
    assert prompt + with_ == OPENED + "the sky\n</think>\n\nyes<|im_end|>"
    assert prompt + same == OPENED + "grass\n</think>\n\nyes<|im_end|>"
    field = said(template, a("yes", reasoning_content="the sky"), a("no", reasoning_content="grass"))
    assert "".join(field[:2]) == OPENED + "the sky\n</think>\n\nyes<|im_end|>"


def test_a_thought_that_the_template_hides_is_said() -> None:
    prompt, with_, without = said(HIDES, a(THOUGHT), a("no"))
    assert (prompt, with_, without) == (START, THOUGHT + "<|im_end|>", "no<|im_end|>")
    assert said(HIDES, a("yes", reasoning_content="the sky"), a("no"))[1] == THOUGHT + "<|im_end|>"
    for template in (HIDES, DROPS):
        with pytest.raises(BadRow) as caught:
            said(template, a(THOUGHT), a("no"), options=KEEP)
        assert caught.value.kind == "unwritten_part"
    with pytest.raises(BadRow):  # a template that knows no reasoning
        said(CHATML, a("yes", reasoning_content="the sky"), a("no"))


@pytest.mark.parametrize("template", [DROPS, WRITES_EMPTY, HIDES])
@pytest.mark.parametrize("content", ["<s> </think> maybe", "<b> <think>\nhm\n</think>\n\nmaybe"])
def test_a_tag_before_reasoning_is_not_lost(template: str, content: str) -> None:
    text = "".join(said(template, a(content), a("no"))[:2])
    assert all(word in text for word in content.split())


def test_a_system_turn_beside_the_last_user(tmp_path: Path) -> None:
    prompt: Messages = (Message("system", "be kind"), *QUESTION)
    expected = ["<s>[INST]be kind\n\nwhat is blue?[/INST]", "yes</s>", "no</s>"]
    assert said(OF_LAST_USER, a("yes"), a("no"), prompt=prompt) == expected
    row = {"prompt": [turn.as_dict() for turn in prompt], "chosen": "yes", "rejected": "no"}
    path, tokenizer = lines(tmp_path / "r.jsonl", [row]), small_tokenizer(OF_LAST_USER)
    rows = open_rows(prepare(tmp_path, path, tokenizer=tokenizer))
    asked = read_prompts(
        [DataSource(path)], tokeniser=Tokeniser(read_template(tokenizer, "auto"), 99, 98), longest=99,
        on_bad_row="stop", key="k",
    )  # fmt: skip
    assert [p.ids for p in asked.all] == [rows.prompt(0).tolist()]


def test_another_way_to_be_unstable_is_refused() -> None:
    with pytest.raises(BadRow) as caught:
        said("{{ messages | length }}" + CHATML, a("yes"), a("no"))
    assert caught.value.kind == "unstable_template"


def test_a_prompt_that_ends_otherwise_in_use_is_told(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(WRITES_EMPTY)
    tokenizer.add_tokens(["\n\n"])  # "\n" before another is another token than alone
    path = lines(tmp_path / "r.jsonl", [{"prompt": "what is blue?", "chosen": "yes", "rejected": "no"}])
    made = open_rows(prepare(tmp_path, path, tokenizer=tokenizer, vocab_size=len(tokenizer)))
    assert tokenizer.decode(made.prompt(0)) == OPENED.removesuffix("\n")
    assert made.flagged("other_prompt").tolist() == [True]
    (told,) = [f for f in row_findings(made, {}) if f.name == "other_prompt"]
    assert told.examples[0].startswith(f"{path}:1 at inference the prompt ends with ")
    assert told.examples[0].endswith("<think>\\n', in training with '…\\n<|im_start|>assistant\\n<think>'")
    options = TextOptions(thinking="empty")
    exact = open_rows(prepare(tmp_path, path, tokenizer=tokenizer, vocab_size=len(tokenizer), options=options))
    assert tokenizer.decode(exact.prompt(0)) == OPENED
    assert not exact.flagged("other_prompt").any()
