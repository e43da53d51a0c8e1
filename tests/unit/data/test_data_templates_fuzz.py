"""Random rows through templates of seven kinds: what a response says is in its text, it ends once, and nothing raises.

The check looks at the decoded tokens alone, without the code that it tests.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from encoding import LONG as LONG_ROW
from fuzzing import LONG, QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_texts import CALLS, SPOKEN, WITH_SYSTEM
from test_data_thinking import DROPS, HIDES, OPENS, WRITES_EMPTY
from tokenizers_for_tests import CHATML, INST, small_tokenizer

from prefopt_dist.data.example import BadRow
from prefopt_dist.data.forms import detect_form, read_form
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser

TEMPLATES = {
    **{"plain turns": CHATML, "a system turn of its own": WITH_SYSTEM, "no system turn": INST, "spoken": SPOKEN},
    **{"calls with another end": CALLS, "opens reasoning": OPENS, "drops reasoning": DROPS},
    **{"writes empty reasoning": WRITES_EMPTY, "hides reasoning": HIDES},
}
TOKENIZERS = {name: small_tokenizer(template) for name, template in TEMPLATES.items()}
ENDS = ("</s>", "<|im_end|>")
WORDS = st.sampled_from(
    [
        *("yes", "the sky is blue", " no ", "", "\n", "Is <think> a token?", "${content}", "<s>", "</think> maybe"),
        *("<think>\nhm\n</think>\n\nyes", "<|im_end|>", "é 🦊", "[INST] a [/INST]", "A: b", "Human: hi"),
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
CALL = st.fixed_dictionaries(
    {"name": st.sampled_from(["find", "add"]), "arguments": st.dictionaries(st.sampled_from(["x", "y"]), st.integers())}
)


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """An assistant turn with text, and sometimes reasoning or calls."""
    turn: dict[str, Any] = {"role": "assistant", "content": draw(TEXTS)}
    if draw(st.integers(0, 4)) == 0:
        turn["reasoning_content"] = draw(TEXTS)
    if draw(st.integers(0, 4)) == 0:
        turn["tool_calls"] = [{"type": "function", "function": draw(CALL)}]
    return turn


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A pair of messages: a system turn at times, one to three exchanges, two answers."""
    prompt = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": "user", "content": draw(TEXTS)}, draw(answers())]
    prompt.append({"role": "user", "content": draw(TEXTS)})
    return {"prompt": prompt, "chosen": [draw(answers())], "rejected": [draw(answers())]}


def parts(turn: dict[str, Any]) -> list[str]:
    """What a turn says, word by word; white space at its ends may go."""
    said = [turn["content"].strip(), turn.get("reasoning_content", "").strip()]
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        said += [function["name"], *(f'"{k}": {v}' for k, v in function["arguments"].items())]
    words = [word for part in said for word in part.replace("<think>", " ").replace("</think>", " ").split()]
    return [word for word in words if word not in ENDS]  # those at the end of a text are the turn's, and counted


def check(name: str, row: dict[str, Any], options: TextOptions) -> bool:
    """Whether the row could be used; a bad one needs a message only."""
    tokenizer = TOKENIZERS[name]
    row = json.loads(json.dumps(row))
    try:
        example = read_form(detect_form([row], "rows"), row, "all")
    except BadRow as bad:
        bad.message("rows:1").encode()
        return False
    tokeniser = Tokeniser(read_template(tokenizer, "auto", options), LONG_ROW, LONG_ROW - 1)
    (found,) = tokeniser.encode([example])
    if isinstance(found, BadRow):
        found.message("rows:1").encode()
        return False
    for which, response in zip(("chosen", "rejected"), found.responses, strict=True):
        text = tokenizer.decode(response)
        for word in parts(row[which][0]):
            assert word in text, (name, word, text)
        said = sum(row[which][0]["content"].count(end) for end in ENDS)
        said += sum(str(row[which][0].get("reasoning_content", "")).count(end) for end in ENDS)
        # Ends that close the row's own text are the turn's, once.
        assert 1 <= sum(text.count(end) for end in ENDS) <= 1 + said, (name, text)
        assert text.rstrip().endswith(ENDS), (name, text)
    return True


def check_many(name: str, how: Any) -> None:
    """Check random rows; most templates can write a part of them, else nothing would have been looked at."""
    used: list[bool] = []

    @how
    @given(
        row=rows(),
        thinking=st.sampled_from([None, "empty", "keep"]),
        system=st.sampled_from(["keep", "merge", "drop"]),
    )
    def each(row: dict[str, Any], thinking: Any, system: Any) -> None:
        used.append(check(name, row, TextOptions(thinking=thinking, system=system)))

    each()
    assert sum(used) >= len(used) / 10, (sum(used), len(used))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_response_says_is_in_its_text(name: str) -> None:
    check_many(name, settings(QUICK, max_examples=60))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_many_rows(name: str) -> None:
    check_many(name, LONG)
