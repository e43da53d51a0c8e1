"""Generation prompts that a finished conversation does not have as they are, under templates of our own."""

from typing import Any

import pytest
from encoding import LONG, chat, encode, fault, pair
from test_data_learnt import learnt
from test_data_thinking import (
    DROPS,
    EMPTY,
    HIDES,
    KEEP,
    OF_LAST_USER,
    OPENED,
    OPENS,
    QUESTION,
    START,
    THOUGHT,
    WRITES_EMPTY,
    a,
    said,
    turns,
)
from tokenizers_for_tests import CHATML, ids, small_tokenizer

from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.errors import UserError

ASK_NOTHING = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n</think>{% endif %}"
CLOSED = turns("{{ c.split('</think>')[-1] | trim }}", ASK_NOTHING)  # generation opens reasoning and closes it at once
CLOSED_IN_WORDS = turns("{{ c }}", "{% if add_generation_prompt %}<|im_start|>assistant\n<|mind>\n<mind|>{% endif %}")
CLOSED_AGAIN = turns("</think>{{ c }}", ASK_NOTHING.replace("\n</think>", "</think>"))
MARKS_OF_ITS_OWN = turns(
    "{% if m.thinking %}<|mind|>{{ m.thinking }}<|said|>{% endif %}<|text|>{{ c }}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<|mind|>{% endif %}",
)
BARE_CLOSING = turns("</think>{{ c }}", "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}")
EMPTY_ON_ONE_LINE = turns("<think></think>{{ c }}")
LEAD_IN_WORDS = turns("{{ c }}", "{% if add_generation_prompt %}<|im_start|>assistant\nmy steps:\n{% endif %}")


@pytest.mark.parametrize("options", [TextOptions(), EMPTY])
@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (CLOSED, START + "<think>\n</think>", "\n\nyes<|im_end|>"),
        (CLOSED_IN_WORDS, START + "<|mind>\n<mind|>", "yes<|im_end|>"),
        (CLOSED_AGAIN, START + "<think></think>", "yes<|im_end|>"),
        (MARKS_OF_ITS_OWN, START + "<|mind|>", "<|said|><|text|>yes<|im_end|>"),
        (BARE_CLOSING, START + "<think>", "</think>yes<|im_end|>"),
        (EMPTY_ON_ONE_LINE, OPENED, "</think>yes<|im_end|>"),
    ],
)
def test_a_plain_answer_follows_the_generation_prompt(
    template: str, prompt: str, answer: str, options: TextOptions
) -> None:
    assert said(template, a("yes"), a("no"), options=options) == [prompt, answer, answer.replace("yes", "no")]


def test_a_thought_has_no_place_after_closed_reasoning() -> None:
    for answer in (a(THOUGHT), a("yes", reasoning_content="the sky")):
        with pytest.raises(BadRow, match="unwritten_part") as caught:
            said(CLOSED, answer, a("no"))
        assert caught.value.kind == "unwritten_part"
    thought = said(MARKS_OF_ITS_OWN, a("yes", thinking="the sky"), a("no"))
    assert thought == [START + "<|mind|>", "the sky<|said|><|text|>yes<|im_end|>", "<|said|><|text|>no<|im_end|>"]


def test_a_lead_in_words_is_refused_and_kept_on_request() -> None:
    with pytest.raises(BadRow) as caught:
        said(LEAD_IN_WORDS, a("yes"), a("no"))
    assert caught.value.kind == "unstable_template"
    assert "data.thinking=keep" in caught.value.remedy
    assert said(LEAD_IN_WORDS, a("yes"), a("no"), options=KEEP) == [START, "yes<|im_end|>", "no<|im_end|>"]


TALK = chat(("assistant", "yes"), ("user", "why?"), ("assistant", "the sky is blue"))
OTHER_TALK = chat(("assistant", "no"), ("user", "who?"), ("assistant", "a fox"))


@pytest.mark.parametrize("options", [TextOptions(), EMPTY])
@pytest.mark.parametrize(
    ("template", "closing"), [(OPENS, "\n</think>\n\n"), (DROPS, "\n</think>\n\n"), (BARE_CLOSING, "</think>")]
)
def test_several_turns_follow_the_generation_prompt_too(template: str, closing: str, options: TextOptions) -> None:
    tokenizer = small_tokenizer(template)
    (row,) = Tokeniser(read_template(tokenizer, "auto", options), LONG, LONG - 1).encode(
        [pair(QUESTION, TALK, OTHER_TALK)]
    )
    assert isinstance(row, TokenisedRow)
    asked = [{"role": "user", "content": "what is blue?"}]
    start = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert row.prompt == ids(tokenizer, start)
    later = "" if template != BARE_CLOSING else "</think>"
    assert learnt(tokenizer, row, 0) == [f"{closing}yes<|im_end|>", f"{later}the sky is blue<|im_end|>"]
    assert learnt(tokenizer, row, 1) == [f"{closing}no<|im_end|>", f"{later}a fox<|im_end|>"]
    assert "other_prompt" not in row.flags


# After a tool's result the answer has no opening of its own, but generation writes one.
OPENED_AFTER_TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [/Q]{% elif m['role'] == 'tool' %}"
    "({{ m['content'] }}){% else %}{% if messages[loop.index0 - 1]['role'] != 'tool' %}[A]{% endif %}"
    "{{ m['content'] }}{{ '</s>' if loop.last else '' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)


def test_an_opening_that_only_generation_writes() -> None:
    prompt = (*QUESTION, Message("assistant", "look"), Message("tool", "sky"))
    assert said(OPENED_AFTER_TOOLS, a("yes"), a("no"), prompt=prompt) == [
        "[Q] what is blue? [/Q][A]look(sky)[A]", "yes</s>", "no</s>"
    ]  # fmt: skip


IDENTIFIED = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}{% if not c.id %}{{ raise_exception('an id') }}"
    "{% endif %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
)


def test_calls_that_need_an_id_are_found_in_the_text() -> None:
    def look(at: str) -> Messages:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": at}}}
        calling = Message("assistant", "", (("tool_calls", [call]),))
        return calling, Message("tool", "one two"), Message("assistant", f"{at} it is")

    tokenizer = small_tokenizer(IDENTIFIED)
    row = encode(tokenizer, Example(QUESTION, (look("sky"), look("grass"))))
    assert learnt(tokenizer, row, 0) == ['look{"at": "sky"}<|im_end|>', "sky it is<|im_end|>"]


def test_a_template_that_opens_another_answer_is_refused() -> None:
    always = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    with pytest.raises(UserError, match=r"^model\.tokenizer: .* opens another answer after a finished one"):
        read_template(small_tokenizer(always), "auto")
    never = CHATML.partition("{% if add_generation_prompt %}")[0]
    assert fault(small_tokenizer(never), pair("a", "a", "a")) == "identical_responses"  # it can be used


# The generation prompt keeps the reasoning of earlier turns, the finished conversation drops it.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if add_generation_prompt or loop.last else m['content'].split('</think>')[-1] | trim }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HISTORY: Messages = (Message("user", "one?"), a(THOUGHT), *QUESTION)
SYSTEM: Messages = (Message("system", "be kind"), *QUESTION)
ROWS: dict[str, tuple[Messages, tuple[Messages, Messages]]] = {
    "plain": (QUESTION, ((a("yes"),), (a("no"),))),
    "a thought": (QUESTION, ((a(THOUGHT),), (a("<think>\ngrass\n</think>\n\nno"),))),
    "one thought": (QUESTION, ((a(THOUGHT),), (a("no"),))),
    "a system turn": (SYSTEM, ((a("yes"),), (a("no"),))),
    "earlier thoughts": (HISTORY, ((a("yes"),), (a("no"),))),
    "several turns": (QUESTION, (TALK, OTHER_TALK)),
}
TEMPLATES = {
    **{"opens": OPENS, "drops": DROPS, "writes empty": WRITES_EMPTY, "hides": HIDES, "closed": CLOSED},
    **{"closed again": CLOSED_AGAIN, "marks of its own": MARKS_OF_ITS_OWN, "bare closing": BARE_CLOSING},
    **{"empty on one line": EMPTY_ON_ONE_LINE, "lead in words": LEAD_IN_WORDS, "rewrites": REWRITES},
    **{"closed in words": CLOSED_IN_WORDS, "system of the last user": OF_LAST_USER},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_keep_is_what_the_template_renders(name: str, kind: str) -> None:
    """Or a part of the answer is not in it, and the row is bad; nothing else is refused."""
    tokenizer, (prompt, answers) = small_tokenizer(TEMPLATES[name]), ROWS[kind]
    (row,) = Tokeniser(read_template(tokenizer, "auto", KEEP), LONG, LONG - 1).encode([Example(prompt, answers)])
    texts = [rendered(tokenizer, prompt + answer) for answer in answers]
    written = all(word in text for text, answer in zip(texts, answers, strict=True) for word in words(answer))
    if isinstance(row, BadRow):
        assert (row.kind, written) == ("unwritten_part", False)
        return
    assert written
    for text, response in zip(texts, row.responses, strict=True):
        assert row.prompt + response == ids(tokenizer, text.removesuffix("\n"))
    start = rendered(tokenizer, prompt, add_generation_prompt=True)
    assert ("other_prompt" in row.flags) == (row.prompt != ids(tokenizer, start))


def rendered(tokenizer: Any, talk: Messages, **more: Any) -> str:
    text = tokenizer.apply_chat_template([turn.as_dict() for turn in talk], tokenize=False, **more)
    assert isinstance(text, str)
    return text


def words(answer: Messages) -> set[str]:
    """The words of an answer's last turn that are no marks."""
    plain = answer[-1].content.replace("<think>", " ").replace("</think>", " ")
    return {word for word in plain.split() if word not in ("yes", "no", "fox", "blue")}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("lead in words", "rewrites")])
def test_the_generation_prompt_begins_every_answer_under_empty(name: str, kind: str) -> None:
    tokenizer, (prompt, answers) = small_tokenizer(TEMPLATES[name]), ROWS[kind]
    (row,) = Tokeniser(read_template(tokenizer, "auto", EMPTY), LONG, LONG - 1).encode([Example(prompt, answers)])
    if isinstance(row, BadRow):
        assert row.kind == "unwritten_part"
        return
    assert row.prompt == ids(tokenizer, rendered(tokenizer, prompt, add_generation_prompt=True))
