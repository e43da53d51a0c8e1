"""Rows, files and a `prepare_rows` with settings for tests."""

import json
from pathlib import Path
from typing import Any

from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import TokenisedRows, prepare_rows

ROWS = [
    {"prompt": "what is blue?", "chosen": "the sky", "rejected": "grass"},
    {"prompt": "what is green?", "chosen": "grass", "rejected": "the sky"},
    {"prompt": "what is quick?", "chosen": "the fox", "rejected": "the lazy dog"},
]
TOKENIZER = small_tokenizer(CHATML)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(tmp_path: Path, *sources: DataSource | str, said: list[str] | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "form": "auto",
        "template": "auto",
        "max_length": 512,
        "max_prompt_length": 256,
        "on_bad_row": "stop",
        "cache_dir": tmp_path / "cache",
        "vocab_size": len(TOKENIZER),
        "say": ([] if said is None else said).append,
    } | changes
    return prepare_rows([DataSource(s) if isinstance(s, str) else s for s in sources], **settings)


def contents(rows: TokenisedRows) -> list[list[list[int]]]:
    return [
        [rows.prompt(i).tolist(), *(rows.response(i, k).tolist() for k in range(rows.responses))] for i in range(rows.n)
    ]
