"""Apply the policy of each kind of finding (stop, drop or keep), and explain what the kind means for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.derived import DroppedRows
from prefopt_dist.data.quality.findings import DataFinding
from prefopt_dist.errors import UserError

ADVICE: dict[str, tuple[str, str]] = {
    # Rows that cannot be used, by the kinds of BadRow.
    "not_json": ("the line is not JSON", "write one JSON object per line"),
    "not_utf8": ("the text is not UTF-8", "write the file again as UTF-8"),
    "not_an_object": ("the line is JSON, but not an object", "write one JSON object per line"),
    "blank_line": ("an empty line between rows", "remove it"),
    "missing_field": (
        "a field of the form is missing or null",
        "check the program that wrote the file, or set data.format",
    ),
    "wrong_type": (
        "a value that is not a text (or not a label)",
        "check the program that wrote the file before you convert the value to text",
    ),
    "bad_message": ("a message without a known role or without text", "correct the messages, or set data.format"),
    "bad_transcript": ("a transcript in which Human and Assistant do not alternate", "correct the row"),
    "empty_prompt": ("a response to nothing", "leave the row out"),
    "answered_prompt": (
        "the prompt ends with an answer, so the model would learn to answer twice",
        "leave the answer to chosen and rejected, or to the rated response",
    ),
    "empty_response": (
        "there is nothing to learn, or the model would learn to answer with nothing",
        "find out why a model or a person gave an empty response",
    ),
    "identical_responses": ("no preference, so the loss has no gradient", "leave the row out"),
    "identical_after_cut": (
        "the responses differ only in tokens that are truncated",
        "raise data.max_length, or leave the row out",
    ),
    "prompts_differ": (
        "the two conversations differ before the last response, so they are not a pair",
        "check the program that joined them",
    ),
    "no_common_prompt": (
        "the two conversations have no common beginning, so they are not a pair",
        "check the program that joined them",
    ),
    "prompt_too_long": ("the prompt cannot be truncated to fit", "raise data.max_prompt_length and data.max_length"),
    "nothing_learnt": ("no token that the assistant wrote is left of a response", "raise data.max_length"),
    "doubled_template": (
        "turn markers inside a turn, so the chat template was already applied",
        "remove the markers from the text",
    ),
    "end_token_inside": (
        "an end token before the end of the response",
        "remove the token, or split the turns into messages",
    ),
    "template_refused": ("the chat template rejects these turns", "correct the turns, or use another template"),
    "unstable_template": (
        "the prompt is rendered differently with and without its response, so training and use would differ",
        "use a template that keeps earlier turns unchanged",
    ),
    "joined": (
        "a row whose answer is compared with the others of its prompt, in the prompt's last row",
        "keep: nothing is lost",
    ),
    "tie": ("no answer is preferred, so there is nothing to learn", "nothing to do: such rows are left out"),
    "two_systems": ("a system column beside another system turn", "remove one of them"),
    "no_place_for_system": (
        "a system column beside a prompt that is already rendered",
        "write it into the prompt, or remove the column",
    ),
    "mixed_texts": (
        "some prompts of the source are already rendered, others are plain text",
        "split the two kinds into two sources, or set data.template",
    ),
    "unwritten_part": (
        "the chat template omits a part of the response (text, reasoning or calls), so it would not be learnt",
        "use a tokenizer whose template writes it, or remove it from the row",
    ),
    # Rows that can be used.
    "duplicates": ("the row repeats another one, which counts twice", "drop them, unless the weight is intended"),
    "contradictions": ("two rows prefer opposite responses", "drop them, or decide by a further annotation"),
    "eval_pairs": ("the row is also evaluated, which would measure memory", "drop them from training"),
    "eval_prompts": (
        "evaluation is on prompts that were trained on",
        "drop them, or split by prompt instead of by row",
    ),
    "cut_prompt": (
        "the prompt is truncated, so the model sees only its end",
        "raise data.max_length and data.max_prompt_length",
    ),
    "cut_response": (
        "the response is truncated, so the model does not see how it ends",
        "raise data.max_length, or drop them",
    ),
    "unfair_cut": (
        "the two responses are truncated to different lengths",
        "report it as a bug: this must not happen",
    ),
    "missing_bos": ("templated strings without the beginning-of-sequence token; it was added", "keep: it is repaired"),
    "missing_end": (
        "templated strings without the end-of-turn token; it was added",
        "keep, if the responses are whole",
    ),
    "double_bos": ("two beginning-of-sequence tokens; one was removed", "keep: it is repaired"),
    "double_end": ("an end token that the template writes too; one was removed", "keep: it is repaired"),
    "stray_special": ("special tokens in the text that the template never writes", "remove them from the text"),
    "other_prompt": (
        "a token extends over the end of the prompt, or data.thinking=keep begins the answer otherwise than generation "
        "does, so in use the prompt ends with another token",
        "set data.thinking=empty where the template opens reasoning; otherwise keep them",
    ),
    "lost_reasoning": (
        "the chat template omits the reasoning of earlier turns, as at generation",
        "keep, since generation does the same; or choose a template that keeps it",
    ),
    "lost_prompt": (
        "the chat template omits a part of the prompt: a turn's text, a call, or the tools",
        "choose a template that writes it (data.chat_template), or remove it from the rows",
    ),
    # The data set as a whole.
    "few_rows": (
        "the preferences of few rows are soon memorised",
        "watch eval/loss; train one epoch, with a higher loss.beta",
    ),
    "length_bias": (
        "length alone predicts much of the preference, and will be learnt",
        "balance lengths, or take a loss per token (loss.average=tokens, or loss.name=simpo)",
    ),
    "label_balance": (
        "one label outweighs the other",
        "set loss.desirable_weight and loss.undesirable_weight so that weight × rows is about equal",
    ),
}
"""For each kind of finding, what it means and what to do."""

MAX_REPORTED_KINDS = 5
"""Largest number of kinds of findings in one message."""


def refuse_stops(found: Sequence[DataFinding], policies: Mapping[str, str], key: str) -> None:
    """Raise UserError if there is a finding whose policy is stop.

    Args:
        found: the findings of one data set.
        policies: by the keys of the section inspect.
        key: the data set's dotted key.
    """
    stops = [finding for finding in found if finding.count and policies[finding.policy] == "stop"]
    if stops:
        more = [f"and {len(stops) - MAX_REPORTED_KINDS} further kinds"] if len(stops) > MAX_REPORTED_KINDS else []
        raise UserError("\n  ".join([*(_refusal(finding, key) for finding in stops[:MAX_REPORTED_KINDS]), *more]))


def rows_to_drop(found: Sequence[DataFinding], policies: Mapping[str, str]) -> list[DroppedRows]:
    """Return the rows that are left out, by kind of finding."""
    return [(f.name, f.rows, f.examples) for f in found if f.count and policies[f.policy] == "drop"]


def rows_left(n: int, found: Sequence[DataFinding], policies: Mapping[str, str] | None) -> NDArray[np.bool_]:
    """Return whether each row is kept: bool [n]; policies is None for a set from which no row is left out."""
    kept = np.ones(n, dtype=bool)
    for _, rows, _ in rows_to_drop(found, policies) if policies is not None else ():
        kept[rows] = False
    return kept


def _refusal(finding: DataFinding, key: str) -> str:
    of_set = not len(finding.rows)
    what = finding.examples[0] if of_set else f"{finding.count:,} {finding.name}, the first: {finding.examples[0]}"
    other_policies = "keep" if of_set else "drop or keep"
    meaning, remedy = ADVICE[finding.name]
    return (
        f"inspect.{finding.policy}: got stop, but {key} has {what} ({meaning}); {remedy}; or set "
        f"inspect.{finding.policy} to {other_policies}"
    )
