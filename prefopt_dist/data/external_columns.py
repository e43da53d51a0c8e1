"""Turn rows of external forms (those of other tools and of published data sets) into the columns of our own forms.

Of ranked and rated answers all are kept, best first; for a loss on pairs, `forms.py` then takes the best and the worst
one. A row without a preference is dropped and counted
as `tie`, which is not a fault of the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from prefopt_dist.data.example import BadRow
from prefopt_dist.data.fields import Row, field_of, is_assistant, parsed_messages, role_of

Columns = dict[str, Any]
TURN_ROLES = ("user", "assistant")
TIE_REMEDY = "leave the row as it is: it is dropped, because it states no preference"


def pick(row: Row, first: str, second: str, better: bool | None) -> tuple[Any, Any]:
    """Return (chosen, rejected) from two columns.

    Args:
        row: The row.
        first: The column of one answer.
        second: The column of the other answer.
        better: Whether the first answer is the better one; None: neither is.

    Raises:
        BadRow: `tie`: neither answer is better.
    """
    values = field_of(row, first), field_of(row, second)
    if better is None:
        raise BadRow("tie", "one of the two answers must be the better one", "", TIE_REMEDY)
    return values if better else (values[1], values[0])


def best_and_worst(answers: Sequence[Any], scores: Sequence[Any], name: str) -> tuple[Any, Any]:
    """Return the answers with the highest and the lowest score; of equal scores the first and the last answer.

    Args:
        answers: The answers.
        scores: Their scores; entries that are not numbers are ignored.
        name: The name of the answers in messages.

    Raises:
        BadRow: `missing_field`: no score is a number; `tie`: all scores are equal.
    """
    best, lesser = best_first(answers, scores, name)
    return best, lesser[-1]


class Lesser(list[Any]):
    """All answers of a row but the best one, best first, in the place of a pair's rejected one."""

    def __init__(self, answers: Sequence[Any], scores: Sequence[float]) -> None:
        """Keep the answers.

        Args:
            answers: All but the best one, best first.
            scores: The scores of all answers, the best one's included.
        """
        super().__init__(answers)
        self.scores = tuple(scores)


def best_first(answers: Sequence[Any], scores: Sequence[Any], name: str) -> tuple[Any, Lesser]:
    """Return the best answer and the others in descending order of their scores; equal scores keep their order.

    Args:
        answers: The answers.
        scores: Their scores; answers without a number are left out.
        name: The name of the answers in messages.

    Raises:
        BadRow: `missing_field`: no score is a number; `tie`: all scores are equal.
    """
    rated = [(score, answer) for score, answer in zip(scores, answers, strict=True) if number_of(score) is not None]
    if not rated:
        raise BadRow("missing_field", f"{name} must have scores that are numbers", list(scores))
    ranked = sorted(((float(score), answer) for score, answer in rated), key=lambda pair: -pair[0])
    if ranked[0][0] == ranked[-1][0]:
        raise BadRow("tie", f"{name} must differ in their scores", list(scores), TIE_REMEDY)
    return ranked[0][1], Lesser([answer for _, answer in ranked[1:]], [score for score, _ in ranked])


def number_of(value: Any) -> float | None:
    """Return a score as a number; None where it is not one."""
    if isinstance(value, bool) or value is None:
        return None
    with suppress(ValueError, TypeError, OverflowError):
        found = float(value)
        return None if found != found else found  # NaN cannot be compared
    return None


def preference_by_sign(row: Row, name: str, *, first_is: int) -> bool | None:
    """Return whether a signed preference is for the first of two answers; None: for neither.

    Args:
        row: The row.
        name: The column of the preference.
        first_is: The sign (-1 or 1) of a preference for the first answer.
    """
    value = number_of(field_of(row, name))
    if value is None:
        raise BadRow("wrong_type", f"{name} must be a number", row.get(name))
    return None if value == 0 else (value > 0) == (first_is > 0)


def pair_columns(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Columns:
    """Return the columns of a pair, with further ones in `more`."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def _list(row: Row, name: str, of: type = dict) -> list[Any]:
    """Return the value of a column that must be a list with at least one item of the given type."""
    value = field_of(row, name)
    if not isinstance(value, list) or not value or not all(isinstance(item, of) for item in value):
        raise BadRow("wrong_type", f"{name} must be a list with at least one answer", value)
    return value


def instruction_prompt(row: Row) -> Any:
    """Return the prompt of the columns `instruction`, `input` and `history` (pairs of earlier turns)."""
    question = str(field_of(row, "instruction"))
    further = row.get("input")
    if isinstance(further, str) and further.strip():
        question = f"{question}\n{further}"
    history = row.get("history")
    if not history:
        return question
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("wrong_type", "history must be a list of [question, answer]", history)
    earlier = [{"role": role, "content": text} for turn in history for role, text in zip(TURN_ROLES, turn, strict=True)]
    return [*earlier, {"role": "user", "content": question}]


def read_swift(row: Row) -> Columns:
    """Read a row of ms-swift, whose conversation ends with the chosen answer."""
    messages = parsed_messages(field_of(row, "messages"))
    if row.get("rejected_messages") is not None:
        return {"chosen": messages, "rejected": row["rejected_messages"], "tools": row.get("tools")}
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRow("bad_message", "messages must hold a question and an answer", messages)
    return pair_columns(messages[:-1], messages[-1:], row["rejected_response"], tools=row.get("tools"))


def read_swift_query(row: Row) -> Columns:
    """Read an older row of ms-swift: a question with earlier turns, its answer and a rejected one."""
    prompt = instruction_prompt({"instruction": field_of(row, "query"), "history": row.get("history")})
    return pair_columns(prompt, field_of(row, "response"), row["rejected_response"], tools=row.get("tools"))


def rated_conversation_reader(name: str, label: str) -> Callable[[Row], Columns]:
    """Return a reader of conversations with a rating: the last turn is the rated completion."""

    def read(row: Row) -> Columns:
        turns = parsed_messages(field_of(row, name))
        if not isinstance(turns, list) or len(turns) < 2:
            raise BadRow("bad_message", f"{name} must hold a question and an answer", turns)
        return {
            "prompt": turns[:-1], "completion": turns[-1:], "label": field_of(row, label), "tools": row.get("tools"),
        }  # fmt: skip

    return read


def read_openai(row: Row) -> Columns:
    """Read a row of OpenAI's preference fine-tuning."""
    given = field_of(row, "input")
    if not isinstance(given, dict):
        raise BadRow("wrong_type", "input must be an object with messages", given)
    tools = given.get("tools") or None
    return pair_columns(given.get("messages"), field_of(row, "preferred_output"), field_of(row, "non_preferred_output"),
                 tools=tools)  # fmt: skip


def read_nemo(row: Row) -> Columns:
    """Read a row of NeMo-RL: completions with ranks, where the lowest rank is the best."""
    ranked = _list(row, "completions")
    answers = best_first(
        [one.get("completion") for one in ranked], _negated(one.get("rank") for one in ranked), "completions"
    )
    return pair_columns(field_of(row, "context"), *answers, tools=row.get("tools"))


def read_nectar(row: Row) -> Columns:
    """Read a row of Nectar: answers with ranks, where the lowest rank is the best."""
    ranked = _list(row, "answers")
    answers = best_first([one.get("answer") for one in ranked], _negated(one.get("rank") for one in ranked), "answers")
    return pair_columns(field_of(row, "prompt"), *answers)


def _negated(ranks: Iterable[Any]) -> list[float | None]:
    """Return scores of ranks, of which the lowest is the best; None for one that is not a number."""
    return [None if (rank := number_of(value)) is None else -rank for value in ranks]


def read_ranked(row: Row) -> Columns:
    """Read a row of this package's form for several responses with ranks (1 is the best) or scores."""
    responses = field_of(row, "responses")
    by = "ranks" if row.get("ranks") is not None else "scores"
    numbers = field_of(row, by)
    if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
        raise BadRow("wrong_type", f"responses and {by} must be lists of the same length", numbers)
    answers = best_first(responses, _negated(numbers) if by == "ranks" else numbers, "responses")
    return pair_columns(field_of(row, "prompt"), *answers, tools=row.get("tools"))


def read_helpsteer2_rated(row: Row) -> Columns:
    """Read the joined rows of a prompt of HelpSteer2: answers with ratings of their helpfulness."""
    answers, ratings = _list(row, "response", str), field_of(row, "helpfulness")
    return pair_columns(field_of(row, "prompt"), *best_first(answers, ratings, "response"))


def read_ultrafeedback(row: Row) -> Columns:
    """Read a row of UltraFeedback: completions with overall scores."""
    rated = _list(row, "completions")
    scores = [one.get("overall_score") for one in rated]
    return pair_columns(
        instruction_prompt(row), *best_first([one.get("response") for one in rated], scores, "completions")
    )


def read_webgpt(row: Row) -> Columns:
    """Read a row of WebGPT: two answers with scores."""
    question = field_of(row, "question")
    text = question.get("full_text") if isinstance(question, dict) else question
    scores = [row.get("score_0"), row.get("score_1")]
    return pair_columns(text, *best_and_worst([row.get("answer_0"), row.get("answer_1")], scores, "the two answers"))


def _winner(row: Row) -> bool | None:
    """Return whether model_a won; None: neither model did."""
    value = str(field_of(row, "winner"))
    return {"model_a": True, "model_b": False}.get(value)


def read_arena(row: Row) -> Columns:
    """Read a row of Chatbot Arena: two conversations and the winner."""
    chosen, rejected = pick(row, "conversation_a", "conversation_b", _winner(row))
    return {"chosen": chosen, "rejected": rejected}


def read_arena_texts(row: Row) -> Columns:
    """Read a row of Arena human preference: questions and two lists of answers, each a list or JSON text of one."""
    first, second, _ = (row.get(f"winner_{which}") for which in ("model_a", "model_b", "tie"))  # all count as read
    better = True if first else False if second else None
    chosen, rejected = pick(row, "response_a", "response_b", better)
    questions, good, bad = (_json_list(value) for value in (field_of(row, "prompt"), chosen, rejected))
    if not questions or len(good) != len(questions) or len(bad) != len(questions):
        raise BadRow("wrong_type", "prompt and responses must be lists of the same number of turns", row.get("prompt"))

    def conversation(answers: list[Any]) -> list[dict[str, Any]]:
        pairs = zip(questions, answers, strict=True)
        return [{"role": role, "content": text} for pair in pairs for role, text in zip(TURN_ROLES, pair, strict=True)]

    return {"chosen": conversation(good), "rejected": conversation(bad)}


def _json_list(value: Any) -> list[Any]:
    """Return a list, the list that a JSON text holds, or a list of the single value."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]


def has_list(name: str) -> Callable[[Row], bool]:
    """Return a condition: the column holds a list."""
    return lambda row: isinstance(row[name], list)


def has_text(name: str) -> Callable[[Row], bool]:
    """Return a condition: the column holds a string."""
    return lambda row: isinstance(row[name], str)


def read_alpaca_outputs(row: Row) -> Columns:
    """Read a row whose `output` is the list of the chosen and the rejected answer."""
    outputs = _list(row, "output", str)
    if len(outputs) != 2:
        raise BadRow("wrong_type", "output must hold the chosen and the rejected answer", outputs)
    return pair_columns(instruction_prompt(row), *outputs)


def has_only_answers(row: Row) -> bool:
    """Return whether `chosen` and `rejected` are answers and not whole conversations."""
    chosen = parsed_messages(row["chosen"])
    return not isinstance(chosen, list) or not chosen or is_assistant(role_of(chosen[0]))


def pair_reader(prompt: str) -> Callable[[Row], Columns]:
    """Return a reader of `chosen` and `rejected` answers to the prompt in the given column."""

    def read(row: Row) -> Columns:
        return pair_columns(
            field_of(row, prompt), field_of(row, "chosen"), field_of(row, "rejected"), tools=row.get("tools")
        )

    return read


def two_answers_reader(
    prompt: str, first: str, second: str, better: Callable[[Row], bool | None]
) -> Callable[[Row], Columns]:
    """Return a reader of two answers to a prompt; `better` says whether the first one is the better one."""

    def read(row: Row) -> Columns:
        return pair_columns(field_of(row, prompt), *pick(row, first, second, better(row)))

    return read


def preference_by_value(name: str, first: Any, second: Any) -> Callable[[Row], bool | None]:
    """Return a function that compares a column with the values that prefer the first or the second answer."""

    def better(row: Row) -> bool | None:
        value = field_of(row, name)
        return True if value == first else False if value == second else None

    return better


def read_alpaca_farm(row: Row) -> Columns:
    """Read a row of AlpacaFarm: two outputs and the number (1 or 2) of the preferred one."""
    return pair_columns(
        instruction_prompt(row), *pick(row, "output_1", "output_2", preference_by_value("preference", 1, 2)(row))
    )
