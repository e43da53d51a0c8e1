"""Speed of tokenising with one process and with two, beside `datasets.map`: python -m benchmarks.tokenising.

Rows of UltraFeedback-like length, written from the words of a tokenizer, go through that tokenizer and its chat
template. Every way has TOKENIZERS_PARALLELISM=false and does the same function; `datasets.map` writes the same token
ids. Each measurement is in a process of its own, and counts the start of further processes. The ways take turns, so
that a machine that is busy for a while slows all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from prefopt_dist.files import write_json

RESULTS = Path(__file__).parent / "results"
SET_CHILD_SUBREAPER = 36
"""Linux's number of this request to `prctl`."""
LIMITS = {"max_length": 2048, "max_prompt_length": 1024}


def write_rows(file: Path, words: list[str], number: int) -> None:
    """Write pairs with prompts of about 150 words and responses of about 200."""
    draw = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=max(5, int(draw.gauss(mean, mean / 3)))))

    with file.open("w") as stream:
        for _ in range(number):
            turns = [{"role": "user", "content": text(150)}]
            chosen, rejected = ([*turns, {"role": "assistant", "content": text(200)}] for _ in range(2))
            stream.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


def ours(file: Path, tokenizer: Any, folder: Path, processes: int) -> None:
    """Tokenise with this number of processes."""
    from prefopt_dist.config import DataSource
    from prefopt_dist.data import prepare_rows, workers

    workers._cores = lambda: processes
    prepare_rows(
        [DataSource(str(file))],
        tokenizer=tokenizer,
        form="auto",
        template="auto",
        on_bad_row="stop",
        cache_dir=folder,
        vocab_size=len(tokenizer),
        say=lambda _: None,
        **LIMITS,
    )


def mapped(file: Path, tokenizer: Any, folder: Path, processes: int) -> None:
    """Do the same with `datasets.map`."""
    import datasets

    from prefopt_dist.data.forms import read_form
    from prefopt_dist.data.template import read_template
    from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser

    tokeniser: list[Tokeniser] = []

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not tokeniser:
            tokeniser.append(Tokeniser(read_template(tokenizer, "auto"), *LIMITS.values()))
        given = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        done = [row for row in tokeniser[0].encode([read_form("conversations", row, "all") for row in given])]
        found = [row for row in done if isinstance(row, TokenisedRow)]
        return {"ids": [[row.prompt, *row.responses] for row in found]}

    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    loaded.map(tokenise, batched=True, batch_size=256, num_proc=processes, remove_columns=loaded.column_names)


WAYS = {"prepare_rows": ours, "datasets.map": mapped}


def measure(way: str, processes: int, file: Path, tokenizer_folder: Path) -> tuple[float, float]:
    """Return the seconds of one way by the clock, and those of all its processes' work, which other work changes less.

    It is measured in a process of its own; importing the tokenizer there counts in the work, not by the clock.
    """
    folder = file.parent / f"{way}-{processes}"
    shutil.rmtree(folder, ignore_errors=True)
    before = _worked()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.tokenising", "--one", way, "--processes", str(processes)),
            *("--tokenizer", str(tokenizer_folder), "--folder", str(folder), "--file", str(file)),
        ],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1]), _worked() - before


def _worked() -> float:
    """Return the processor's seconds of all processes that this one started, when they have ended."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder, such as that of the demo's SFT model")
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--folder", type=Path, default=Path("runs/tokenising"))
    parser.add_argument("--save", default="tokenising")
    for hidden in ("--one", "--processes", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    from transformers import AutoTokenizer  # not at the top: the processes that are started read this file again

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    if asked.one is not None:
        began = time.perf_counter()
        WAYS[asked.one](Path(asked.file), tokenizer, asked.folder, int(asked.processes))
        print(time.perf_counter() - began)
        return
    # Processes whose parent has ended become this one's, so that their work is counted.
    assert ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1) == 0
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    words = [word for word in (tokenizer.decode([i]).strip() for i in range(len(tokenizer))) if word.isalpha()]
    found: list[dict[str, Any]] = []
    for rows in asked.rows:
        file = asked.folder / f"rows-{rows}.jsonl"
        write_rows(file, words, rows)
        ways = [(way, n) for n in (1, 2) for way in WAYS]
        speeds: dict[str, list[float]] = {f"{way}, {n}": [] for way, n in ways}
        work: dict[str, list[float]] = {name: [] for name in speeds}
        for _ in range(asked.rounds):
            for (way, n), name in zip(ways, speeds, strict=True):
                seconds, worked = measure(way, n, file, asked.tokenizer)
                speeds[name].append(rows / seconds)
                work[name].append(worked)
        print(f"{rows:,} rows; rows/s:", {name: [*map(round, speed)] for name, speed in speeds.items()}, flush=True)
        print("  processor's seconds:", {name: [round(s, 1) for s in many] for name, many in work.items()}, flush=True)
        middle = {name: median(speed) for name, speed in speeds.items()}
        gain = middle["prepare_rows, 2"] / middle["prepare_rows, 1"]
        beside = [middle[f"prepare_rows, {n}"] / middle[f"datasets.map, {n}"] for n in (1, 2)]
        print(f"  two processes {gain:.2f} of one; beside datasets.map {beside[0]:.2f} and {beside[1]:.2f}", flush=True)
        found.append({"rows": rows, "rows_per_second": speeds, "processor_seconds": work, "two_of_one": gain})
        file.unlink()
    write_json(RESULTS / f"{asked.save}.json", {"cores": os.cpu_count(), "found": found})


if __name__ == "__main__":
    main()
