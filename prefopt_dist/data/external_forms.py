"""The external forms: those of other tools and of published data sets, each read into the columns of one of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prefopt_dist.data.external_columns import (
    Columns,
    has_list,
    has_only_answers,
    has_text,
    instruction_prompt,
    pair_columns,
    pair_reader,
    preference_by_sign,
    preference_by_value,
    rated_conversation_reader,
    read_alpaca_farm,
    read_alpaca_outputs,
    read_arena,
    read_arena_texts,
    read_helpsteer2_rated,
    read_nectar,
    read_nemo,
    read_openai,
    read_ranked,
    read_swift,
    read_swift_query,
    read_ultrafeedback,
    read_webgpt,
    two_answers_reader,
)
from prefopt_dist.data.fields import Row, field_of


@dataclass(frozen=True)
class ExternalForm:
    """One external form."""

    columns: tuple[str, ...]
    """The columns that a row of this form has, none of them null"""
    becomes: str
    """The own form whose columns `read` returns"""
    read: Callable[[Row], Columns]
    used_by: str
    """The tools or data sets that use it, for readers of the documentation"""
    fits: Callable[[Row], bool] = lambda row: True
    """A further condition on the values of a row that has the columns"""
    lacks: tuple[str, ...] = ()
    """Columns that a row of this form does not have"""


def detect_external_form(row: Row, has: set[str]) -> str | None:
    """Return the first external form that fits the row; None where none does.

    Args:
        row: The row.
        has: The columns that are not null.
    """
    return next(
        (
            name
            for name, form in EXTERNAL_FORMS.items()
            if has.issuperset(form.columns) and not has.intersection(form.lacks) and form.fits(row)
        ),
        None,
    )


EXTERNAL_FORMS: Mapping[str, ExternalForm] = {
    "ranked": ExternalForm(
        ("prompt", "responses"),
        "pair",
        read_ranked,
        "this package",
        lambda row: isinstance(row.get("scores"), list) or isinstance(row.get("ranks"), list),
        ("chosen", "rejected"),
    ),
    "sharegpt": ExternalForm(
        ("conversations", "chosen", "rejected"), "pair", pair_reader("conversations"), "LLaMA-Factory, Axolotl"
    ),
    "sharegpt_rated": ExternalForm(
        ("conversations", "label"), "rated", rated_conversation_reader("conversations", "label"), "LLaMA-Factory (KTO)"
    ),
    "sharegpt_kto_tag": ExternalForm(
        ("conversations", "kto_tag"),
        "rated",
        rated_conversation_reader("conversations", "kto_tag"),
        "LLaMA-Factory (KTO)",
    ),
    "sharegpt_messages": ExternalForm(
        ("conversations",),
        "demonstration",
        lambda row: {"messages": row["conversations"], "tools": row.get("tools")},
        "Vicuna, FastChat, LLaMA-Factory",
        lacks=("prompt",),
    ),
    "messages_pair": ExternalForm(
        ("messages", "chosen", "rejected"),
        "pair",
        pair_reader("messages"),
        "Axolotl (chat_template)",
        has_only_answers,
        ("prompt",),
    ),
    "swift": ExternalForm(("messages", "rejected_response"), "pair", read_swift, "ms-swift"),
    "swift_query": ExternalForm(
        ("query", "response", "rejected_response"), "pair", read_swift_query, "ms-swift (older)", lacks=("messages",)
    ),
    "swift_messages": ExternalForm(("messages", "rejected_messages"), "conversations", read_swift, "ms-swift"),
    "messages_rated": ExternalForm(
        ("messages", "label"),
        "rated",
        rated_conversation_reader("messages", "label"),
        "ms-swift, LLaMA-Factory (KTO)",
        lacks=("prompt", "completion"),
    ),
    "alpaca_pair": ExternalForm(
        ("instruction", "chosen", "rejected"),
        "pair",
        lambda row: pair_columns(instruction_prompt(row), field_of(row, "chosen"), field_of(row, "rejected")),
        "LLaMA-Factory (ranking)",
        has_only_answers,
        ("prompt",),
    ),
    "alpaca_outputs": ExternalForm(
        ("instruction", "output"), "pair", read_alpaca_outputs, "LLaMA-Factory (ranking, older)", has_list("output")
    ),
    "alpaca_farm": ExternalForm(
        ("instruction", "output_1", "output_2", "preference"), "pair", read_alpaca_farm, "AlpacaFarm"
    ),
    "alpaca": ExternalForm(
        ("instruction", "output"),
        "demonstration",
        lambda row: {"prompt": instruction_prompt(row), "completion": field_of(row, "output")},
        "Alpaca",
        has_text("output"),
        ("prompt",),
    ),
    "ultrafeedback": ExternalForm(
        ("instruction", "completions"), "pair", read_ultrafeedback, "UltraFeedback (raw)", has_list("completions")
    ),
    "question_pair": ExternalForm(
        ("question", "chosen", "rejected"),
        "pair",
        pair_reader("question"),
        "Intel orca_dpo_pairs",
        has_only_answers,
        ("prompt",),
    ),
    "input_pair": ExternalForm(
        ("input", "chosen", "rejected"),
        "pair",
        pair_reader("input"),
        "Intel orca_dpo_pairs of Argilla",
        has_only_answers,
        ("prompt", "instruction", "question", "messages", "conversations"),
    ),
    "openai": ExternalForm(
        ("input", "preferred_output", "non_preferred_output"), "pair", read_openai, "OpenAI preference fine-tuning"
    ),
    "nemo": ExternalForm(("context", "completions"), "pair", read_nemo, "NeMo-RL"),
    "nectar": ExternalForm(("prompt", "answers"), "pair", read_nectar, "Nectar", has_list("answers")),
    "helpsteer2": ExternalForm(
        ("prompt", "response_1", "response_2", "preference_strength"),
        "pair",
        two_answers_reader(
            "prompt",
            "response_1",
            "response_2",
            lambda row: preference_by_sign(row, "preference_strength", first_is=-1),
        ),
        "HelpSteer2",
    ),
    "helpsteer2_rated": ExternalForm(
        ("prompt", "response", "helpfulness"),
        "pair",
        read_helpsteer2_rated,
        "HelpSteer2 (ratings)",
        has_list("response"),
    ),
    "helpsteer3": ExternalForm(
        ("context", "response1", "response2", "overall_preference"),
        "pair",
        two_answers_reader(
            "context", "response1", "response2", lambda row: preference_by_sign(row, "overall_preference", first_is=-1)
        ),
        "HelpSteer3",
    ),
    "shp": ExternalForm(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "pair",
        two_answers_reader("history", "human_ref_A", "human_ref_B", preference_by_value("labels", 1, 0)),
        "SHP",
    ),
    "saferlhf": ExternalForm(
        ("prompt", "response_0", "response_1", "better_response_id"),
        "pair",
        two_answers_reader("prompt", "response_0", "response_1", preference_by_value("better_response_id", 0, 1)),
        "PKU-SafeRLHF",
    ),
    "webgpt": ExternalForm(("question", "answer_0", "answer_1", "score_0", "score_1"), "pair", read_webgpt, "WebGPT"),
    "arena": ExternalForm(
        ("conversation_a", "conversation_b", "winner"), "conversations", read_arena, "Chatbot Arena conversations"
    ),
    "arena_texts": ExternalForm(
        ("prompt", "response_a", "response_b", "winner_model_a"),
        "conversations",
        read_arena_texts,
        "Arena human preference",
    ),
}
"""The external forms by name, in the order in which they are tried."""
