"""Beginnings of responses, as long as the shorter response of the pair: ordinary sequences of the reference store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from data_for_tests import ROWS, lines, prepare

from prefopt_dist.data import open_rows
from prefopt_dist.data.dataset import sequence_digest
from prefopt_dist.data.prefixes import build_prefixed_rows
from prefopt_dist.reference.sequences import sequences_needed


def test_beginnings_are_ordinary_sequences(tmp_path: Path) -> None:
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS)))
    made = build_prefixed_rows(rows)
    assert made.responses == 4
    for i in range(rows.n):
        whole = [rows.response(i, k).tolist() for k in (0, 1)]
        n = min(map(len, whole))
        assert [made.response(i, k).tolist() for k in range(4)] == [*whole, *(ids[:n] for ids in whole)]
        for k in range(4):
            assert made.digests[i, k].tobytes() == sequence_digest(made.prompt(i), made.response(i, k))
        unit = made.unit(i, range(4))
        assert (len(unit.responses), unit.prefix) == (2, n)
        assert made.unit(i, range(2)).prefix is None
    unequal = sum(len(rows.response(i, 0)) != len(rows.response(i, 1)) for i in range(rows.n))
    assert unequal > 0
    assert len(sequences_needed([made], 4)) == len(sequences_needed([rows], 2)) + unequal


def test_scored_tokens_alone_are_counted(tmp_path: Path) -> None:
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS[:1])))
    learnt = np.ones(len(rows.tokens), np.uint8)
    first, second, end = rows.offsets[1:4].tolist()
    learnt[first : first + 2] = 0  # the chosen response, the shorter one, has two tokens that are not scored
    learnt[second + 1 : second + 3] = 0
    rows = replace(rows, learnt=learnt)
    counts = rows.learnt_lengths()[0].tolist()
    made = build_prefixed_rows(rows)
    assert made.unit(0, range(4)).prefix == min(counts)
    assert made.learnt_lengths()[0].tolist() == [*counts, min(counts), min(counts)]
    longer = int(np.argmax(counts))
    mask = made.mask(0, 2 + longer)
    assert mask is None or mask[-1], "it ends with the last token that counts"
    assert end == rows.offsets[-1]
