"""Speed of tokenising with one process and with two, beside `datasets.map`: python -m benchmarks.tokenising.

Rows of UltraFeedback-like length, written from the words of the demo's letters, go through the demo's tokenizer and
chat template. Every way has TOKENIZERS_PARALLELISM=false and does the same function; `datasets.map` writes the same
token ids. The time of starting the processes counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import AutoTokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import prepare_rows, workers
from prefopt_dist.data.forms import read_form
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.files import write_json

RESULTS = Path(__file__).parent / "results"
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


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder, such as that of the demo's SFT model")
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/tokenising"))
    parser.add_argument("--save", default="tokenising")
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    words = [word for word in (tokenizer.decode([i]).strip() for i in range(len(tokenizer))) if word.isalpha()]
    file = asked.folder / "rows.jsonl"
    write_rows(file, words, asked.rows)
    ways: dict[str, Callable[[int], None]] = {
        "prepare_rows": lambda n: ours(file, tokenizer, asked.folder / f"ours-{n}", n),
        "datasets.map": lambda n: mapped(file, tokenizer, asked.folder / f"map-{n}", n),
    }
    found: dict[str, Any] = {"rows": asked.rows, "cores": os.cpu_count(), "rows_per_second": {}}
    for processes in (1, 2):
        for name, way in ways.items():
            began = time.perf_counter()
            way(processes)
            found["rows_per_second"][f"{name}, {processes}"] = asked.rows / (time.perf_counter() - began)
            print(name, processes, round(found["rows_per_second"][f"{name}, {processes}"]))
    write_json(RESULTS / f"{asked.save}.json", found)


if __name__ == "__main__":
    main()
