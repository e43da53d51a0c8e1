"""Tokenise examples: find the boundary between prompt and response, and truncate to the limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.example import BadRow, Example, Messages
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions
from prefopt_dist.data.rendered_text import Span
from prefopt_dist.data.rendering import RenderedExample, render_example
from prefopt_dist.data.template import Template

TAIL_TOKENS = 12
"""Number of tokens of a prompt's end that a message shows."""
Ids = list[int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenisedRow:
    """One row as token ids. The prompt and each response have at least one token."""

    prompt: Ids
    responses: tuple[Ids, ...]
    label: bool | None
    cut: frozenset[str]
    """The parts that truncation shortened: `prompt`, `response`"""
    repaired: frozenset[str]
    """Kinds of repairs: `double_bos`, `double_end`, `system_merged`, `system_dropped`"""
    as_is: bool
    """The prompt was templated already, or `data.template` is none"""
    noticed: frozenset[str] = frozenset()
    """`missing_bos`, `missing_end`: added to templated strings that lack them; `stray_special`: a special token that
    the template does not write; `lost_reasoning`, `lost_prompt`: the template leaves out reasoning, or another part, of
    the prompt; `other_prompt`: at inference the prompt's last tokens differ, because one of them reaches into the
    response, or because the finished conversation is kept (`data.thinking=keep`) and begins otherwise"""
    learnt: tuple[list[bool] | None, ...] = ()
    """For each response, which of its tokens are scored and learnt; None, or no entry: all of them"""
    ends: tuple[str, str] | None = None
    """The end of the prompt at inference and in training, where they differ (`other_prompt`)"""
    cut_responses: frozenset[int] = frozenset()
    """Indices of the responses that truncation shortened"""
    weight: float = 1.0
    margin: float = 0.0
    scores: tuple[float, ...] | None = None
    """The score of each response of a ranked row, not ascending"""

    def learnt_of(self, k: int) -> list[bool] | None:
        """Return which tokens of response k are scored and learnt; None: all of them."""
        return self.learnt[k] if self.learnt else None

    @property
    def flags(self) -> set[str]:
        """Return the row's names of `dataset.FLAGS`; a ranked row's responses but the best have one in common."""
        names = {*self.repaired, *self.noticed, *(f"cut_response_{min(k, 1)}" for k in self.cut_responses)}
        return names | {name for name, holds in (("cut_prompt", "prompt" in self.cut), ("as_is", self.as_is)) if holds}


@dataclass(frozen=True)
class Tokeniser:
    """Turns examples into token ids under one template and one pair of limits."""

    template: Template
    max_length: int
    """Maximal number of tokens of prompt + longer response"""
    max_prompt_length: int
    """Number of tokens that a prompt keeps where prompt + longer response exceeds `max_length`"""
    options: TextOptions = DEFAULT_OPTIONS
    """The options for reading rows"""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the template."""
        return self.template.tokenizer

    def encode(self, examples: Sequence[Example]) -> list[TokenisedRow | BadRow]:
        """Tokenise the examples with one call of the tokenizer; return one entry per example, in order."""
        rendered = self._rendered(examples)
        whole = iter(self._rows([item for item in rendered if isinstance(item, RenderedExample)]))
        rows = [item if isinstance(item, BadRow) else next(whole) for item in rendered]
        return [
            row if isinstance(row, BadRow) else _catch_bad_row(lambda e=example, r=row: self._truncate(e, r))  # type: ignore[misc]
            for example, row in zip(examples, rows, strict=True)
        ]

    def encode_prompts(self, examples: Sequence[Example]) -> list[Ids | BadRow]:
        """Return the ids of each example's prompt as generation uses it, without truncation.

        The content of the responses is not used, but the template needs one response in each example.
        """
        rendered = self._rendered(examples)
        ids = iter(self._ids([item.prompt for item in rendered if isinstance(item, RenderedExample)]))
        return [item if isinstance(item, BadRow) else self._with_bos(next(ids), item.plain)[0] for item in rendered]

    def _rendered(self, examples: Sequence[Example]) -> list[RenderedExample | BadRow]:
        return [_catch_bad_row(lambda e=example: render_example(self.template, e)) for example in examples]  # type: ignore[misc]

    def _rows(self, rendered: Sequence[RenderedExample]) -> list[TokenisedRow | BadRow]:
        """Return the rows as token ids before truncation."""
        texts = [text for item in rendered for text in (item.prompt, *item.texts)]
        ids = iter(self._ids(texts))
        rows: list[TokenisedRow | BadRow] = []
        for item in rendered:
            prompt, fulls = next(ids), [next(ids) for _ in item.texts]
            rows.append(_catch_bad_row(lambda i=item, p=prompt, f=fulls: self._split(i, p, f)))  # type: ignore[misc]
        return rows

    def _split(self, rendered: RenderedExample, prompt: Ids, fulls: list[Ids]) -> TokenisedRow:
        """Split each full sequence at the end of the prompt, between two tokens.

        Args:
            rendered: The texts.
            prompt: The ids of the prompt alone.
            fulls: The ids of each of the rendered texts.
        """
        boundary = len(prompt)
        at_inference = prompt
        if rendered.generation_prompt is not None:
            (at_inference,) = self._ids([rendered.generation_prompt])
        if rendered.exact and any(full[:boundary] != prompt for full in fulls):
            rests = self._ids([text[len(rendered.prompt) :] for text in rendered.texts])
            fulls = [prompt + rest for rest in rests]
        if any(full[:boundary] != prompt for full in fulls):
            # A token reaches over the end of the prompt. It belongs to the response, and so does
            # everything after the tokens that all full sequences share.
            within = [self._tokens_within(text, len(rendered.prompt)) for text in rendered.texts]
            boundary = _common_prefix_length([full[:n] for full, n in zip(fulls, within, strict=True)])
            prompt = fulls[0][:boundary]
        responses = []
        for full in fulls:
            response = full[boundary:]
            if not response or response[-1] not in rendered.end_ids:
                response.append(rendered.end_id)
            responses.append(response)
        given = prompt
        prompt, doubled = self._with_bos(prompt, rendered.plain)
        if not prompt:
            raise BadRow("empty_prompt", "the prompt must have at least one token of its own", rendered.prompt)
        masks = tuple(
            None if spans is None else self._mask(text, spans, boundary, len(response))
            for text, spans, response in zip(
                rendered.texts, rendered.learnt or [None] * len(fulls), responses, strict=True
            )
        )
        if _learnt_tokens_equal(responses, masks):
            rule = "the tokens that the assistant wrote in chosen and rejected must differ"
            raise BadRow("identical_responses", rule, rendered.texts[0][len(rendered.prompt) :])
        repaired = rendered.repaired | ({"double_bos"} if doubled else frozenset())
        stray = self.template.stray_ids
        noticed = {
            "missing_bos": rendered.templated and self.template.writes_bos and len(prompt) > len(given),
            "missing_end": rendered.missing_end,
            "lost_reasoning": rendered.lost_reasoning,
            "lost_prompt": rendered.lost_prompt,
            "other_prompt": given != at_inference and not rendered.as_is,
            "stray_special": not (
                stray.isdisjoint(prompt) and all(stray.isdisjoint(response[:-1]) for response in responses)
            ),
        }
        kinds = frozenset(name for name, holds in noticed.items() if holds)
        ends = (self._tail(at_inference), self._tail(given)) if noticed["other_prompt"] else None
        return TokenisedRow(
            prompt, tuple(responses), None, frozenset(), repaired, rendered.as_is, kinds, masks, ends=ends
        )

    def _tail(self, prompt: Ids) -> str:
        text: str = self.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False)
        return f"…{text}" if len(prompt) > TAIL_TOKENS else text

    def _mask(self, text: str, spans: Sequence[Span], boundary: int, length: int) -> list[bool]:
        """Return which tokens after the boundary overlap a span [length]; an appended end token is learnt."""
        mask = [
            any(begin < max(stop, start + 1) and start < end for begin, end in spans)
            for start, stop in self._offsets(text)[boundary:]
        ]
        return mask + [True] * (length - len(mask))

    def _with_bos(self, prompt: Ids, plain: bool) -> tuple[Ids, bool]:
        """Return the prompt with at most one beginning-of-sequence token, and whether there were more.

        A missing one is added where the tokenizer adds it to plain strings (`plain`), or where the template writes it
        before turns (otherwise).
        """
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return prompt, False
        leading = next((i for i, token in enumerate(prompt) if token != bos), len(prompt))
        if leading > 1:
            return prompt[leading - 1 :], True
        if leading == 0 and (self.template.plain_starts_with_bos if plain else self.template.writes_bos):
            return [bos, *prompt], False
        return prompt, False

    def _truncate(self, example: Example, row: TokenisedRow) -> TokenisedRow:
        """Truncate the prompt first, then all responses to the same number of tokens."""
        cut: set[str] = set()
        row = replace(row, scores=example.scores)
        if _scored_twice(row):
            rule = "responses with the same tokens must have the same score"
            raise BadRow("identical_responses", rule, self.tokenizer.decode(row.responses[0][:64]))
        if self._excess(row) > 0 and len(row.prompt) > self.max_prompt_length:
            row = self._truncate_prompt(example, row)
            cut.add("prompt")
        if self._excess(row) > 0:
            budget = self.max_length - len(row.prompt)
            responses = tuple(response[:budget] for response in row.responses)
            masks = tuple(None if mask is None else mask[:budget] for mask in row.learnt)
            if any(mask is not None and not any(mask) for mask in masks):
                rule = f"a token that the assistant wrote must be within data.max_length={self.max_length} tokens"
                raise BadRow("nothing_learnt", rule, f"{budget} tokens left for a response", "raise data.max_length")
            if _learnt_tokens_equal(responses, masks) or _scored_twice(replace(row, responses=responses, learnt=masks)):
                rule = f"the responses must differ within data.max_length={self.max_length} tokens"
                text = self.tokenizer.decode(responses[0][:64])
                raise BadRow("identical_after_cut", rule, text, "raise data.max_length")
            shortened = frozenset(k for k, response in enumerate(row.responses) if len(response) > budget)
            row = replace(row, responses=responses, learnt=masks, cut_responses=shortened)
            cut.add("response")
        return replace(
            row,
            cut=frozenset(cut),
            label=example.label,
            weight=example.weight,
            margin=example.margin,
            scores=example.scores,
        )

    def _excess(self, row: TokenisedRow) -> int:
        return len(row.prompt) + max(map(len, row.responses)) - self.max_length

    def _truncate_prompt(self, example: Example, row: TokenisedRow) -> TokenisedRow:
        keep = self.max_prompt_length
        if row.as_is:
            start = row.prompt[:1] if row.prompt[0] == self.tokenizer.bos_token_id else []
            kept = start + row.prompt[len(row.prompt) - keep + len(start) :]
            return replace(row, prompt=kept)
        if isinstance(example.prompt, str):
            return self._truncate_text(example.prompt, row, lambda text: replace(example, prompt=text))
        turns = example.prompt
        for turns in _later_turns(example.prompt):
            row = self._tokenised(replace(example, prompt=turns))
            if len(row.prompt) <= keep:
                return row
        last = turns[-1] if turns else None
        if last is None or last.role != "user" or any(turn.role == "user" for turn in turns[:-1]):
            raise self._prompt_too_long(row)
        # Only one question is left; it is truncated as a string would be.
        return self._truncate_text(
            last.content, row, lambda text: replace(example, prompt=(*turns[:-1], replace(last, content=text)))
        )

    def _truncate_text(self, text: str, row: TokenisedRow, with_text: Callable[[str], Example]) -> TokenisedRow:
        """Remove tokens from the beginning of one turn's text; what the template writes around it stays.

        Args:
            text: The text of the turn.
            row: The row with the whole text.
            with_text: Returns the example with another text.
        """
        starts = [start for start, _ in self._offsets(text)]
        dropped = 0
        while len(row.prompt) > self.max_prompt_length:
            dropped += len(row.prompt) - self.max_prompt_length
            if dropped >= len(starts) or not text[starts[dropped] :].strip():
                raise self._prompt_too_long(row)
            row = self._tokenised(with_text(text[starts[dropped] :]))
        return row

    def _tokenised(self, example: Example) -> TokenisedRow:
        row = self._rows([render_example(self.template, example)])[0]
        if isinstance(row, BadRow):
            raise row
        return row

    def _prompt_too_long(self, row: TokenisedRow) -> BadRow:
        rule = f"the part of a prompt that cannot be removed must fit data.max_prompt_length={self.max_prompt_length}"
        shown = f"{len(row.prompt)} tokens"
        return BadRow("prompt_too_long", rule, shown, "raise data.max_prompt_length")

    def _tokens_within(self, text: str, end: int) -> int:
        """Return the number of leading tokens of the text that lie before the character `end`."""
        offsets = self._offsets(text)
        return next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(offsets))

    def _ids(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        # The template writes all special tokens; sequences longer than the model's limit are truncated later.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[Ids] = encoded["input_ids"]
        return ids

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return offsets


def _later_turns(turns: Messages) -> list[Messages]:
    """Return the conversation without its first turns, longest first; each begins with a user turn.

    System turns at the beginning stay. Templates require a user turn first, so an answer is removed with its question.
    """
    head = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    return [
        turns[:head] + turns[start:]
        for start in range(head + 1, len(turns))
        if turns[start].role == "user"
    ]  # fmt: skip


def _learnt_tokens_equal(responses: Sequence[Ids], masks: Sequence[list[bool] | None]) -> bool:
    """Return whether there are two responses with equal learnt tokens, so that neither can be preferred."""
    if len(responses) != 2:
        return False
    first, second = (_learnt_tokens(*each) for each in zip(responses, masks or (None, None), strict=True))
    return first == second


def _scored_twice(row: TokenisedRow) -> bool:
    """Return whether two responses of a ranked row have equal learnt tokens and different scores."""
    found: dict[tuple[int, ...], float] = {}
    for k, score in enumerate(row.scores or ()):
        if found.setdefault(tuple(_learnt_tokens(row.responses[k], row.learnt_of(k))), score) != score:
            return True
    return False


def _learnt_tokens(ids: Ids, mask: list[bool] | None) -> Ids:
    return ids if mask is None else [token for token, learnt in zip(ids, mask, strict=True) if learnt]


def _common_prefix_length(sequences: Sequence[Ids]) -> int:
    columns = zip(*sequences, strict=False)
    same = next((i for i, column in enumerate(columns) if len(set(column)) > 1), None)
    return min(map(len, sequences)) if same is None else same


def _catch_bad_row(make: Callable[[], Result]) -> Result | BadRow:
    try:
        return make()
    except BadRow as bad:
        return bad
