"""Forms of tools and sets of the field, in rows of our own; none needs a configuration."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from data_for_tests import TOKENIZER, lines, prepare
from places import REPOSITORY

from prefopt_dist.config import DataSource
from prefopt_dist.config.data import Form
from prefopt_dist.data import open_rows
from prefopt_dist.data.example import BadRow
from prefopt_dist.data.external_forms import EXTERNAL_FORMS
from prefopt_dist.data.forms import FORMS, detect_form, read_form, read_prompt
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import read_prompts

Q, GOOD, BAD = "what is the colour of the sky?", "the sky is blue.", "no, green"


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


ASKED = [said("user", Q)]
YES, NO = [said("assistant", GOOD)], [said("assistant", BAD)]
HUMAN = [{"from": "human", "value": Q}]

PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("sharegpt", {"conversations": HUMAN, "chosen": gpt(GOOD), "rejected": gpt(BAD)}),
    ("sharegpt", {"conversations": HUMAN, "chosen": [gpt(GOOD)], "rejected": [gpt(BAD)]}),
    ("messages_pair", {"messages": ASKED, "chosen": YES[0], "rejected": NO[0]}),
    ("messages_pair", {"messages": ASKED, "chosen": GOOD, "rejected": BAD}),
    ("swift", {"messages": [*ASKED, *YES], "rejected_response": BAD}),
    ("swift", {"messages": [*ASKED, *YES], "rejected_response": NO}),
    ("swift_messages", {"messages": [*ASKED, *YES], "rejected_messages": [*ASKED, *NO]}),
    ("swift", {"messages": json.dumps([*ASKED, *YES]), "rejected_response": BAD}),
    ("swift_query", {"query": Q, "response": GOOD, "rejected_response": BAD, "history": []}),
    ("alpaca_pair", {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}),
    ("alpaca_outputs", {"instruction": Q, "input": "", "output": [GOOD, BAD]}),
    ("alpaca_farm", {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2}),
    ("ultrafeedback", {"instruction": Q, "completions": [
        {"response": "green", "overall_score": 4.0}, {"response": GOOD, "overall_score": 7.5},
        {"response": BAD, "overall_score": 2.0}]}),
    ("question_pair", {"question": Q, "chosen": GOOD, "rejected": BAD}),
    ("input_pair", {"input": Q, "chosen": GOOD, "rejected": BAD, "rating": [9.0, 4.0]}),
    ("openai", {"input": {"messages": ASKED, "tools": []}, "preferred_output": YES, "non_preferred_output": NO}),
    ("nemo", {"context": ASKED, "completions": [{"rank": 1, "completion": NO}, {"rank": 0, "completion": YES}]}),
    ("nectar", {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [
        {"answer": BAD, "rank": 3.0}, {"answer": "green", "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]}),
    ("helpsteer2", {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -2}),
    ("helpsteer2", {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 1}),
    ("helpsteer3", {"context": ASKED, "response1": GOOD, "response2": BAD, "overall_preference": -3}),
    ("shp", {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}),
    ("saferlhf", {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1}),
    ("webgpt", {"question": {"full_text": Q}, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5}),
    ("arena", {"conversation_a": [*ASKED, *NO], "conversation_b": [*ASKED, *YES], "winner": "model_b"}),
    ("arena_texts", {"prompt": f'["{Q}"]', "response_a": f'["{GOOD}"]', "response_b": f'["{BAD}"]',
                     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}),
    ("implicit_prompt", {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}),
    ("pair", {"prompt": [said("user", [{"type": "text", "text": Q}])], "chosen": YES[0], "rejected": NO}),
    ("pair", {"prompt": Q, "chosen": json.dumps(YES[0]), "rejected": json.dumps(NO[0])}),
    ("sharegpt", {"conversations": json.dumps(HUMAN), "chosen": json.dumps(gpt(GOOD)),
                  "rejected": json.dumps(gpt(BAD))}),
    ("sharegpt", {"conversations": [{"from": "Human", "value": Q}], "chosen": {"from": "GPT", "value": GOOD},
                  "rejected": gpt(BAD)}),
    ("conversations", {"chosen": json.dumps([*ASKED, *YES]), "rejected": json.dumps([*ASKED, *NO])}),
    ("conversations", {"chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO], "chosen_rating": 5.0, "messages": ASKED}),
    ("pair", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "messages": [*ASKED, *YES]}),
]  # fmt: skip
FRAME = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("form", "row"), PAIRS, ids=[f"{name}-{k}" for k, (name, _) in enumerate(PAIRS)])
def test_pairs_of_the_field(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    assert detect_form([row], "data.format") == form
    path = lines(tmp_path / "r.jsonl", [row])
    for format_ in ("auto", form):
        rows = open_rows(prepare(tmp_path, path, form=format_))
        found = [TOKENIZER.decode(part) for part in (rows.prompt(0), rows.response(0, 0), rows.response(0, 1))]
        assert found == [FRAME, f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]
    asked = read_prompts(
        [DataSource(path)], tokeniser=Tokeniser(read_template(TOKENIZER, "auto"), 512, 256), longest=500,
        on_bad_row="stop", key="k",
    )  # fmt: skip
    assert [p.ids for p in asked.all] == [rows.prompt(0).tolist()]


@pytest.mark.parametrize(
    ("form", "row", "label"),
    [
        ("messages_rated", {"messages": [*ASKED, *NO], "label": False}, 0),
        ("messages_rated", {"messages": [*ASKED, *NO], "label": 1}, 1),
        ("sharegpt_rated", {"conversations": [*HUMAN, gpt(BAD)], "label": True}, 1),
        ("sharegpt_kto_tag", {"conversations": [*HUMAN, gpt(BAD)], "kto_tag": False}, 0),
        ("rated", {"prompt": Q, "completion": BAD, "label": 0}, 0),
        ("sharegpt_messages", {"conversations": [*HUMAN, gpt(BAD)]}, None),
        ("alpaca", {"instruction": Q, "input": "", "output": BAD}, None),
    ],
)
def test_rated_rows_and_demonstrations_of_the_field(
    tmp_path: Path, form: str, row: dict[str, Any], label: int | None
) -> None:
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", [row])))
    assert rows.report.form == form
    assert rows.kind == ("demonstration" if label is None else "rated")
    assert TOKENIZER.decode(rows.prompt(0)) == FRAME
    assert TOKENIZER.decode(rows.response(0, 0)) == f"{BAD}<|im_end|>"
    assert (None if rows.labels is None else rows.labels.tolist()) == (None if label is None else [label])


def test_rated_answers_in_successive_rows_are_joined(tmp_path: Path) -> None:
    """Each row keeps its line; a prompt with one answer, or with equal ratings, has no preference."""
    rated = [
        (Q, BAD, 1),
        (Q, "green", 3),
        (Q, GOOD, 4),
        ("who?", "a", 2),
        ("why?", "a", 2),
        ("why?", "b", 2),
        (Q, BAD, 0),
    ]
    rows = [{"prompt": p, "response": r, "helpfulness": h, "verbosity": 1} for p, r, h in rated]
    path = lines(tmp_path / "r.jsonl", [*rows, {"prompt": "who?", "response": 3, "helpfulness": 4}])
    made = open_rows(prepare(tmp_path, path, on_bad_row="drop"))
    assert made.report.form == "helpsteer2_rated"
    assert [made.origin(i) for i in range(made.n)] == [f"{path}:3"]
    found = [TOKENIZER.decode(part) for part in (made.prompt(0), made.response(0, 0), made.response(0, 1))]
    assert found == [FRAME, f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]
    assert made.report.dropped == {"joined": 3, "tie": 3, "wrong_type": 1}
    assert made.report.ignored == {path: {"verbosity": 1}}


def test_a_key_of_messages_that_is_not_read_is_named(tmp_path: Path) -> None:
    row = {"prompt": [ASKED[0] | {"id": 3}], "chosen": [YES[0] | {"weight": 0, "name": "x", "audio": None}]}
    path = lines(tmp_path / "r.jsonl", [row | {"rejected": BAD}, row | {"rejected": BAD, "note": 1}])
    made = open_rows(prepare(tmp_path, path))
    assert made.report.ignored == {path: {"prompt[].id": 2, "chosen[].weight": 2, "note": 1}}


def test_the_field_reasoning_is_reasoning() -> None:
    """It is the name that some servers give; most templates read another."""
    row = {"prompt": ASKED, "chosen": [YES[0] | {"reasoning": "hm"}], "rejected": NO}
    (turn,) = read_form("pair", row).responses[0]
    assert dict(turn.extra) == {"reasoning_content": "hm", "reasoning": "hm"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": 0},
        {
            "instruction": Q,
            "completions": [{"response": GOOD, "overall_score": 3}, {"response": BAD, "overall_score": 3}],
        },
        {"conversation_a": [*ASKED, *NO], "conversation_b": [*ASKED, *YES], "winner": "tie (bothbad)"},
        {"question": Q, "answer_0": GOOD, "answer_1": BAD, "score_0": 0.0, "score_1": 0.0},
    ],
)
def test_a_tie_is_left_out_and_stops_nothing(tmp_path: Path, row: dict[str, Any]) -> None:
    good = next(other for _, other in PAIRS if other.keys() == row.keys())
    report = open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", [row, good, row]))).report
    assert (report.rows, report.used, report.dropped, report.first_fault) == (3, 1, {"tie": 2}, None)
    prepare(tmp_path, str(tmp_path / "r.jsonl"))  # from the cache too


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"conversations": [{"from": "robot", "value": Q}], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, "bad_message"),
        ({"instruction": Q, "output": [GOOD]}, "wrong_type"),
        ({"instruction": Q, "completions": ["x"]}, "wrong_type"),
        ({"instruction": Q, "completions": [{"response": GOOD}]}, "missing_field"),
        ({"prompt": Q, "answers": [{"answer": GOOD, "rank": "first"}, {"answer": BAD}]}, "missing_field"),
        ({"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": "much"}, "wrong_type"),
        ({"input": 3, "preferred_output": YES, "non_preferred_output": NO}, "wrong_type"),
        ({"messages": YES, "rejected_response": BAD}, "bad_message"),
        ({"messages": [], "label": True}, "bad_message"),
        ({"chosen": "yes it is", "rejected": "no it is not"}, "no_common_prompt"),
        ({"chosen": f"{Q} yes", "rejected": Q}, "empty_response"),
        ({"prompt": [said("user", [{"type": "image"}])], "chosen": GOOD, "rejected": BAD}, "bad_message"),
        ({"prompt": Q, "completion": BAD, "label": 2}, "wrong_type"),
    ],
)
def test_bad_rows_of_the_field(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_form(detect_form([row], "data.format"), row)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("conversations", {"conversations": [*HUMAN, gpt(GOOD)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}),
        ("conversations", {"conversations": [*HUMAN, gpt(GOOD), gpt(BAD)], "label": True}),
        ("messages", {"messages": [*ASKED, *YES], "chosen": YES, "rejected": NO}),
        ("messages", {"messages": [*ASKED, *NO, *YES], "rejected_response": BAD}),
        ("input", {"input": {"messages": [*ASKED, *YES]}, "preferred_output": YES, "non_preferred_output": NO}),
        ("context", {"context": [*ASKED, *YES], "completions": [{"rank": k, "completion": a}
                                                                for k, a in enumerate((YES, NO))]}),
    ],
)  # fmt: skip
def test_a_prompt_must_not_end_with_an_answer(name: str, row: dict[str, Any]) -> None:
    """The answer would stand twice: in the prompt and as the response."""
    with pytest.raises(BadRow, match="answered_prompt") as caught:
        read_form(detect_form([row], "data.format"), row)
    message = caught.value.message("r.jsonl:1")
    assert f"the prompt in {name} must end with a question" in message
    assert "remove this turn if it is the answer" in message
    with pytest.raises(BadRow, match="answered_prompt"):
        read_prompt(row)


def test_a_whole_conversation_may_have_two_answers_in_a_row() -> None:
    row = {"chosen": [*ASKED, *NO, *YES], "rejected": [*ASKED, *NO, *NO]}
    assert [turn.role for turn in read_form("conversations", row).prompt] == ["user", "assistant"]  # type: ignore[union-attr]


def test_turns_before_and_tools() -> None:
    row = {"instruction": "b?", "input": "it", "history": [["a?", "yes"]], "chosen": GOOD, "rejected": BAD}
    prompt = read_form("alpaca_pair", row).prompt
    assert [turn.content for turn in prompt] == ["a?", "yes", "b?\nit"]  # type: ignore[union-attr]
    call = {"name": "look", "arguments": '{"at": "sky"}'}
    turns = [*HUMAN, {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
             {"from": "observation", "value": "blue"}]  # fmt: skip
    made = read_form("sharegpt", {"conversations": turns, "chosen": gpt(GOOD), "rejected": gpt(BAD), "tools": "[]"})
    assert [turn.role for turn in made.prompt] == ["user", "assistant", "tool"]  # type: ignore[union-attr]
    older = read_form(
        "pair", {"prompt": Q, "chosen": [said("assistant", None) | {"function_call": call}], "rejected": BAD}
    )
    for turn in (made.prompt[1], older.responses[0][0]):
        assert dict(turn.extra)["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "sky"}}  # type: ignore[union-attr]


def test_the_configuration_knows_every_form() -> None:
    assert get_args(Form) == ("auto", *FORMS)
    assert {form.becomes for form in EXTERNAL_FORMS.values()} <= set(FORMS)
    with pytest.raises(UserError, match=r"the first rows have the fields \['a'\].*nectar: prompt, answers"):
        detect_form([{"a": 1}], "data.format")


def test_the_page_has_every_form() -> None:
    page = (REPOSITORY / "docs" / "data.md").read_text()
    for name in FORMS:
        assert f"| `{name}` | " in page, name
