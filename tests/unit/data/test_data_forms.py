"""Every accepted form, and every kind of bad row that reading a form finds."""

from typing import Any

import pytest

from prefopt_dist.data.example import BadRow, Message
from prefopt_dist.data.forms import detect_form, kind_of, read_form
from prefopt_dist.errors import UserError


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, YES, NO = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
M_USER, M_YES, M_NO = Message("user", "q"), Message("assistant", "yes"), Message("assistant", "no")


@pytest.mark.parametrize(
    ("row", "form", "prompt", "responses"),
    [
        (
            {"prompt": "q", "chosen_response": "yes", "rejected_response": "no"},
            "raw_pair",
            "q",
            ("yes", "no"),
        ),
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "pair", "q", ("yes", "no")),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, "pair", (M_USER,), ((M_YES,), (M_NO,))),
        ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, "pair", (M_USER,), ((M_YES,), (M_NO,))),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, "pair", (M_USER,), ((M_YES,), (M_NO,))),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, "conversations", (M_USER,), ((M_YES,), (M_NO,))),
        (
            {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},
            "conversations",
            (M_USER,),
            ((M_YES,), (M_NO,)),
        ),
        (
            {"chosen": [USER, YES, USER, YES], "rejected": [USER, NO]},
            "conversations",
            (M_USER,),
            ((M_YES, M_USER, M_YES), (M_NO,)),
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
            },
            "transcripts",
            (Message("user", "a"), Message("assistant", "b"), Message("user", "c")),
            ((M_YES,), (M_NO,)),
        ),
        ({"prompt": "q", "completion": "yes"}, "demonstration", "q", ("yes",)),
        ({"messages": [USER, NO, USER, YES]}, "demonstration", (M_USER, M_NO, M_USER), ((M_YES,),)),
        ({"prompt": "q", "completion": "yes", "label": False}, "rated", "q", ("yes",)),
        ({"prompt": [USER], "completion": [YES], "label": True}, "rated", (M_USER,), ((M_YES,),)),
    ],
)
def test_form_is_detected_and_read(row: dict[str, Any], form: str, prompt: Any, responses: Any) -> None:
    assert detect_form([row], "data.format") == form
    example = read_form(form, row)
    assert (example.prompt, example.responses, example.label) == (prompt, responses, row.get("label"))


PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
LATER = turn("user", "again")


@pytest.mark.parametrize(
    ("form", "row", "kind"),
    [
        ("raw_pair", {"prompt": "q", "chosen_response": "yes"}, "missing_field"),
        ("raw_pair", {"prompt": "q", "chosen_response": True, "rejected_response": "no"}, "wrong_type"),
        ("raw_pair", {"prompt": "q", "chosen_response": [YES], "rejected_response": "no"}, "wrong_type"),
        ("pair", PAIR | {"chosen": 7}, "wrong_type"),
        ("pair", PAIR | {"chosen": None}, "missing_field"),
        ("pair", PAIR | {"prompt": " \n"}, "empty_prompt"),
        ("pair", PAIR | {"prompt": [turn("user", " ")]}, "empty_prompt"),
        ("pair", PAIR | {"prompt": []}, "empty_prompt"),
        ("pair", PAIR | {"prompt": [USER, YES]}, "answered_prompt"),
        ("pair", PAIR | {"prompt": [USER, YES], "system": "be kind"}, "answered_prompt"),
        ("pair", PAIR | {"rejected": "\t"}, "empty_response"),
        ("pair", PAIR | {"rejected": []}, "empty_response"),
        ("pair", PAIR | {"rejected": [turn("assistant", "")]}, "empty_response"),
        ("pair", PAIR | {"rejected": "yes"}, "identical_responses"),
        ("pair", PAIR | {"rejected": [YES]}, "identical_responses"),
        ("pair", PAIR | {"rejected": [USER, NO]}, "bad_message"),
        ("pair", PAIR | {"rejected": [turn("robot", "no")]}, "bad_message"),
        ("pair", PAIR | {"rejected": [turn("assistant", 3)]}, "bad_message"),
        ("pair", PAIR | {"rejected": ["no"]}, "bad_message"),
        ("pair", PAIR | {"tools": 5}, "wrong_type"),
        ("pair", PAIR | {"tools": "[oops"}, "wrong_type"),
        ("conversations", {"chosen": [USER, YES], "rejected": [LATER, NO]}, "no_common_prompt"),
        ("conversations", {"chosen": [YES], "rejected": [NO]}, "no_common_prompt"),
        ("conversations", {"chosen": [USER, YES], "rejected": [USER, YES]}, "identical_responses"),
        ("conversations", {"chosen": [USER, YES], "rejected": [USER, YES, LATER, NO]}, "empty_response"),
        (
            "conversations",
            {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, LATER, NO]},
            "prompts_differ",
        ),
        ("conversations", {"chosen": [USER, YES], "rejected": [USER, NO], "prompt": "x"}, "prompts_differ"),
        ("conversations", {"chosen": [USER, YES], "rejected": [USER, NO, LATER]}, "bad_message"),
        ("conversations", {"chosen": "yes", "rejected": [USER, NO]}, "wrong_type"),
        ("transcripts", {"chosen": "Human: a", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "bad_transcript"),
        (
            "transcripts",
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "bad_transcript",
        ),
        ("transcripts", {"chosen": [USER], "rejected": "\n\nHuman: a\n\nAssistant: b"}, "wrong_type"),
        ("demonstration", {"messages": [YES]}, "empty_prompt"),
        ("demonstration", {"messages": [USER]}, "bad_message"),
        ("demonstration", {"prompt": "q"}, "missing_field"),
        ("rated", {"prompt": "q", "completion": "yes", "label": 2}, "wrong_type"),
        ("rated", {"prompt": "q", "completion": "yes"}, "missing_field"),
        ("rated", {"prompt": [USER, YES], "completion": [NO], "label": True}, "answered_prompt"),
    ],
)
def test_bad_rows(form: str, row: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_form(form, row)
    assert caught.value.kind == kind
    assert len(caught.value.shown) <= 80


def test_tools_may_be_json_text_and_tool_calls_need_no_text() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f"}],
        "id": "other keys are no part",
    }
    example = read_form("pair", PAIR | {"chosen": [call], "tools": '[{"name": "f"}]'})
    assert example.tools == ({"name": "f"},)
    assert example.responses[0] == (Message("assistant", "", (("tool_calls", [{"name": "f"}]),)),)


def test_most_of_the_first_rows_decide_the_form() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert detect_form([{"prompt": "q", "completion": "a"}, pair, pair], "data.format") == "pair"
    with pytest.raises(UserError, match=r"data\.format.*'answer'.*raw_pair: prompt, chosen_response"):
        detect_form([{"question": "q", "answer": "a"}], "data.format")


def test_columns_of_no_form_are_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"'question'\].*name them with data\.columns.*chosen: good.*data\.md"):
        detect_form([{"question": "q", "answer": "a"}], "data.format")
    with pytest.raises(UserError, match=r"\['id', 'prompt'\].*prompts without responses.*generate\.prompts.*data\.c"):
        detect_form([{"prompt": "q", "id": 3}], "data.format")


def test_kinds() -> None:
    assert [kind_of(form) for form in ("raw_pair", "transcripts", "demonstration", "rated")] == [
        "pair",
        "pair",
        "demonstration",
        "rated",
    ]
