"""An empty reference store, and tokenised data sets with sequences in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_for_tests import lines, prepare

from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.reference.store import ReferenceStore


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "reference" / "key")


def data_set(tmp_path: Path, name: str, n: int, seed: int = 0) -> TokenisedRows:
    draw = np.random.RandomState(seed)
    words = ["the", "sky", "is", "blue", "and", "grass", "green", "quick", "brown", "fox", "jumps", "lazy", "dog"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words, size=draw.randint(1, most)))

    rows = [{"prompt": f"{name} {i // 3}: {text(9)}", "chosen": text(20), "rejected": text(20)} for i in range(n)]
    for i in range(0, n - 1, 3):  # pairs of rows with one prompt, and some with one response in common
        rows[i + 1]["prompt"] = rows[i]["prompt"]
        rows[i + 1]["chosen"] = rows[i]["rejected"] if i % 2 else rows[i]["chosen"]
    usable = [r for r in rows if r["chosen"] != r["rejected"]]
    return open_rows(prepare(tmp_path, lines(tmp_path / f"{name}.jsonl", usable)))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenisedRows]:
    folder = tmp_path_factory.mktemp("sets")
    return [data_set(folder, "train", 40), data_set(folder, "eval", 10, seed=1), data_set(folder, "train", 40)]
