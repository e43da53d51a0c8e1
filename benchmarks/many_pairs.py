"""Time and memory of the stages before and at the start of a training: python -m benchmarks.many_pairs --pairs 1000000.

Short synthetic pairs go through `inspect` (twice: the second call finds the tokenised rows in the cache), `plan`, the
plan of the first pass, the look-up of all sequences in a full reference store, and ten steps of training (ORPO, which
needs no reference) of a tiny model on the CPU. Each is measured in a process of its own. The memory is that of this
process without mapped files; the processes that tokenise beside it are not counted. With --rows the tokenised pairs are
made directly, of random tokens, so that the stages are measured without the time of tokenising.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.inspect import MemoryWatch, write_pairs, write_rows, write_run
from prefopt_dist.files import write_json

RESULTS = Path(__file__).parent / "results"
SHARD = 2_000
"""Sequences of a shard of the store, about as many as a rank writes at a time."""
STEPS = 10
VOCABULARY = 200
"""Number of different tokens of rows that are made directly; all are in the tiny model's vocabulary."""


def write_model(folder: Path) -> None:
    """Write a tiny model with weights in place of the benchmark's configuration alone."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "model"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).save_pretrained(folder / "model")


def train_rows(run: str) -> Any:
    """Return the training rows of the cache, as the stages read them."""
    from prefopt_dist.config import load_config
    from prefopt_dist.data import open_rows
    from prefopt_dist.model.load import load_tokenizer
    from prefopt_dist.setup.prepare_data import tokenised_train_folder

    config = load_config(run, [])
    tokenizer = load_tokenizer(Path(config.tokenizer), "model.tokenizer")
    return open_rows(tokenised_train_folder(config, tokenizer, len(tokenizer)), checksums=False)


def stage(run: str, *arguments: str) -> Callable[[], None]:
    """Return a function that calls a stage through the command line."""
    from prefopt_dist.cli import main as door

    def call() -> None:
        assert door([arguments[0], run, *arguments[1:]]) == 0

    return call


def plan_first_pass(run: str) -> Callable[[], None]:
    """Return a function that plans the first pass of an empty store."""
    from prefopt_dist.reference import scoring_work
    from prefopt_dist.reference.store import ReferenceStore

    rows, store = train_rows(run), ReferenceStore(Path(run).parent / "empty")
    store.make_folder()
    return lambda: print(len(scoring_work.look_up(store, [rows], 2, 8192).micro_batches), "micro-batches")


def look_up_all(run: str) -> Callable[[], None]:
    """Return a function that looks up all sequences in a store that has them."""
    from prefopt_dist.reference import first_pass
    from prefopt_dist.reference.store import ReferenceStore

    rows, store = train_rows(run), ReferenceStore(Path(run).parent / "full")

    def call() -> None:
        assert first_pass._all_stored(store, [rows], 2) is not None

    return call


def fill_store(run: str) -> Callable[[], None]:
    """Return a function that writes a store with a value for each sequence; it is not one of the measured stages."""
    from prefopt_dist.reference.store import ReferenceStore, Score

    rows, store = train_rows(run), ReferenceStore(Path(run).parent / "full")
    tokens = rows.learnt_lengths()

    def call() -> None:
        for first in range(0, rows.n, SHARD // 2):
            some = range(first, min(first + SHARD // 2, rows.n))
            store.commit({rows.digests[i, k].tobytes(): Score(-1.0, int(tokens[i, k])) for i in some for k in (0, 1)})

    return call


PARTS: dict[str, Callable[[str], Callable[[], None]]] = {
    "inspect": lambda run: stage(run, "inspect"),
    "inspect again": lambda run: stage(run, "inspect"),
    "plan": lambda run: stage(run, "plan"),
    "plan of the first pass": plan_first_pass,
    "fill the store": fill_store,
    "look-up of all sequences": look_up_all,
    "ten steps": lambda run: stage(run, "train", "loss.name=orpo", f"train.max_steps={STEPS}", "answers.number=0"),
}


def take_rows(folder: Path) -> None:
    """Let the stages of this process find the rows that were made directly where they would tokenise."""
    from prefopt_dist.commands import inspect, plan
    from prefopt_dist.setup import prepare_data

    def rows(_config: Any, _tokenizer: Any, _vocabulary: int, _sources: Any, key: str, *_: Any, **__: Any) -> Path:
        return folder / ("rows" if key == prepare_data.TRAIN else "held")

    for module in (inspect, plan, prepare_data):
        vars(module)["tokenised_folder"] = rows


def measure_here(name: str, run: str, rows: str | None) -> None:
    """Run a part; print its seconds by the clock and of work, and the memory of this process."""
    if rows is not None:
        take_rows(Path(rows))
    call = PARTS[name](run)
    with MemoryWatch() as watch:
        began, working = time.monotonic(), os.times()
        call()
        took, worked = time.monotonic() - began, os.times()
    seconds = worked.user + worked.system - working.user - working.system
    print(json.dumps({"seconds": took, "work": seconds, "start": watch.at_start, "most": watch.at_most}))


def measure(pairs: int, words: int, direct: bool) -> dict[str, Any]:
    """Write so many pairs and measure each part in a process of its own.

    Args:
        pairs: number of pairs.
        words: mean words of a text.
        direct: whether the pairs are made as tokens.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prefopt-pairs-") as made:
        folder = Path(made)
        write_pairs(folder, 1000 if direct else pairs, words)
        write_run(folder)
        this = [sys.executable, "-m", "benchmarks.many_pairs"]
        made_rows = [f"--made={pairs}"] if direct else []
        subprocess.run([*this, "--model", made, *made_rows], check=True)
        for name in PARTS:
            if direct and name == "inspect":
                continue  # it would tokenise
            done = subprocess.run(
                [*this, "--part", name, "--run", str(folder / "run.yaml"), *(["--take", made] if direct else [])],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            one = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{pairs:,} pairs, {name}: {one['seconds']:.1f} s ({one['work']:.1f} s of work in it), memory "
                f"{one['start']:.0f} MiB at the start, {one['most']:.0f} MiB at most",
                flush=True,
            )
            found[name] = one
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000])
    parser.add_argument("--words", type=int, default=5, help="mean words of a prompt or response")
    parser.add_argument("--rows", action="store_true", help="make the tokenised pairs directly")
    parser.add_argument("--save", default="many_pairs")
    for hidden in ("--part", "--run", "--model", "--made", "--take"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.model is not None:
        write_model(Path(asked.model))
        for name, n in (("rows", asked.made), ("held", 100)) if asked.made is not None else ():
            write_rows(Path(asked.model) / name, int(n), vocabulary=VOCABULARY, planted=False)
    elif asked.part is not None:
        measure_here(asked.part, asked.run, asked.take)
    else:
        write_json(RESULTS / f"{asked.save}.json", {str(n): measure(n, asked.words, asked.rows) for n in asked.pairs})


if __name__ == "__main__":
    main()
