"""Random data: they are taken, or refused with the user's one message; there is no third way.

`test_…_at_length` has 5,000 tries. Each fault that was found has its smallest example below as a test.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz_strategies import lines
from fuzzing import LONG, QUICK, must_be_a_message
from hypothesis import event, given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, INST, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows, prepare_rows
from prefopt_dist.data.forms import FORMS
from prefopt_dist.errors import UserError

WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML


TOKENIZERS = {
    "chatml": small_tokenizer(CHATML),
    "inst": small_tokenizer(INST, adds_bos=True),
    "plain": small_tokenizer(None),
    "tools": small_tokenizer(WITH_TOOLS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def check_prepare(folder: Path, content: bytes, **changes: Any) -> str:
    """Reads and tokenises the file: rows = used + dropped, or the user's mistake, and nothing half-made."""
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    choices: dict[str, Any] = {
        "tokenizer": TOKENIZERS[changes.pop("tokenizer", "chatml")],
        "form": "auto",
        "template": "auto",
        "max_length": 200,
        "max_prompt_length": 100,
        "on_bad_row": "drop",
    } | changes
    cache = folder / "cache"
    try:
        made = prepare_rows([DataSource(str(file))], **choices, cache_dir=cache, vocab_size=1000, say=lambda _: None)
        rows = open_rows(made)
        report = rows.report
        assert report.rows == report.used + sum(report.dropped.values())
        assert rows.n == report.used > 0
        assert report.rows <= content.count(b"\n") + 1
        assert choices["on_bad_row"] == "drop" or report.used == report.rows
        assert (rows.lengths().sum(axis=1) > 0).all()
        report.text().encode()
        return "used, some dropped" if report.dropped else "used"
    except UserError as error:
        must_be_a_message(error)
        return "refused"
    finally:
        assert not list(cache.glob("tokenised/.*"))
        shutil.rmtree(cache, ignore_errors=True)


DATA = given(
    content=st.lists(lines(), max_size=5).map(b"\n".join),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    form=st.sampled_from([*["auto"] * 8, *FORMS]),
    template=st.sampled_from(["auto", "auto", "auto", "chat", "none"]),
    max_length=st.sampled_from([200, 200, 40, 24]),
    on_bad_row=st.sampled_from(["drop", "drop", "drop", "stop"]),
)


@QUICK
@DATA
def test_data(folder: Path, content: bytes, max_length: int, **changes: Any) -> None:
    event(check_prepare(folder, content, max_length=max_length, max_prompt_length=max_length // 2, **changes))


@pytest.mark.slow
@LONG
@DATA
def test_data_at_length(folder: Path, content: bytes, max_length: int, **changes: Any) -> None:
    event(check_prepare(folder, content, max_length=max_length, max_prompt_length=max_length // 2, **changes))


@pytest.mark.parametrize(
    "tools", ["[" * 2000, '[{"a": "\\ud800"}]', "[" + "9" * 5000 + "]"], ids=["deep", "surrogate", "digits"]
)
def test_faults_found_in_data(tmp_path: Path, tools: str) -> None:
    """JSON text within JSON: what the line's own parsing refuses came through here."""
    row = {"prompt": "what is blue?", "chosen": "the sky", "rejected": "grass"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, row | {"tools": tools})))
    assert check_prepare(tmp_path, file.read_bytes(), tokenizer="tools") == "used, some dropped"
    with pytest.raises(UserError, match=r"rows\.jsonl:2: wrong_type: tools must be a list of objects, or JSON text"):
        prepare_rows(
            [DataSource(str(file))], tokenizer=TOKENIZERS["tools"], form="auto", template="auto", max_length=200,
            max_prompt_length=100, on_bad_row="stop", cache_dir=tmp_path / "cache", vocab_size=1000,
        )  # fmt: skip


def test_a_template_that_fails_in_its_own_way_costs_the_row(tmp_path: Path) -> None:
    """A template is a program: it may divide by zero."""
    tokenizer = small_tokenizer(CHATML + "{% if messages[0]['content'] == 'zero' %}{{ 1 // 0 }}{% endif %}")
    rows = [{"prompt": prompt, "chosen": "the sky", "rejected": "grass"} for prompt in ("one", "zero")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare_rows(
        [DataSource(str(file))], tokenizer=tokenizer, form="auto", template="auto", max_length=200,
        max_prompt_length=100, on_bad_row="drop", cache_dir=tmp_path / "cache", vocab_size=1000,
    )  # fmt: skip
    assert open_rows(made).report.dropped == {"template_refused": 1}
