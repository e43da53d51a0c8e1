"""Forms of tools and data sets of the field, each turned into the columns of one of our own.

Ranked and rated answers become the pair of the best and the worst one. A row without a preference is left out and
counted as `tie`: it is no fault of the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prefopt_dist.data.example import BadRow
from prefopt_dist.data.fields import Row, field_of, is_assistant, role_of

Columns = dict[str, Any]


@dataclass(frozen=True)
class ExternalForm:
    """One form of the field."""

    columns: tuple[str, ...]
    """What a row of it has, none of them null"""
    becomes: str
    """The form of ours whose columns `read` gives"""
    read: Callable[[Row], Columns]
    used_by: str
    """Who uses it, for people"""
    fits: Callable[[Row], bool] = lambda row: True
    """Further than by its columns"""
    lacks: tuple[str, ...] = ()
    """Columns with which a row is of another form"""


def detect_external_form(row: Row, has: set[str]) -> str | None:
    """The first form that the row's columns fit; has: those that are not null."""
    return next(
        (
            name
            for name, form in EXTERNAL_FORMS.items()
            if has.issuperset(form.columns) and not has.intersection(form.lacks) and form.fits(row)
        ),
        None,
    )


def pick(row: Row, first: str, second: str, better: bool | None) -> tuple[Any, Any]:
    """(chosen, rejected) of two columns; better: the first one is; None: neither."""
    values = field_of(row, first), field_of(row, second)
    if better is None:
        raise BadRow("tie", "one of the two answers must be the better one", "", "leave it: it says no preference")
    return values if better else (values[1], values[0])


def best_and_worst(answers: Sequence[Any], scores: Sequence[Any], what: str) -> tuple[Any, Any]:
    """The answers of the highest and the lowest score; of equal ones the first and the last."""
    rated = [(score, answer) for score, answer in zip(scores, answers, strict=True) if number_of(score) is not None]
    if not rated:
        raise BadRow("missing_field", f"{what} must have scores that are numbers", list(scores))
    ranked = sorted(rated, key=lambda pair: -float(pair[0]))
    if float(ranked[0][0]) == float(ranked[-1][0]):
        raise BadRow("tie", f"{what} must differ in their scores", list(scores), "leave it: it says no preference")
    return ranked[0][1], ranked[-1][1]


def number_of(value: Any) -> float | None:
    """A score as a number; None: it is none."""
    if isinstance(value, bool) or value is None:
        return None
    with suppress(ValueError, TypeError, OverflowError):
        found = float(value)
        return None if found != found else found  # NaN is no score
    return None


def _sign(row: Row, name: str, *, first_is: int) -> bool | None:
    """Whether a signed preference is for the first of two answers; first_is: the sign that says so."""
    value = number_of(field_of(row, name))
    if value is None:
        raise BadRow("wrong_type", f"{name} must be a number", row.get(name))
    return None if value == 0 else (value > 0) == (first_is > 0)


def _pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Columns:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def _list(row: Row, name: str, of: type = dict) -> list[Any]:
    value = field_of(row, name)
    if not isinstance(value, list) or not value or not all(isinstance(item, of) for item in value):
        raise BadRow("wrong_type", f"{name} must be a list that holds answers", value)
    return value


def _instruction(row: Row) -> Any:
    """Instruction and input, with the earlier turns of a history."""
    asked = str(field_of(row, "instruction"))
    further = row.get("input")
    if isinstance(further, str) and further.strip():
        asked = f"{asked}\n{further}"
    history = row.get("history")
    if not history:
        return asked
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("wrong_type", "history must be a list of [question, answer]", history)
    said = [{"role": role, "content": text} for turn in history for role, text in zip(ROLES, turn, strict=True)]
    return [*said, {"role": "user", "content": asked}]


ROLES = ("user", "assistant")


def _swift(row: Row) -> Columns:
    """ms-swift: the conversation ends with the chosen answer."""
    messages = field_of(row, "messages")
    if row.get("rejected_messages") is not None:
        return {"chosen": messages, "rejected": row["rejected_messages"], "tools": row.get("tools")}
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRow("bad_message", "messages must hold a question and an answer", messages)
    return _pair(messages[:-1], messages[-1:], row["rejected_response"], tools=row.get("tools"))


def _rated_conversation(name: str, label: str) -> Callable[[Row], Columns]:
    def read(row: Row) -> Columns:
        turns = field_of(row, name)
        if not isinstance(turns, list) or len(turns) < 2:
            raise BadRow("bad_message", f"{name} must hold a question and an answer", turns)
        return {
            "prompt": turns[:-1], "completion": turns[-1:], "label": field_of(row, label), "tools": row.get("tools"),
        }  # fmt: skip

    return read


def _openai(row: Row) -> Columns:
    given = field_of(row, "input")
    if not isinstance(given, dict):
        raise BadRow("wrong_type", "input must be an object with messages", given)
    tools = given.get("tools") or None
    return _pair(given.get("messages"), field_of(row, "preferred_output"), field_of(row, "non_preferred_output"),
                 tools=tools)  # fmt: skip


def _nemo(row: Row) -> Columns:
    ranked = _list(row, "completions")
    ranks = [-rank if (rank := number_of(one.get("rank"))) is not None else None for one in ranked]
    best, worst = best_and_worst([one.get("completion") for one in ranked], ranks, "completions")
    return _pair(field_of(row, "context"), best, worst, tools=row.get("tools"))


def _nectar(row: Row) -> Columns:
    ranked = _list(row, "answers")
    ranks = [-rank if (rank := number_of(one.get("rank"))) is not None else None for one in ranked]
    best, worst = best_and_worst([one.get("answer") for one in ranked], ranks, "answers")
    return _pair(field_of(row, "prompt"), best, worst)


def _ultrafeedback(row: Row) -> Columns:
    rated = _list(row, "completions")
    scores = [one.get("overall_score") for one in rated]
    return _pair(_instruction(row), *best_and_worst([one.get("response") for one in rated], scores, "completions"))


def _webgpt(row: Row) -> Columns:
    question = field_of(row, "question")
    text = question.get("full_text") if isinstance(question, dict) else question
    scores = [row.get("score_0"), row.get("score_1")]
    return _pair(text, *best_and_worst([row.get("answer_0"), row.get("answer_1")], scores, "the two answers"))


def _winner(row: Row) -> bool | None:
    value = str(field_of(row, "winner"))
    return {"model_a": True, "model_b": False}.get(value)


def _arena(row: Row) -> Columns:
    chosen, rejected = pick(row, "conversation_a", "conversation_b", _winner(row))
    return {"chosen": chosen, "rejected": rejected}


def _arena_texts(row: Row) -> Columns:
    better = True if row.get("winner_model_a") else False if row.get("winner_model_b") else None
    row.get("winner_tie")  # what it says follows from the other two
    chosen, rejected = pick(row, "response_a", "response_b", better)
    asked, good, bad = (_json_list(value) for value in (field_of(row, "prompt"), chosen, rejected))
    if not asked or len(good) != len(asked) or len(bad) != len(asked):
        raise BadRow("wrong_type", "prompt and responses must be lists of as many turns", row.get("prompt"))

    def talk(answers: list[Any]) -> list[dict[str, Any]]:
        pairs = zip(asked, answers, strict=True)
        return [{"role": role, "content": text} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]

    return {"chosen": talk(good), "rejected": talk(bad)}


def _json_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]


def _is_list(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row[name], list)


def _is_text(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row[name], str)


def _alpaca_outputs(row: Row) -> Columns:
    outputs = _list(row, "output", str)
    if len(outputs) != 2:
        raise BadRow("wrong_type", "output must hold the chosen and the rejected answer", outputs)
    return _pair(_instruction(row), *outputs)


def _answers_alone(row: Row) -> bool:
    """`chosen` and `rejected` are answers, no whole conversations."""
    chosen = row["chosen"]
    return not isinstance(chosen, list) or not chosen or is_assistant(role_of(chosen[0]))


def _kept(prompt: str) -> Callable[[Row], Columns]:
    def read(row: Row) -> Columns:
        return _pair(field_of(row, prompt), field_of(row, "chosen"), field_of(row, "rejected"), tools=row.get("tools"))

    return read


def _two(prompt: str, first: str, second: str, better: Callable[[Row], bool | None]) -> Callable[[Row], Columns]:
    def read(row: Row) -> Columns:
        return _pair(field_of(row, prompt), *pick(row, first, second, better(row)))

    return read


def _one_of(name: str, first: Any, second: Any) -> Callable[[Row], bool | None]:
    def better(row: Row) -> bool | None:
        value = field_of(row, name)
        return True if value == first else False if value == second else None

    return better


def _alpaca_farm(row: Row) -> Columns:
    return _pair(_instruction(row), *pick(row, "output_1", "output_2", _one_of("preference", 1, 2)(row)))


EXTERNAL_FORMS: Mapping[str, ExternalForm] = {
    "sharegpt": ExternalForm(
        ("conversations", "chosen", "rejected"), "pair", _kept("conversations"), "LLaMA-Factory, Axolotl"
    ),
    "sharegpt_rated": ExternalForm(
        ("conversations", "label"), "rated", _rated_conversation("conversations", "label"), "LLaMA-Factory (KTO)"
    ),
    "sharegpt_kto_tag": ExternalForm(
        ("conversations", "kto_tag"), "rated", _rated_conversation("conversations", "kto_tag"), "LLaMA-Factory (KTO)"
    ),
    "sharegpt_messages": ExternalForm(
        ("conversations",), "demonstration", lambda row: {"messages": row["conversations"], "tools": row.get("tools")},
        "Vicuna, FastChat, LLaMA-Factory", lacks=("prompt",),
    ),
    "messages_pair": ExternalForm(
        ("messages", "chosen", "rejected"), "pair", _kept("messages"), "Axolotl (chat_template)", _answers_alone,
        ("prompt",),
    ),
    "swift": ExternalForm(("messages", "rejected_response"), "pair", _swift, "ms-swift"),
    "swift_messages": ExternalForm(("messages", "rejected_messages"), "conversations", _swift, "ms-swift"),
    "messages_rated": ExternalForm(
        ("messages", "label"), "rated", _rated_conversation("messages", "label"), "ms-swift, LLaMA-Factory (KTO)",
        lacks=("prompt", "completion"),
    ),
    "alpaca_pair": ExternalForm(
        ("instruction", "chosen", "rejected"), "pair",
        lambda row: _pair(_instruction(row), field_of(row, "chosen"), field_of(row, "rejected")),
        "LLaMA-Factory (ranking)", _answers_alone, ("prompt",),
    ),
    "alpaca_outputs": ExternalForm(
        ("instruction", "output"), "pair", _alpaca_outputs, "LLaMA-Factory (ranking, older)", _is_list("output")
    ),
    "alpaca_farm": ExternalForm(
        ("instruction", "output_1", "output_2", "preference"), "pair", _alpaca_farm, "AlpacaFarm"
    ),
    "alpaca": ExternalForm(
        ("instruction", "output"), "demonstration",
        lambda row: {"prompt": _instruction(row), "completion": field_of(row, "output")},
        "Alpaca", _is_text("output"), ("prompt",),
    ),
    "ultrafeedback": ExternalForm(
        ("instruction", "completions"), "pair", _ultrafeedback, "UltraFeedback (raw)", _is_list("completions")
    ),
    "question_pair": ExternalForm(
        ("question", "chosen", "rejected"), "pair", _kept("question"), "Intel orca_dpo_pairs", _answers_alone,
        ("prompt",),
    ),
    "openai": ExternalForm(
        ("input", "preferred_output", "non_preferred_output"), "pair", _openai, "OpenAI preference fine-tuning"
    ),
    "nemo": ExternalForm(("context", "completions"), "pair", _nemo, "NeMo-RL"),
    "nectar": ExternalForm(("prompt", "answers"), "pair", _nectar, "Nectar", _is_list("answers")),
    "helpsteer2": ExternalForm(
        ("prompt", "response_1", "response_2", "preference_strength"), "pair",
        _two("prompt", "response_1", "response_2", lambda row: _sign(row, "preference_strength", first_is=-1)),
        "HelpSteer2",
    ),
    "helpsteer3": ExternalForm(
        ("context", "response1", "response2", "overall_preference"), "pair",
        _two("context", "response1", "response2", lambda row: _sign(row, "overall_preference", first_is=-1)),
        "HelpSteer3",
    ),
    "shp": ExternalForm(
        ("history", "human_ref_A", "human_ref_B", "labels"), "pair",
        _two("history", "human_ref_A", "human_ref_B", _one_of("labels", 1, 0)), "SHP",
    ),
    "saferlhf": ExternalForm(
        ("prompt", "response_0", "response_1", "better_response_id"), "pair",
        _two("prompt", "response_0", "response_1", _one_of("better_response_id", 0, 1)), "PKU-SafeRLHF",
    ),
    "webgpt": ExternalForm(("question", "answer_0", "answer_1", "score_0", "score_1"), "pair", _webgpt, "WebGPT"),
    "arena": ExternalForm(
        ("conversation_a", "conversation_b", "winner"), "conversations", _arena, "Chatbot Arena conversations"
    ),
    "arena_texts": ExternalForm(
        ("prompt", "response_a", "response_b", "winner_model_a"), "conversations", _arena_texts,
        "Arena human preference",
    ),
}  # fmt: skip
"""By name, in the order in which a row is tried."""
