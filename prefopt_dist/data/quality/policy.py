"""Apply the policy of each kind of finding (stop, drop, nothing), and say what the kind means for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.derived import DroppedRows
from prefopt_dist.data.quality.findings import DataFinding
from prefopt_dist.errors import UserError

ADVICE: dict[str, tuple[str, str]] = {
    # Rows that cannot be used, as data/ names them.
    "not_json": ("no JSON object stands on the line", "write one JSON object a line"),
    "not_utf8": ("the text is no UTF-8", "write the file again as UTF-8"),
    "not_an_object": ("the line is JSON, but no object", "write one JSON object a line"),
    "blank_line": ("an empty line between rows", "remove it"),
    "missing_field": ("a field of the form is missing or null", "look at what wrote the file, or set data.format"),
    "wrong_type": (
        "a value that is no text (or no label)",
        "look at what wrote the file; do not make text of it blindly",
    ),
    "bad_message": ("a message without a known role or without text", "mend the messages, or set data.format"),
    "bad_transcript": ("a transcript that is not Human and Assistant by turns", "mend the row"),
    "empty_prompt": ("a response to nothing", "leave the row out"),
    "empty_response": (
        "nothing to learn, or the lesson to say nothing",
        "find out why a model or a person said nothing",
    ),
    "identical_responses": ("no preference: the loss has no gradient", "leave the row out"),
    "identical_after_cut": ("the responses differ only beyond the cut", "raise data.max_length, or leave the row out"),
    "prompts_differ": ("the two conversations part before the response", "they are no pair: look at what joined them"),
    "no_common_prompt": (
        "the two conversations have no beginning in common",
        "they are no pair: look at what joined them",
    ),
    "prompt_too_long": ("the prompt cannot be cut to fit", "raise data.max_prompt_length and data.max_length"),
    "nothing_learnt": ("of a response nothing that the assistant wrote is left", "raise data.max_length"),
    "doubled_template": ("turn markers inside a turn: it was templated already", "remove the markers from the text"),
    "end_token_inside": ("the response ends before it ends", "remove the token, or split the turns into messages"),
    "template_refused": ("the chat template does not take these turns", "mend the turns, or use another template"),
    "unstable_template": (
        "the prompt alone is rendered otherwise than before its response, so training and use would differ",
        "use a template that keeps earlier turns as they are",
    ),
    "tie": ("none of the answers is preferred, so the row says nothing", "leave it: such rows are left out"),
    "two_systems": ("a system column beside another system turn", "remove one of them"),
    "no_place_for_system": (
        "a system column beside a prompt that is rendered turns already",
        "write it into the prompt, or remove the column",
    ),
    "mixed_texts": (
        "some prompts of the source are rendered turns, others plain text",
        "part the two kinds into two sources, or set data.template",
    ),
    "unwritten_part": (
        "the chat template leaves out what the response says (text, reasoning or calls), so it would not be learnt",
        "use a tokenizer whose template writes it, or remove it from the row",
    ),
    # Rows that can be used.
    "duplicates": ("the same lesson again: it counts twice", "drop them, unless the weight is meant"),
    "contradictions": ("two rows pull in opposite directions", "drop them, or decide by a further annotation"),
    "eval_pairs": ("evaluation would measure memory", "drop them from training"),
    "eval_prompts": (
        "evaluation is on prompts that were trained on",
        "drop them, or split by prompt instead of by row",
    ),
    "cut_prompt": ("the model sees the end of the prompt only", "raise data.max_length and data.max_prompt_length"),
    "cut_response": ("the model does not see how the response ends", "raise data.max_length, or drop them"),
    "unfair_cut": ("the two responses were cut to different lengths", "report it: this must not happen"),
    "missing_bos": ("templated strings without the beginning-of-sequence token; it was added", "keep: it is repaired"),
    "missing_end": (
        "templated strings without the end-of-turn token; it was added",
        "keep, if the responses are whole",
    ),
    "double_bos": ("two beginning-of-sequence tokens; one was removed", "keep: it is repaired"),
    "double_end": ("an end token that the template writes too; one was removed", "keep: it is repaired"),
    "stray_special": ("special tokens in the text that the template never writes", "remove them from the text"),
    "other_prompt": (
        "a token reaches over the end of the prompt, so in use the prompt ends with another one",
        "set data.thinking=empty where the template opens reasoning; else keep",
    ),
    "lost_reasoning": (
        "the chat template leaves out the reasoning of earlier turns, as at generation",
        "keep: use has the same; or choose a template that keeps it",
    ),
    # The data set as a whole.
    "few_rows": ("preferences of few rows are learnt by heart soon", "watch eval/loss; one epoch, a higher loss.beta"),
    "length_bias": (
        "length alone tells much of the preference, and will be learnt",
        "balance lengths, or take a loss per token (loss.average=tokens, or loss.name=simpo)",
    ),
    "label_balance": (
        "one label outweighs the other",
        "set loss.desirable_weight and loss.undesirable_weight so that weight × rows is about equal",
    ),
}
"""By kind: what it means, what to do."""

MAX_REPORTED_KINDS = 5
"""Kinds of findings that one message names."""


def refuse_stops(found: Sequence[DataFinding], policies: Mapping[str, str], key: str) -> None:
    """Raises UserError where a finding's policy is stop; policies: by the keys of the section inspect."""
    stops = [finding for finding in found if finding.count and policies[finding.policy] == "stop"]
    if stops:
        more = [f"and {len(stops) - MAX_REPORTED_KINDS} further kinds"] if len(stops) > MAX_REPORTED_KINDS else []
        raise UserError("\n  ".join([*(_refusal(finding, key) for finding in stops[:MAX_REPORTED_KINDS]), *more]))


def rows_to_drop(found: Sequence[DataFinding], policies: Mapping[str, str]) -> list[DroppedRows]:
    """The rows that are left out, by kind."""
    return [(f.name, f.rows, f.examples) for f in found if f.count and policies[f.policy] == "drop"]


def rows_left(n: int, found: Sequence[DataFinding], policies: Mapping[str, str] | None) -> NDArray[np.bool_]:
    """[n] the rows that are not left out; policies: None for a set that is left as it is."""
    left = np.ones(n, dtype=bool)
    for _, rows, _ in rows_to_drop(found, policies) if policies is not None else ():
        left[rows] = False
    return left


def _refusal(finding: DataFinding, key: str) -> str:
    whole = not len(finding.rows)
    what = finding.examples[0] if whole else f"{finding.count:,} {finding.name}, the first: {finding.examples[0]}"
    ways = "keep" if whole else "drop or keep"
    meaning, remedy = ADVICE[finding.name]
    return f"inspect.{finding.policy}: stop, but {key} has {what} ({meaning}); {remedy}; or set it to {ways}"
