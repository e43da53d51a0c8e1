"""What is said about a chat template before rows are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import small_config
from tokenizers_for_tests import CHATML, INST, small_tokenizer

from prefopt_dist.setup.prepare_data import tokeniser_of
from prefopt_dist.setup.template_notices import template_notices

NEVER_OPENS = CHATML.split("{% if add_generation_prompt")[0]
CLOSES_REASONING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
)


def notices(tmp_path: Path, template: str | None, *overrides: str) -> list[str]:
    config, tokenizer = small_config(tmp_path, *overrides), small_tokenizer(template)
    return template_notices(config, tokenizer, tokeniser_of(config, tokenizer).template)


def test_a_template_that_never_opens_an_answer_is_told(tmp_path: Path) -> None:
    (line,) = notices(tmp_path, NEVER_OPENS)
    assert "add_generation_prompt" in line
    assert repr("<|im_start|>assistant\n") in line
    assert "data.chat_template" in line


@pytest.mark.parametrize("template", [CHATML, INST, CLOSES_REASONING])
def test_nothing_is_said_where_the_answer_is_opened_or_has_no_opening(tmp_path: Path, template: str) -> None:
    assert notices(tmp_path, template) == []


def test_text_that_is_taken_as_it_is_has_no_opening(tmp_path: Path) -> None:
    assert notices(tmp_path, NEVER_OPENS, "data.template=none") == []


def test_a_tokenizer_without_a_template_is_told(tmp_path: Path) -> None:
    (line,) = notices(tmp_path, None)
    assert "### assistant:" in line
