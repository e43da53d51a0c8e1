r"""The accepted forms of preference data: detect the form of a row, and read the row into an `Example`.

| form | fields |
| --- | --- |
| raw_pair | `prompt`, `chosen_response`, `rejected_response`: strings |
| pair | `prompt`, `chosen`, `rejected`: strings or message lists; `rejected` may be a list of several |
| conversations | `chosen`, `rejected`: whole message lists; their common prefix is the prompt |
| transcripts | `chosen`, `rejected`: whole `\n\nHuman: … \n\nAssistant: …` texts |
| demonstration | `prompt`, `completion`: strings or message lists; or `messages`: a conversation |
| implicit_prompt | `chosen`, `rejected`: two texts whose common beginning is the prompt |
| rated | `prompt`, `completion`, `label`: true or false, or 1 or 0 |

These are the own forms; `external_forms.py` holds those of other tools and of published data sets.

Each form may also have the columns `tools` (a list, or JSON text of one), `system` (the text of a system turn) and
`chat_template_kwargs` (an object, or JSON text of one). Messages may be JSON text of a list. All other columns are
ignored and reported as ignored.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.external_columns import Lesser
from prefopt_dist.data.external_forms import EXTERNAL_FORMS, detect_external_form
from prefopt_dist.data.fields import (
    TRANSCRIPT_TURN,
    Row,
    field_of,
    ignored_keys,
    is_blank,
    messages_of,
    parsed_messages,
    role_of,
    template_arguments,
    text_of,
    text_or_messages,
    tools_of,
)
from prefopt_dist.data.own_forms import OWN_FORMS, read_answers
from prefopt_dist.errors import UserError

FIRST_ROWS = 64
"""Number of rows from which `data.format: auto` detects the form."""
FORMS = (*OWN_FORMS, *EXTERNAL_FORMS)
_FIELDS_OF_FORMS = {
    "raw_pair": "prompt, chosen_response, rejected_response",
    "pair": "prompt, chosen, rejected",
    "conversations, transcripts or implicit_prompt": "chosen, rejected",
    "rated": "prompt, completion, label",
    "demonstration": "prompt, completion, or messages",
    **{name: ", ".join(form.columns) for name, form in EXTERNAL_FORMS.items()},
}


class TrackedRow(Mapping[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def ignored(self) -> tuple[str, ...]:
        """Return the columns that hold a value and were not read, and the keys of messages that are never read."""
        columns = [name for name, value in self._row.items() if value is not None and name not in self._read]
        keys = [key for name in self._row if name in self._read for key in ignored_keys(name, self._row[name])]
        return tuple(dict.fromkeys(columns + keys))


def detect_form(rows: Sequence[Row], key: str) -> str:
    """Return the most frequent form among the first rows; on equal counts the first one in `FORMS`.

    Args:
        rows: Rows of a source; the first `FIRST_ROWS` of them count.
        key: The key and the source, for messages.

    Raises:
        UserError: No row has the fields of any form; the message lists the fields found, and says how to name them.
    """
    votes = Counter(form for form in map(_form_of, rows[:FIRST_ROWS]) if form is not None)
    if not votes:
        found = sorted({name for row in rows[:FIRST_ROWS] for name in row})
        raise UserError(
            f"{key}: the first rows have the fields {found}, which do not match any form; {_remedy(found)} "
            f"(docs/data.md); the forms are: "
            f"{'; '.join(f'{form}: {fields}' for form, fields in _FIELDS_OF_FORMS.items())}"
        )
    return max(FORMS, key=lambda form: votes[form])


def _remedy(found: Sequence[str]) -> str:
    """Return what to do about rows of no form; rows of prompts alone have nothing to rename."""
    if "prompt" in found and not {"chosen", "rejected", "completion", "responses"} & set(found):
        return (
            "where they are prompts without responses, let `generate` or `rounds` answer them (generate.prompts) and "
            "name a file of pairs here, else say with data.columns which columns hold the responses, "
            "such as {chosen: good, rejected: bad}"
        )
    return "name them with data.columns, such as {prompt: question, chosen: good, rejected: bad}, or rename them"


def _form_of(row: Row) -> str | None:
    """Return the form that the row's fields match; where two forms have the same fields, their values decide."""
    has = {name for name, value in row.items() if value is not None}
    named = detect_external_form(row, has)
    if named is not None:
        return named
    if {"prompt", "chosen_response", "rejected_response"} <= has:
        return "raw_pair"
    if {"chosen", "rejected"} <= has:
        chosen = parsed_messages(row["chosen"])
        whole = isinstance(chosen, list) and bool(chosen) and role_of(chosen[0]) != "assistant"
        if "prompt" in has:
            # A conversation that repeats the prompt is not a response to it.
            return "conversations" if whole else "pair"
        if isinstance(chosen, list):
            return "conversations"
        return "transcripts" if not isinstance(chosen, str) or TRANSCRIPT_TURN.match(chosen) else "implicit_prompt"
    if {"prompt", "completion"} <= has:
        return "rated" if "label" in has else "demonstration"
    return "demonstration" if "messages" in has else None


def read_form(form: str, row: Row, learn: str = "last", *, ranked: bool = False) -> Example:
    """Return the row as an `Example`.

    Args:
        form: One of `FORMS`.
        row: The row.
        learn: For a conversation in `messages`, which assistant turns are the response: `all` or the `last`.
        ranked: Whether all answers are kept, with scores; otherwise the best and the last one are the pair.

    Raises:
        BadRow: The row does not have this form, a text is blank, or the two responses are identical.
    """
    reading, given = TrackedRow(row), form
    columns: Row = reading
    if form in EXTERNAL_FORMS:
        for name in EXTERNAL_FORMS[form].columns:
            field_of(reading, name)
        columns, form = EXTERNAL_FORMS[form].read(reading), EXTERNAL_FORMS[form].becomes
    example = _ranked_or_pair(form, columns, ranked=ranked)
    _check_prompt_end(example.prompt, form, given)
    if learn == "all" and form == "demonstration" and columns.get("messages") is not None:
        example = _from_first_answer(example)
    example = _with_system(example, reading)
    example = replace(example, arguments=template_arguments(reading), ignored=reading.ignored())
    if is_blank(example.prompt):
        raise BadRow("empty_prompt", "the prompt needs a character that is not white space", text_of(example.prompt))
    for response in example.responses:
        if is_blank(response):
            rule = "each response needs a character that is not white space"
            raise BadRow("empty_response", rule, text_of(response))
    if len(example.responses) == 2 and example.responses[0] == example.responses[1]:
        raise BadRow("identical_responses", "chosen and rejected must differ", text_of(example.responses[0]))
    return example if example.scores is None else _without_repeats(example, example.scores)


def _ranked_or_pair(form: str, columns: Row, *, ranked: bool) -> Example:
    """Return the columns of an own form as an example, of several answers with all or with the best and the last one.

    Args:
        form: The own form.
        columns: Its columns.
        ranked: Whether pairs are read as ranked rows.

    Raises:
        BadRow: The columns do not have the form, or have several rejected answers of equal rank for a pair.
    """
    rejected = columns.get("rejected") if form == "pair" else None
    if not _are_several(rejected):
        example = OWN_FORMS[form](columns)
        return replace(example, scores=(1.0, 0.0)) if ranked and len(example.responses) == 2 else example
    answers = [field_of(columns, "chosen"), *rejected]
    if not ranked:
        if not isinstance(rejected, Lesser):  # none of them is the worst
            remedy = "give one, or set loss.name to plackett_luce or all_pairs, which take several"
            raise BadRow("bad_message", "rejected must be one answer for a loss on pairs", rejected, remedy)
        return read_answers(columns, [answers[0], answers[-1]])
    scores = rejected.scores if isinstance(rejected, Lesser) else (1.0, *([0.0] * len(rejected)))
    return replace(read_answers(columns, answers), scores=scores)


def _are_several(rejected: Any) -> TypeGuard[list[Any]]:
    """Return whether a value is a list of answers, not one answer as a string or a list of messages."""
    if isinstance(rejected, Lesser) or not isinstance(rejected, list) or not rejected:
        return isinstance(rejected, Lesser)
    return any(all(isinstance(answer, of) for answer in rejected) for of in (str, list))


def _without_repeats(example: Example, scores: tuple[float, ...]) -> Example:
    """Return a ranked row with each different response once.

    Raises:
        BadRow: `identical_responses`: the same response has two scores.
    """
    kept: list[int] = []
    given: Sequence[str | Messages] = example.responses
    for k, response in enumerate(given):
        first = next((j for j in kept if given[j] == response), None)
        if first is None:
            kept.append(k)
        elif scores[first] != scores[k]:
            raise BadRow("identical_responses", "the same response must have one score", text_of(response))
    responses: Any = tuple(given[k] for k in kept)
    return replace(example, responses=responses, scores=tuple(scores[k] for k in kept))


def read_prompt(row: Row) -> Example:
    """Return an `Example` with the row's prompt and without responses.

    The row has any of the forms, or only `prompt`, or only a conversation in `messages`.

    Raises:
        BadRow: The row has no prompt, or a blank one.
    """
    form, given = _form_of(row), row
    given_form = form
    if form is not None and form in EXTERNAL_FORMS:
        # A ranked row names its prompt as a pair does, and has one even where its responses are equally good.
        row, form = row if form == "ranked" else EXTERNAL_FORMS[form].read(row), EXTERNAL_FORMS[form].becomes
    if form in ("conversations", "transcripts", "implicit_prompt"):
        prompt = OWN_FORMS[form](row).prompt
    elif row.get("prompt") is not None:
        prompt = text_or_messages(row, "prompt")
        _check_prompt_end(prompt, form, given_form)
    elif row.get("messages") is not None:
        turns = messages_of(row["messages"], "messages")
        prompt = turns[:-1] if turns[-1].role == "assistant" else turns
    else:
        rule = "a row needs a prompt: the field prompt, messages, or chosen and rejected as conversations"
        raise BadRow("missing_field", rule, sorted(row), "name a file of prompts")
    if is_blank(prompt):
        raise BadRow("empty_prompt", "the prompt needs a character that is not white space", text_of(prompt))
    example = _with_system(Example(prompt, (), tools=tools_of(row)), given)
    return replace(example, arguments=template_arguments(given))


def kind_of(form: str) -> str:
    """Return the kind of rows that the form has: `pair`, `demonstration` or `rated`."""
    form = EXTERNAL_FORMS[form].becomes if form in EXTERNAL_FORMS else form
    return form if form in ("demonstration", "rated") else "pair"


def _check_prompt_end(prompt: str | Messages, form: str | None, given: str | None) -> None:
    """Check that messages given apart from the response do not end with an answer already.

    A conversation that is split into prompt and response is as its turns are: two answers may follow each other in it.

    Args:
        prompt: The prompt that was read.
        form: The own form that it was read from; None: a row with a prompt alone.
        given: The form of the row.

    Raises:
        BadRow: `answered_prompt`.
    """
    if form not in ("pair", "rated") or isinstance(prompt, str) or not prompt or prompt[-1].role != "assistant":
        return
    name = EXTERNAL_FORMS[given].columns[0] if given is not None and given in EXTERNAL_FORMS else "prompt"
    rule = f"the prompt in {name} must end with a question or a tool's result, not with an assistant turn"
    remedy = "remove this turn if it is the answer, which belongs to the responses"
    raise BadRow("answered_prompt", rule, prompt[-1].content, remedy)


def _from_first_answer(example: Example) -> Example:
    """Return the example with its conversation split at the first answer instead of the last one."""
    turns = (*example.prompt, *example.responses[0])
    user = next((k for k, turn in enumerate(turns) if turn.role == "user"), len(turns))
    first = next(k for k in range(len(turns)) if turns[k].role == "assistant" and (k > user or k == len(turns) - 1))
    return replace(example, prompt=turns[:first], responses=(turns[first:],))


def _with_system(example: Example, row: Row) -> Example:
    """Return the example with the text of the column `system` as its first turn."""
    value = row.get("system")
    if value is None or value == "":
        return example
    if not isinstance(value, str):
        raise BadRow("wrong_type", "system must be a string", value)
    if isinstance(example.prompt, str):
        return replace(example, system=value)
    first = example.prompt[0] if example.prompt else None
    if first is not None and first.role in ("system", "developer"):
        if first.content.strip() != value.strip():
            rule = "the system column must be equal to the system turn at the beginning of the prompt"
            raise BadRow("two_systems", rule, value, "remove one of them")
        return example
    return replace(example, prompt=(Message("system", value), *example.prompt))
