"""`inspect`: reads and tokenises the data and says what is wrong with it and how long it is; no model weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.model.load import load_tokenizer, read_config, resolve
from prefopt_dist.stages.ingredients import prepared
from prefopt_dist.tracking.console import say


def run(config: Config) -> None:
    """One process, no process group."""
    tokenizer = load_tokenizer(resolve(config.tokenizer, "model.tokenizer", weights=False), "model.tokenizer")
    model_key = "model.name_or_path"
    vocabulary = read_config(resolve(config.model.name_or_path, model_key, weights=False), model_key).vocab_size
    sets = {"data.train": config.data.train}
    sets |= {f"data.eval.{n}".rstrip("."): s for n, s in (config.data.eval or {}).items()}
    for key, sources in sets.items():
        folder = prepared(config, tokenizer, vocabulary, sources, key)
        rows = open_rows(folder)
        say(f"{key}: {rows.report.text()}")
        say(_lengths(rows))


def _lengths(rows: TokenisedRows) -> str:
    parts = rows.lengths()
    names = ("prompt", "chosen", "rejected") if rows.kind == "pair" else ("prompt", "response")
    lines = [f"  {name} tokens: {_quantiles(parts[:, i])}" for i, name in enumerate(names)]
    if rows.kind == "pair":
        different = parts[:, 1] != parts[:, 2]
        longer = float((parts[different, 1] > parts[different, 2]).mean()) if different.any() else float("nan")
        lines.append(f"  the longer response is chosen in {100 * longer:.1f} % of the pairs of different length")
    return "\n".join(lines)


def _quantiles(lengths: NDArray[np.int64]) -> str:
    shown = {q: int(np.quantile(lengths, q / 100, method="higher")) for q in (5, 50, 95, 100)}
    return f"mean {lengths.mean():.1f}, " + ", ".join(f"{q} % at most {n}" for q, n in shown.items())
