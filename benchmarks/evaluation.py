"""Compare `evaluate` with TRL's evaluation on the same models and rows: python -m benchmarks.evaluation.

Policy and reference are two small random models, float32 on one CPU thread. Ours is the stage itself, with two token
budgets; TRL's is `DPOTrainer.evaluate`. The exit status is 1 where accuracy or margins differ.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.floor import Shape
from benchmarks.pairs import Lengths, Mix, draw_pairs
from benchmarks.world import text, write_model

SHAPE = Shape(vocabulary=211, hidden=48, mlp=96, layers=2, heads=4, key_value_heads=2, head_size=12, tied=True)
LENGTHS = Mix(Lengths(12, 0.5, 4, 30), Lengths(14, 0.7, 2, 40))
PAIRS, BATCH = 96, 8
BETA = 0.1
TOLERANCE = 1e-4
"""Relative difference of a value that float32 with another packing explains."""


def main() -> int:
    """Print both evaluations side by side; return 1 where they differ."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, which in enumerate(("policy", "reference")):
            write_model(folder / which, SHAPE, "float32", seed)
        pairs = draw_pairs(LENGTHS, PAIRS, SHAPE.vocabulary)
        # TRL appends an end token to a response without one; our responses are drawn with one.
        rows = [
            {"prompt": text(p) + " ", "chosen": text(c[:-1]) + " ", "rejected": text(r[:-1]) + " "} for p, c, r in pairs
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        theirs = _theirs(folder, pairs)
        found = [_ours(folder, tokens) for tokens in (512, 4096)]
    print(f"{PAIRS} pairs            {'TRL':>12} {'512 tokens':>12} {'4096 tokens':>12}")
    right = True
    for metric in ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
        values = [theirs[f"eval_{metric}"], *(f[f"eval/{metric}"] for f in found)]
        print(f"{metric:20} {values[0]:12.6f} {values[1]:12.6f} {values[2]:12.6f}")
        tolerance = 1e-6 if metric == "rewards/accuracies" else TOLERANCE * max(abs(values[0]), 0.01)
        right &= all(abs(value - values[0]) <= tolerance for value in values)
    print("equal" if right else "NOT equal")
    return 0 if right else 1


def _ours(folder: Path, tokens: int) -> dict[str, Any]:
    from prefopt_dist.cli import main as door

    config = {
        "run": {"dir": str(folder / f"ours-{tokens}")},
        "model": {"name_or_path": str(folder / "policy"), "dtype": "float32"},
        "reference": {"name_or_path": str(folder / "reference"), "micro_batch_tokens": tokens},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "pairs.jsonl"), "template": "none"},
        "loss": {"name": "dpo", "beta": BETA},
        "train": {"micro_batch_tokens": tokens},
        "tracking": {"wandb": {"mode": "disabled"}},
        "evaluate": {"model": str(folder / "policy")},
    }
    file = folder / f"{tokens}.yaml"
    file.write_text(json.dumps(config))
    status = door(["evaluate", str(file)])
    assert status == 0
    found: dict[str, Any] = json.loads((folder / f"ours-{tokens}" / "evaluation.json").read_text())
    return found


def _theirs(folder: Path, pairs: list[tuple[list[int], list[int], list[int]]]) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in pairs])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference"),
        args=DPOConfig(
            output_dir=str(folder / "peer"),
            per_device_eval_batch_size=BATCH,  # divides the rows: TRL's means are of batches
            beta=BETA,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    found: dict[str, float] = trainer.evaluate()
    return found


if __name__ == "__main__":
    sys.exit(main())
