"""`make demo`: a small world, a short SFT, then the whole DPO job on two CPU ranks; ends with a few plain lines.

Started again it goes on where it was, and shows the result at once where it is done; `rm -r runs/demo`
starts anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from prefopt_dist.demo.world import letters, write_model, write_world
from prefopt_dist.tracking.metrics_file import MetricsFile

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path("runs/demo")
TRAIN, EVALUATION, DEMONSTRATIONS, UNSEEN, PROMPTS = 2400, 400, 2400, 400, 800
SHOWN_SEED = 7
"""Seed of the prompts that are answered for show; far from those of the data files."""


def main() -> int:
    """Makes what is missing, runs both recipes, shows the result."""
    os.chdir(REPOSITORY)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable_progress_bar()
    began = time.monotonic()
    world = FOLDER / "world"
    if not (world / "model" / "tokenizer_config.json").is_file():
        print("demo: making a world of letters, a tokenizer and a small Llama", flush=True)
        sizes = {"train": TRAIN, "evaluation": EVALUATION, "demonstrations": DEMONSTRATIONS, "unseen": UNSEEN}
        sizes["prompts"] = PROMPTS
        write_world(world, **sizes)
        write_model(world / "model")
    for recipe in ("demo_sft", "demo"):
        print(f"\ndemo: launch/run.sh -n 2 train launch/recipes/{recipe}.yaml", flush=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PREFOPT_PYTHON": sys.executable}
        job = subprocess.Popen(["launch/run.sh", "-n", "2", "train", f"launch/recipes/{recipe}.yaml"], env=environment)
        with _passed_on(signal.SIGTERM, job):
            status = job.wait()
        if status != 0:
            return status
    print(_result(time.monotonic() - began))
    return 0


@contextmanager
def _passed_on(number: int, job: subprocess.Popen[bytes]) -> Iterator[None]:
    """A signal to this process goes to the job, which commits a checkpoint."""
    before = signal.signal(number, lambda *_: job.send_signal(number))
    try:
        yield
    finally:
        signal.signal(number, before)


def _result(seconds: float) -> str:
    rows = MetricsFile(FOLDER / "dpo" / "metrics.jsonl").rows()
    evals = [r for r in rows if r["kind"] == "eval"]
    first, last = evals[0], evals[-1]
    lines = [
        "",
        f"demo: done in {seconds:.0f} s. On {EVALUATION} pairs never trained on, before → after:",
        f"  prefers the fitting letter (log-prob):  {first['eval/logps/accuracies']:6.1%} → "
        f"{last['eval/logps/accuracies']:.1%}",
        f"  reward accuracy, against the start:     {first['eval/rewards/accuracies']:6.1%} → "
        f"{last['eval/rewards/accuracies']:.1%}   (at the start every pair is a tie)",
        f"  reward margin:                          {first['eval/rewards/margins']:6.2f} → "
        f"{last['eval/rewards/margins']:.2f}",
        f"  loss at the first step:                 {rows[1]['train/loss']:.4f} (ln 2 = 0.6931)",
    ]
    before, after = FOLDER / "sft" / "final", FOLDER / "dpo" / "final"
    for prompt in _shown_prompts():
        lines += ["", f"  {prompt}", f"    before: {_answer(before, prompt)}", f"    after:  {_answer(after, prompt)}"]
    lines += [
        "",
        f"  models: {before} and {after} (Hugging Face folders)",
        f"  curves: {FOLDER / 'dpo' / 'metrics.jsonl'};  what was read: {FOLDER / 'dpo' / 'run.json'}",
    ]
    return "\n".join(lines)


def _shown_prompts() -> list[str]:
    """One prompt to somebody formal and one to somebody casual."""
    stream = iter(letters(SHOWN_SEED))
    found: dict[bool, str] = {}
    while len(found) < 2:
        prompt, formal_fits, _, _ = next(stream)
        found.setdefault(formal_fits, prompt)
    return [found[True], found[False]]


def _answer(folder: Path, prompt: str) -> str:
    """The model's most likely answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    sys.exit(main())
