"""A smallest configuration, loaded with changes, and the message that refuses one."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt_dist.config import Config, load_config
from prefopt_dist.errors import UserError

MINIMAL = "run: {dir: runs/a}\nmodel: {name_or_path: some/model}\ndata: {train: rows.jsonl}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> Config:
    return load_config(write(tmp_path / "run.yaml", text), overrides)


def complaint(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    return str(caught.value)
