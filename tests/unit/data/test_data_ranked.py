"""Rows of several responses: their forms, the pair that losses on pairs take, ties, columns on disk, derived sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_for_tests import ROWS, TOKENIZER, contents, lines, prepare

from prefopt_dist.config.data import PairsFrom
from prefopt_dist.data import TokenisedRows, open_rows, parts
from prefopt_dist.data.dataset import ABSENT
from prefopt_dist.data.derived import without_rows
from prefopt_dist.data.example import BadRow, Example
from prefopt_dist.data.forms import detect_form, read_form, read_prompt
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions
from prefopt_dist.errors import UserError
from prefopt_dist.reference.aligned_values import _aligned
from prefopt_dist.reference.sequences import sequences_needed
from prefopt_dist.reference.store import Score, Scores

RANKED = TextOptions(ranked=True)
A, B, C, D = "the sky", "grass", "the fox", "the lazy dog"
GIVEN: list[dict[str, Any]] = [
    {"prompt": "what is blue?", "responses": [B, A, C], "ranks": [2, 1, 3]},
    {"prompt": "what is green?", "responses": [A, B, C, D], "scores": [1, 5.5, 1, "2"]},
    {"prompt": "what is quick?", "responses": [A, C], "scores": [-1, 3]},
]


def read(tmp_path: Path, given: list[dict[str, Any]], options: TextOptions = RANKED, **changes: Any) -> TokenisedRows:
    return open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", given), options=options, **changes))


def said(rows: TokenisedRows, i: int) -> list[str]:
    held = rows.responses_held(i)
    return [TOKENIZER.decode(rows.response(i, k), skip_special_tokens=True).strip() for k in range(held)]


def test_rows_keep_all_responses_best_first(tmp_path: Path) -> None:
    rows = read(tmp_path, GIVEN)
    assert (rows.kind, rows.n, rows.responses) == ("ranked", 3, 4)
    assert [said(rows, i) for i in range(3)] == [[A, B, C], [B, D, A, C], [C, A]]
    assert rows.scores is not None
    table = rows.scores.tolist()
    assert [row[: rows.responses_held(i)] for i, row in enumerate(table)] == [[-1, -2, -3], [5.5, 2, 1, 1], [3, -1]]
    assert [u.ranks for u in (rows.unit(i, range(4)) for i in range(3))] == [(0, 1, 2), (0, 1, 2, 2), (0, 1)]
    assert len(rows.unit(2, range(4)).responses) == 2
    assert rows.unit(1, (3,)).responses[0].tolist() == rows.response(1, 3).tolist()
    assert rows.present().tolist() == [[True] * 3 + [False], [True] * 4, [True, True, False, False]]
    assert rows.digests[2, 2:].tobytes() == 2 * ABSENT
    assert rows.lengths()[2, 3:].tolist() == [0, 0]
    assert rows.learnt_lengths()[0, 3] == 0


def test_pairs_are_rows_of_two(tmp_path: Path) -> None:
    """With the same sequences, so stored references are shared; other sources may have more."""
    rows, pairs = read(tmp_path, ROWS), read(tmp_path, ROWS, DEFAULT_OPTIONS)
    assert contents(rows) == contents(pairs)
    assert np.array_equal(rows.digests, pairs.digests)
    assert (rows.kind, rows.scores.tolist() if rows.scores is not None else None) == ("ranked", [[1, 0]] * 3)
    assert rows.report.digest != pairs.report.digest
    both = [lines(tmp_path / f"{i}.jsonl", given) for i, given in enumerate((ROWS, GIVEN))]
    mixed = open_rows(prepare(tmp_path, *both, options=RANKED))
    assert [mixed.responses_held(i) for i in range(6)] == [2, 2, 2, 3, 4, 2]


def test_a_loss_on_pairs_takes_the_best_and_the_last(tmp_path: Path) -> None:
    rows = read(tmp_path, GIVEN, DEFAULT_OPTIONS)
    assert (rows.kind, rows.responses, rows.scores) == ("pair", 2, None)
    assert [said(rows, i) for i in range(3)] == [[A, C], [B, C], [C, A]]


def test_defaults_keep_the_digests_of_earlier_caches() -> None:
    assert "ranked" not in DEFAULT_OPTIONS.as_json()
    assert RANKED.as_json()["ranked"] is True


YES, NO, LATER = ({"role": "assistant", "content": text} for text in ("yes", "no", "later"))
FORMS = [
    ("nectar", {"prompt": "q", "answers": [{"answer": "no", "rank": 2}, {"answer": "yes", "rank": 1}]}, (-1, -2)),
    (
        "ultrafeedback",
        {"instruction": "q", "completions": [{"response": t, "overall_score": s} for t, s in (("no", 2), ("yes", 8))]},
        (8, 2),
    ),
    (
        "nemo",
        {
            "context": [{"role": "user", "content": "q"}],
            "completions": [{"rank": 1, "completion": [NO]}, {"rank": 0, "completion": [YES]}],
        },
        (0, -1),
    ),
    ("ranked", {"prompt": "q", "responses": [[YES], [NO], [LATER]], "scores": [3, 1, 2]}, (3, 2, 1)),
    ("pair", {"prompt": "q", "chosen": "yes", "rejected": ["no", "later"]}, (1, 0, 0)),
    ("pair", {"prompt": "q", "chosen": [YES], "rejected": [[NO], [LATER]]}, (1, 0, 0)),
    ("alpaca_pair", {"instruction": "q", "chosen": "yes", "rejected": ["no"]}, (1, 0)),
    ("pair", {"prompt": "q", "chosen": "yes", "rejected": "no"}, (1, 0)),
]


@pytest.mark.parametrize(("form", "row", "scores"), FORMS)
def test_forms_with_several_answers(form: str, row: dict[str, Any], scores: tuple[float, ...]) -> None:
    assert detect_form([row], "data.format") == form
    example = read_form(form, row, ranked=True)
    assert example.scores == scores
    assert text(example, 0) == "yes"
    assert {text(example, k) for k in range(1, len(scores))} == {"no", "later"} - (
        {"later"} if len(scores) == 2 else set()
    )
    assert example.ignored == ()


def text(example: Example, k: int) -> str:
    response = example.responses[k]
    return response if isinstance(response, str) else response[0].content


def test_pairs_from_keeps_all_answers(tmp_path: Path) -> None:
    given = [{"question": "what is blue?", "found": [{"t": B, "s": 1}, {"t": A, "s": 4}, {"t": C, "s": 0}]}]
    pairs_from = PairsFrom(responses="found.t", scores="found.s")
    rows = read(tmp_path, given, TextOptions(ranked=True, pairs_from=pairs_from))
    assert said(rows, 0) == [A, B, C]
    tie = TextOptions(ranked=True, pairs_from=PairsFrom(responses="found.t", scores="found.s", min_margin=5))
    apart = {"question": "what is green?", "found": [{"t": B, "s": 9}, {"t": A, "s": 4}]}
    assert read(tmp_path, [*given, apart], tie).report.dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"scores": [2, 2, 2]}, "tie"),
        ({"scores": [2, None, None]}, "tie"),
        ({"scores": ["?", None, float("nan")]}, "missing_field"),
        ({"scores": [1, 2]}, "wrong_type"),
        ({"responses": ["yes", "no", "yes"], "scores": [1, 2, 3]}, "identical_responses"),
        ({"responses": ["yes", "no", " "]}, "empty_response"),
        ({"responses": ["yes", "no", 3]}, "wrong_type"),
    ],
)
def test_bad_rows(changed: dict[str, Any], kind: str) -> None:
    row = {"prompt": "q", "responses": ["yes", "no", "later"], "scores": [3, 2, 1]} | changed
    with pytest.raises(BadRow) as caught:
        read_form("ranked", row, ranked=True)
    assert caught.value.kind == kind


def test_a_prompt_needs_no_preference() -> None:
    row = {"prompt": "q", "responses": ["yes", "no"], "scores": [1, 1]}
    assert read_prompt(row).prompt == "q"


def test_several_rejected_answers_are_no_pair() -> None:
    with pytest.raises(BadRow, match="one answer for a loss on pairs") as caught:
        read_form("pair", {"prompt": "q", "chosen": "yes", "rejected": ["no", "later"]})
    assert "plackett_luce" in caught.value.remedy


def test_a_repeated_response_of_equal_score_counts_once() -> None:
    row = {"prompt": "q", "responses": ["no", "yes", "no", "later"], "scores": [1, 2, 1, 0]}
    example = read_form("ranked", row, ranked=True)
    assert (example.responses, example.scores) == (("yes", "no", "later"), (2, 1, 0))


def test_responses_that_are_equal_after_truncation(tmp_path: Path) -> None:
    """Of different scores a bad row; of equal ones no preference between them, and no fault."""
    long = " ".join(["the fox is quick"] * 10)
    row = {"prompt": "what?", "responses": [long + " a", "no", long + " b"], "scores": [3, 2, 1]}
    lengths = {"max_length": 24, "max_prompt_length": 12}
    with pytest.raises(UserError, match="identical_after_cut"):
        read(tmp_path, [row], **lengths)
    rows = read(tmp_path, [row | {"scores": [1, 2, 1]}], **lengths)
    assert rows.unit(0, range(3)).ranks == (0, 1, 1)
    assert rows.flagged("cut_response_1").all()
    assert not rows.flagged("cut_response_0").any()


def test_parts_of_different_widths_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and parts whose longest rows differ; a subset keeps the scores."""
    given = [GIVEN[i % 3] | {"prompt": f"what is the number {i}?"} for i in (2, 2, 0, 2, 1, 0, 2)]
    whole = read(tmp_path / "a", given) if (tmp_path / "a").mkdir() is None else None
    assert whole is not None
    monkeypatch.setattr("prefopt_dist.data.workers.PART_ROWS", 3)
    monkeypatch.setattr(parts, "BLOCK_ROWS", 2)
    (tmp_path / "b").mkdir()
    path = lines(tmp_path / "b" / "rows.jsonl", given)
    folder = prepare(tmp_path / "b", path, options=RANKED)
    rows = open_rows(folder)
    assert rows.report.digest == whole.report.digest
    for name in ("tokens", "offsets", "digests", "scores", "line"):
        assert np.array_equal(getattr(rows, name), getattr(whole, name), equal_nan=name == "scores"), name
    left = open_rows(without_rows(folder, rows, [("duplicates", np.array([0, 4]), ())], key="k", say=print))
    assert [left.responses_held(i) for i in range(left.n)] == [2, 3, 2, 3, 2]
    assert left.unit(1, range(4)).ranks == rows.unit(2, range(4)).ranks
    assert contents(left)[1] == contents(rows)[2]


def test_the_first_pass_needs_each_sequence_once(tmp_path: Path) -> None:
    """Over sets of different widths; nothing of what is absent; the aligned values repeat the first there."""
    again = GIVEN[1] | {"responses": [A, B], "scores": [0, 1]}
    both = [lines(tmp_path / f"{i}.jsonl", given) for i, given in enumerate((ROWS, [again]))]
    sets = [read(tmp_path, GIVEN), open_rows(prepare(tmp_path, *both, options=RANKED))]
    needed = sequences_needed(sets, 4)
    assert ABSENT not in needed
    assert sorted((p.data_set, p.row, p.response) for p in needed.values()) == [
        *((0, 0, k) for k in range(3)),
        *((0, 1, k) for k in range(4)),
        *((0, 2, k) for k in range(2)),
        (1, 2, 1),  # the others stand in the first set
    ]
    scores = {digest: Score(-float(i + 1), _tokens(sets, p)) for i, (digest, p) in enumerate(needed.items())}
    stored = Scores.of(scores)
    values = _aligned(stored, sets[0], 4, None)
    assert values.shape == (3, 4)
    assert values[2, 2:].tolist() == [values[2, 0]] * 2
    assert _aligned(stored, sets[1], 4, None).shape == (4, 2)
    assert len(sequences_needed(sets[:1], 4, np.array([2]))) == 2


def _tokens(sets: list[TokenisedRows], place: Any) -> int:
    return int(sets[place.data_set].learnt_lengths()[place.row, place.response])
