"""The accepted forms of preference data, each read into one `Example`.

| form | fields |
| --- | --- |
| raw_pair | `prompt`, `chosen_response`, `rejected_response`: strings |
| pair | `prompt`, `chosen`, `rejected`: strings or message lists |
| conversations | `chosen`, `rejected`: whole message lists; their common prefix is the prompt |
| transcripts | `chosen`, `rejected`: whole `\\n\\nHuman: … \\n\\nAssistant: …` texts |
| demonstration | `prompt`, `completion`: strings or message lists; or `messages`: a conversation |
| implicit_prompt | `chosen`, `rejected`: two texts whose common beginning is the prompt |
| rated | `prompt`, `completion`, `label`: true or false, or 1 or 0 |

`field_forms.py` has those of tools and data sets of the field.

Beside each may stand `tools` (a list, or JSON text of one), `system` (the text of a system turn) and
`chat_template_kwargs` (an object, or JSON text of one). Messages may be JSON text of a list. All other columns are
ignored, and named so.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.field_forms import EXTERNAL_FORMS, detect_external_form
from prefopt_dist.data.fields import (
    TRANSCRIPT_TURN,
    Row,
    field_of,
    is_blank,
    messages_of,
    parse_transcript,
    role_of,
    string_of,
    template_arguments,
    text_of,
    text_or_messages,
    tools_of,
)
from prefopt_dist.errors import UserError

FIRST_ROWS = 64
"""Rows that `auto` looks at."""


class TrackedRow(Mapping[str, Any]):
    """A row that remembers which of its columns were read."""

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
        """The columns that hold something and were not read."""
        return tuple(name for name, value in self._row.items() if value is not None and name not in self._read)


def detect_form(rows: Sequence[Row], key: str) -> str:
    """The form most of the first rows have; on equal counts the one that stands first in `FORMS`.

    Raises UserError with the fields found where no row has the fields of any form.
    """
    votes = Counter(form for form in map(_form_of, rows[:FIRST_ROWS]) if form is not None)
    if not votes:
        found = sorted({name for row in rows[:FIRST_ROWS] for name in row})
        raise UserError(
            f"{key}: the first rows have the fields {found}, which are those of no form; "
            f"rename them to one of: {'; '.join(f'{form}: {fields}' for form, fields in _FIELDS.items())}"
        )
    return max(FORMS, key=lambda form: votes[form])


def _form_of(row: Row) -> str | None:
    """The form the fields say; where two share the fields, their first values decide."""
    has = {name for name, value in row.items() if value is not None}
    named = detect_external_form(row, has)
    if named is not None:
        return named
    if {"prompt", "chosen_response", "rejected_response"} <= has:
        return "raw_pair"
    if {"chosen", "rejected"} <= has:
        chosen = row["chosen"]
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


def read_form(form: str, row: Row, learn: str = "last") -> Example:
    """The row as an `Example`. Raises BadRow where it is not of that form.

    learn: of the conversation in `messages` `all` assistant turns are the response, or the `last`.
    """
    reading = TrackedRow(row)
    columns: Row = reading
    if form in EXTERNAL_FORMS:
        for name in EXTERNAL_FORMS[form].columns:
            field_of(reading, name)
        columns, form = EXTERNAL_FORMS[form].read(reading), EXTERNAL_FORMS[form].becomes
    example = OWN_FORMS[form](columns)
    if learn == "all" and form == "demonstration" and columns.get("messages") is not None:
        example = _from_first_answer(example)
    example = _with_system(example, reading)
    example = replace(example, arguments=template_arguments(reading), ignored=reading.ignored())
    if is_blank(example.prompt):
        raise BadRow("empty_prompt", "the prompt needs a character that is no space", text_of(example.prompt))
    for response in example.responses:
        if is_blank(response):
            rule = "each response needs a character that is no space"
            raise BadRow("empty_response", rule, text_of(response))
    if len(example.responses) == 2 and example.responses[0] == example.responses[1]:
        said = text_of(example.responses[0])
        raise BadRow("identical_responses", "chosen and rejected must differ", said)
    return example


def read_prompt(row: Row) -> Example:
    """The prompt of a row of any form, or of one with `prompt` or a conversation in `messages` alone; no response.

    Raises BadRow where it has none.
    """
    form, given = _form_of(row), row
    if form is not None and form in EXTERNAL_FORMS:
        row, form = EXTERNAL_FORMS[form].read(row), EXTERNAL_FORMS[form].becomes
    if form in ("conversations", "transcripts", "implicit_prompt"):
        prompt = OWN_FORMS[form](row).prompt
    elif row.get("prompt") is not None:
        prompt = text_or_messages(row, "prompt")
    elif row.get("messages") is not None:
        turns = messages_of(row["messages"], "messages")
        prompt = turns[:-1] if turns[-1].role == "assistant" else turns
    else:
        rule = "a row needs a prompt: the field prompt, messages, or chosen and rejected as conversations"
        raise BadRow("missing_field", rule, sorted(row), "name a file of prompts")
    if is_blank(prompt):
        raise BadRow("empty_prompt", "the prompt needs a character that is no space", text_of(prompt))
    example = _with_system(Example(prompt, (), tools=tools_of(row)), given)
    return replace(example, arguments=template_arguments(given))


def kind_of(form: str) -> str:
    """What rows of the form become: `pair`, `demonstration` or `rated`."""
    form = EXTERNAL_FORMS[form].becomes if form in EXTERNAL_FORMS else form
    return form if form in ("demonstration", "rated") else "pair"


def _raw_pair(row: Row) -> Example:
    chosen, rejected = string_of(row, "chosen_response"), string_of(row, "rejected_response")
    return Example(string_of(row, "prompt"), (chosen, rejected), tools=tools_of(row))


def _pair(row: Row) -> Example:
    return _prompted(row, ("chosen", "rejected"), None)


def _rated(row: Row) -> Example:
    label = field_of(row, "label")
    if isinstance(label, str):  # a table of text has no other values
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise BadRow("wrong_type", "label must be true or false, or 1 or 0", label)
    return _prompted(row, ("completion",), bool(label))


def _demonstration(row: Row) -> Example:
    if row.get("messages") is None:
        return _prompted(row, ("completion",), None)
    turns = messages_of(row["messages"], "messages")
    _check_response(turns[-1:], "messages")
    return Example(turns[:-1], (turns[-1:],), tools=tools_of(row))


def _from_first_answer(example: Example) -> Example:
    """The conversation parted at its first answer instead of its last."""
    turns = (*example.prompt, *example.responses[0])
    asked = next((k for k, turn in enumerate(turns) if turn.role == "user"), len(turns))
    first = next(k for k in range(len(turns)) if turns[k].role == "assistant" and (k > asked or k == len(turns) - 1))
    return replace(example, prompt=turns[:first], responses=(turns[first:],))


def _conversations(row: Row) -> Example:
    chosen, rejected = (messages_of(field_of(row, name), name) for name in ("chosen", "rejected"))
    example = _split_common(chosen, rejected, tools_of(row))
    given = row.get("prompt")
    if isinstance(given, str):
        users = [turn.content for turn in example.prompt if isinstance(turn, Message) and turn.role == "user"]
        agrees = given in users
    else:
        agrees = given is None or messages_of(given, "prompt") == example.prompt
    if not agrees:
        raise BadRow("prompts_differ", "the prompt column must be what both conversations begin with", given)
    return example


def _transcripts(row: Row) -> Example:
    chosen, rejected = (parse_transcript(string_of(row, name), name) for name in ("chosen", "rejected"))
    return _split_common(chosen, rejected, tools_of(row))


def _implicit_prompt(row: Row) -> Example:
    """Two texts that begin alike: what both have, up to a white space, is the prompt."""
    chosen, rejected = string_of(row, "chosen"), string_of(row, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if shared == min(len(chosen), len(rejected)) and chosen != rejected:
        raise BadRow("empty_response", "neither text may be the beginning of the other", chosen)
    shared = max((k for k in range(shared) if chosen[k].isspace()), default=0)
    if not chosen[:shared].strip():
        raise BadRow("no_common_prompt", "both texts must begin with the same words", chosen)
    return Example(chosen[:shared], (chosen[shared:], rejected[shared:]), tools=tools_of(row), joined=True)


OWN_FORMS: dict[str, Callable[[Row], Example]] = {
    "raw_pair": _raw_pair,
    "pair": _pair,
    "conversations": _conversations,
    "transcripts": _transcripts,
    "implicit_prompt": _implicit_prompt,
    "rated": _rated,
    "demonstration": _demonstration,
}
"""How each form's columns become an Example; others are turned into these columns first."""
FORMS = (*OWN_FORMS, *EXTERNAL_FORMS)
_FIELDS = {
    "raw_pair": "prompt, chosen_response, rejected_response",
    "pair": "prompt, chosen, rejected",
    "conversations, transcripts or implicit_prompt": "chosen, rejected",
    "rated": "prompt, completion, label",
    "demonstration": "prompt, completion, or messages",
    **{name: ", ".join(form.columns) for name, form in EXTERNAL_FORMS.items()},
}


def _prompted(row: Row, names: tuple[str, ...], label: bool | None) -> Example:
    """A prompt with its responses, each a string or a message list; one list makes all of them messages."""
    prompt, responses = text_or_messages(row, "prompt"), [text_or_messages(row, name) for name in names]
    for name, response in zip(names, responses, strict=True):
        if isinstance(response, tuple) and response:
            _check_response(response, name)
    if isinstance(prompt, str):
        strings = tuple(response for response in responses if isinstance(response, str))
        if len(strings) == len(responses):
            return Example(prompt, strings, label, tools_of(row))
    turns = tuple(_as_messages(response, "assistant") for response in responses)
    return Example(_as_messages(prompt, "user"), turns, label, tools_of(row))


def _as_messages(value: str | Messages, role: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else value


def _split_common(chosen: Messages, rejected: Messages, tools: tuple[Any, ...] | None) -> Example:
    """Prompt := the longest common prefix; what follows are the two responses."""
    if chosen == rejected:
        raise BadRow("identical_responses", "chosen and rejected must differ", chosen[-1].content)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise BadRow("no_common_prompt", "both must begin with the same turn", chosen[0].content)
    for name, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if not rest:
            raise BadRow("empty_response", f"{name} is the beginning of the other and holds no response", "")
        if rest[0].role != "assistant":
            rule = f"{name} must part from the other at an assistant turn, not at a {rest[0].role} turn"
            raise BadRow("prompts_differ", rule, rest[0].content)
        _check_response(rest, name)
    return Example(chosen[:shared], (chosen[shared:], rejected[shared:]), tools=tools)


def _check_response(turns: Messages, name: str) -> None:
    if turns[0].role != "assistant" or turns[-1].role != "assistant":
        wrong = turns[0].role if turns[0].role != "assistant" else turns[-1].role
        raise BadRow(
            "bad_message",
            f"the response in {name} must begin and end with an assistant turn",
            wrong,
            "mend the row, or set data.format=conversations where chosen and rejected are whole",
        )


def _with_system(example: Example, row: Row) -> Example:
    """The example with the text of the column `system` as its first turn."""
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
            rule = "the system column must agree with the system turn that the prompt begins with"
            raise BadRow("two_systems", rule, value, "remove one of them")
        return example
    return replace(example, prompt=(Message("system", value), *example.prompt))
