"""Checks before a job: a folder that could not be exported, and a reference of other tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import worlds
from data_for_tests import ROWS, lines, prepare

from prefopt_dist.data import open_rows
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.objectives import DPO, PlackettLuce
from prefopt_dist.setup import checks


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ('{"max_new_tokens": -4}', "cannot be read")],
)
def test_a_generation_config_that_the_export_could_not_write(tmp_path: Path, content: str, words: str) -> None:
    worlds.write_model(tmp_path / "model", seed=1)
    (tmp_path / "model" / "generation_config.json").write_text(content)
    folder = inspect_folder(tmp_path / "model", "model.name_or_path")
    with pytest.raises(UserError, match=rf"^model\.name_or_path: .*generation_config\.json {words}"):
        checks.check_exportable(folder, load_tokenizer(tmp_path / "model", "model.tokenizer"))


def test_a_reference_that_lacks_a_token(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model", seed=1)
    reference = inspect_folder(tmp_path / "model", "reference.name_or_path")
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS)))
    largest = int(rows.tokens.max())
    reference.config.vocab_size = largest + 1
    checks.check_reference_vocabulary(reference, rows, "data.train")
    reference.config.vocab_size = largest
    with pytest.raises(UserError, match=rf"^reference\.name_or_path: .* but data\.train has token {largest}, which"):
        checks.check_reference_vocabulary(reference, rows, "data.train")


def test_a_reference_of_another_tokenizer(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model", seed=1)
    tokenizer = load_tokenizer(tmp_path / "model", "model.tokenizer")
    reference = inspect_folder(tmp_path / "model", "reference.name_or_path")
    checks.check_reference_tokenizer(tokenizer, reference)
    said = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    said["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"^reference\.name_or_path: .* has another tokenizer: \d+ of \d+ ids"):
        checks.check_reference_tokenizer(tokenizer, reference)
    reference.config.vocab_size = 10
    with pytest.raises(UserError, match=r"^reference\.name_or_path: .* has 10 tokens, but the tokenizer has ids up"):
        checks.check_reference_tokenizer(tokenizer, reference)


def test_a_ranked_row_too_long_for_a_micro_batch_by_path() -> None:
    """Three of up to four responses, of 3, 4 and 6 tokens: the prompt once, thrice, or with a token of padding."""
    config: Any = SimpleNamespace(
        train=SimpleNamespace(micro_batch_tokens=16, sequence_parallel=1),
        reference_micro_batch_tokens=16,
        data=SimpleNamespace(max_length=64),
    )
    packed = {"shared": 17, "packed": 31, "plain": 2 * 10 + 12}
    for path, tokens in packed.items():
        rows: Any = SimpleNamespace(
            n=1,
            responses=4,
            lengths=lambda: np.array([[7, 3, 4, 6, 0]]),
            origin=str,
            unit=lambda i, of: Unit(0, *RANKED),
        )
        checked: Any = (config, rows, PlackettLuce(0.1), "data.train")
        with pytest.raises(UserError, match=rf"train\.micro_batch_tokens: got 16, .* has {tokens} packed tokens"):
            checks.check_lengths(*checked, trained=True, path=path)  # type: ignore[arg-type]
        config.train.micro_batch_tokens = tokens
        checks.check_lengths(*checked, trained=True, path=path)  # type: ignore[arg-type]
        config.train.micro_batch_tokens = 16


RANKED = (np.zeros(7, np.int32), tuple(np.full(n, n, np.int32) for n in (3, 4, 6)))


def test_a_pair_too_long_for_a_micro_batch_by_path() -> None:
    """The prompt counts once where it is shared, twice where it is not: 7 + 2 + 3 tokens, or 9 + 10."""
    config = SimpleNamespace(
        train=SimpleNamespace(micro_batch_tokens=12, sequence_parallel=1),
        reference_micro_batch_tokens=24,
        data=SimpleNamespace(max_length=64),
    )
    rows: Any = SimpleNamespace(n=1, responses=2, lengths=lambda: np.array([[7, 3, 4]]), origin=str)
    objective = DPO(0.1, 0.0, 1e-6)
    checks.check_lengths(config, rows, objective, "data.train", trained=True)  # type: ignore[arg-type]
    for path in ("packed", "plain"):
        with pytest.raises(UserError, match=r"train\.micro_batch_tokens: got 12, .* has 19 packed tokens") as refused:
            checks.check_lengths(config, rows, objective, "data.train", trained=True, path=path)  # type: ignore[arg-type]
        more = "or let more ranks share a row (train.sequence_parallel, now 1)" in str(refused.value)
        assert more == (path == "packed"), "padded rows are not divided"


def test_a_pair_too_long_for_the_ranks_that_share_a_row() -> None:
    """Of 19 packed tokens: more than three ranks with 6 each have, as many as they have with 7."""
    config = SimpleNamespace(
        train=SimpleNamespace(micro_batch_tokens=6, sequence_parallel=3),
        reference_micro_batch_tokens=24,
        data=SimpleNamespace(max_length=64),
    )
    rows: Any = SimpleNamespace(n=1, responses=2, lengths=lambda: np.array([[7, 3, 4]]), origin=str)
    checked: Any = (config, rows, DPO(0.1, 0.0, 1e-6), "data.train")
    words = r"got 6, .* has 19 packed tokens, .* on the 3 ranks that share it .* raise it to at least 7, or"
    with pytest.raises(UserError, match=words):
        checks.check_lengths(*checked, trained=True, path="packed")
    config.train.micro_batch_tokens = 7
    checks.check_lengths(*checked, trained=True, path="packed")
