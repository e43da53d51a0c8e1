"""Prompts, answered ones, and the tokeniser of a small chat template, for tests of rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.store import Answer, AnsweredPrompt

FLOAT32, CPU = torch.float32, torch.device("cpu")


def prompt(index: int, ids: list[int], text: str = "say", **row: Any) -> Prompt:
    return Prompt(index, f"p.jsonl:{index + 1}", text, None, row, ids)


def tokeniser(max_length: int = 200, mode: str = "auto") -> Tokeniser:
    return Tokeniser(read_template(small_tokenizer(CHATML), mode), max_length, max_length // 2)


def write(file: Path, *rows: Any) -> list[DataSource]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(str(file))]


def answered(*values: Any, texts: str | None = None) -> AnsweredPrompt:
    said = [list(v) if isinstance(v, tuple) else [v] for v in values]
    texts = texts or "abcdefgh"[: len(said)]
    return AnsweredPrompt(prompt(0, [1, 2]), [Answer([9], t, None, True) for t in texts], said)
