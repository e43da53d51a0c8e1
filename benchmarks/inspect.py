"""Time and memory of `inspect` on many synthetic pairs: python -m benchmarks.inspect --pairs 1000000.

It writes the pairs, tokenises them as every stage does and looks for findings, and measures the time of both parts and
the memory, each in a process of its own. Faults are planted at a known rate, and all of them must be found. With --rows
it makes tokenised pairs directly.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

WORDS = "the a red green blue cat dog bird tree house runs sings sleeps over under near old new big small".split()
EVERY = 1000
"""Of this many pairs one repeats an earlier one, one contradicts an earlier one, and one has an empty response."""
EVAL = 1000
"""Number of evaluation pairs, all of which are in the training data too."""


def write_pairs(folder: Path, pairs: int, words: int, seed: int = 0) -> Counter[str]:
    """Write train.jsonl and eval.jsonl, with texts of 1 to 2·words − 1 words; return the rows of each kind of fault."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randrange(1, 2 * words)))

    planted: Counter[str] = Counter()
    with (folder / "train.jsonl").open("w") as train, (folder / "eval.jsonl").open("w") as held:
        for i in range(pairs):
            row = {"prompt": f"{i}: {text()}", "chosen": f"{text()}.", "rejected": f"{text()}!"}
            if i % EVERY == 0:
                earlier = row
            elif i % EVERY == 1:
                planted["duplicates"] += 1
                row = earlier
            elif i % EVERY == 2:
                planted["contradictions"] += 3  # both of the equal rows and this one
                row = earlier | {"chosen": earlier["rejected"], "rejected": earlier["chosen"]}
            elif i % EVERY == 3:
                planted["empty_response"] += 1
                row["rejected"] = ""
            elif i % EVERY == 4 and i < EVERY * EVAL:
                planted.update(["eval_pairs", "eval_prompts"])
                held.write(json.dumps(row) + "\n")
            train.write(json.dumps(row) + "\n")
    return planted


def write_run(folder: Path) -> None:
    """Write a tokenizer trained on such text, a model's configuration and a run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from prefopt_dist.demo.world import CHAT_TEMPLATE, SPECIAL

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[-1], chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2).save_pretrained(folder / "model")
    run = {
        "run": {"dir": str(folder / "run")},
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "on_bad_row": "drop"},
        "inspect": {"file": str(folder / "report.json")},
    }
    (folder / "run.yaml").write_text(json.dumps(run))


def measure_stage(folder: Path) -> dict[str, Any]:
    """Call the stage in a process of its own; return the seconds in total and of its parts, and memory in MiB."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inspect", "--stage", str(folder / "run.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": time.monotonic() - began} | found


def run_stage(run: str) -> None:
    """Run the stage; print the time of its parts and the process's peak memory."""
    from prefopt_dist.cli import main as door
    from prefopt_dist.commands import inspect

    took: Counter[str] = Counter()
    worked: Counter[str] = Counter()
    for name in ("prepared", "find"):
        _time(inspect, name, took, worked)
    with MemoryWatch() as watch:
        status = door(["inspect", run])
    assert status == 0
    print(json.dumps({"parts": took, "cpu": worked, "mib_at_start": watch.at_start, "mib_at_most": watch.at_most}))


def write_rows(folder: Path, n: int, seed: int = 0, vocabulary: int = 30_000, planted: bool = True) -> Counter[str]:
    """Write n tokenised pairs of random tokens and digests; every thousandth is repeated and contradicted.

    Args:
        folder: the folder to make.
        n: number of pairs.
        seed: of the random numbers.
        vocabulary: number of different tokens.
        planted: False to repeat and contradict none.
    """
    import numpy as np

    from prefopt_dist.data.column_files import ColumnWriter, content_digest, write_manifest
    from prefopt_dist.data.dataset import COLUMNS
    from prefopt_dist.data.row_counts import DataReport

    folder.mkdir()
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 60, 3 * n)
    digests = draw.integers(0, 256, (n, 2, 16)).astype(np.uint8)
    if planted:
        digests[1::EVERY] = digests[: n - 1 : EVERY]
        digests[2::EVERY] = digests[: n - 2 : EVERY, ::-1]
    values = {
        "tokens": draw.integers(0, vocabulary, lengths.sum()),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "digests": digests,
        "source": np.zeros(n),
        "line": np.arange(1, n + 1),
        "flags": np.zeros(n),
    }
    columns = {name: ColumnWriter(folder, name) for name in COLUMNS if name in values}
    for name, column in columns.items():
        column.append(values[name])
    files = {name: column.finish() for name, column in columns.items()}
    report = DataReport(n, n, {}, {}, {}, 0, "pair", {}, content_digest(files))
    write_manifest(folder, kind="pair", files=files, names=["rows"], weights=[1.0], report=report)
    return Counter(duplicates=len(digests[1::EVERY]), contradictions=3 * len(digests[2::EVERY]))


def measure_findings(folder: str) -> None:
    """Look for findings in tokenised rows, with the same rows as evaluation set, which is the most work possible."""
    from prefopt_dist.data import open_rows
    from prefopt_dist.data.quality.findings import group_equal, prompt_keys, row_findings, set_findings
    from prefopt_dist.data.quality.policy import rows_left
    from prefopt_dist.data.quality.report import SetReport

    rows = open_rows(Path(folder), checksums=False)
    with MemoryWatch() as watch:
        began, working = time.monotonic(), time.process_time()
        found = [*row_findings(rows, {"data.eval": rows}), *set_findings(rows, (1.0, 1.0), rows_left(rows.n, [], None))]
        prompts = len(group_equal(prompt_keys(rows)).first)
        SetReport.of("data.train", rows, found, None, "drop", prompts).text()
        took, worked = time.monotonic() - began, time.process_time() - working
    counts = {f.name: f.count for f in found if f.count}
    print(
        f"{rows.n:,} tokenised pairs, {counts}: {took:.1f} s ({worked:.1f} s of processor); "
        f"memory {watch.at_start:.0f} MiB at the start, {watch.at_most:.0f} MiB at most"
    )


class MemoryWatch:
    """Context that measures the peak memory of its block twenty times a second."""

    def __enter__(self) -> MemoryWatch:
        self.at_start = self.at_most = anonymous_mib()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._look)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.at_most = max(self.at_most, anonymous_mib())


def _time(module: Any, name: str, took: Counter[str], worked: Counter[str]) -> None:
    """Add up a function's seconds by the clock and of CPU time, which other processes do not change."""
    function = vars(module)[name]

    def timed(*arguments: Any) -> Any:
        began, working = time.monotonic(), time.process_time()
        result = function(*arguments)
        took[name] += time.monotonic() - began
        worked[name] += time.process_time() - working
        return result

    setattr(module, name, timed)


def anonymous_mib() -> float:
    """Return this process's memory in MiB without mapped files, which the kernel can free at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def main() -> None:
    """Print a table of two calls: the first tokenises the rows, the second reuses the tokenised rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=12, help="mean words of a prompt or response")
    parser.add_argument("--rows", type=int, help="make so many tokenised pairs directly, and only look for findings")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--look", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage is not None:
        run_stage(asked.stage)
        return
    if asked.look is not None:
        measure_findings(asked.look)
        return
    if asked.rows is not None:
        with tempfile.TemporaryDirectory(prefix="prefopt-inspect-") as made:
            print(f"planted: {dict(write_rows(Path(made) / 'rows', asked.rows))}", flush=True)
            # A process of its own, so that the memory for making the rows is not counted.
            subprocess.run([sys.executable, "-m", "benchmarks.inspect", "--look", f"{made}/rows"], check=True)
        return
    with tempfile.TemporaryDirectory(prefix="prefopt-inspect-") as made:
        folder = Path(made)
        planted = write_pairs(folder, asked.pairs, asked.words)
        write_run(folder)
        size = (folder / "train.jsonl").stat().st_size
        print(
            f"{asked.pairs:,} pairs of {size / asked.pairs:.0f} bytes, {planted.total():,} planted faults", flush=True
        )
        for what in ("first call", "again"):
            result = measure_stage(folder)
            parts, cpu = result["parts"], result["cpu"]
            print(
                f"{what:11s} {result['seconds']:7.1f} s in total; reading and tokenising {parts['prepared']:.1f} s "
                f"({asked.pairs / parts['prepared']:,.0f} pairs/s; {cpu['prepared']:.1f} s of processor), "
                f"findings {parts['find']:.1f} s ({cpu['find']:.1f} s of processor); "
                f"memory {result['mib_at_start']:.0f} MiB at the start, {result['mib_at_most']:.0f} MiB at most",
                flush=True,
            )
        report = json.loads((folder / "report.json").read_text())["data.train"]
        found = {f["name"]: f["count"] for f in report["findings"] if f["count"] and f["name"] != "few_rows"}
        assert found == planted, (found, planted)
        print(f"found: {', '.join(f'{count:,} {name}' for name, count in sorted(found.items()))}, all planted faults")


if __name__ == "__main__":
    main()
