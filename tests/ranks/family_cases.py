"""Whole runs of tiny random models of many families: torchrun tests/ranks/family_cases.py FOLDER runs.

Each run proves its path, makes the step-0 check, trains, commits, exports and loads the export back by itself.
"""

import json
import os
import traceback
from pathlib import Path
from typing import Any

import case_runner
import models_for_tests
import rank_jobs
import tiny_families
import worlds

from prefopt_dist.commands import train
from prefopt_dist.config import load_config
from prefopt_dist.distributed import ranks

NAMED = [name for name in tiny_families.FAMILIES if name != "cohere"]
FAMILIES = [*models_for_tests.SHARING_FAMILIES, *NAMED]
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def write_model(folder: Path, family: str) -> None:
    fields = {"num_hidden_layers": 3}
    if family in tiny_families.FAMILIES:
        named = {k: v for k, v in tiny_families.FAMILIES[family].items() if v is not None}
        fields |= named
        if "vocab_size_per_layer_input" in named:
            fields["vocab_size_per_layer_input"] = json.loads((folder / "model" / "config.json").read_text())[
                "vocab_size"
            ]
    elif family in ("mixtral", "qwen3_moe", "olmoe"):
        fields |= EXPERTS
    if not (folder / family).exists():
        worlds.write_family(folder / family, folder / "model", family, **fields)


def run_of(folder: Path, family: str, name: str) -> Any:
    file = folder / f"{family}-{name}.yaml"

    def write() -> None:
        write_model(folder, family)
        worlds.write_run(
            file, folder / family, folder / "pairs.jsonl", folder / f"run-{family}-{name}",
            train={"max_steps": 3}, checkpoint={"every_steps": 1}, loss={"name": "dpo"},
        )  # fmt: skip

    ranks.run_on_rank_zero(write)
    return load_config(file)


def runs(folder: Path) -> dict[str, Any]:
    """An undisturbed run of each family, and one that fails in its third step and goes on with a new engine."""
    found: dict[str, Any] = {}
    asked = os.environ.get("FAMILIES", "")
    for family in asked.split() or FAMILIES:
        try:
            whole, again = (run_of(folder, family, name) for name in ("whole", "again"))
            train.run(whole)
            try:
                with rank_jobs.Crash(step=3):
                    train.run(again)
            except ConnectionAbortedError:
                train.run(again)
            ends = [ranks.run_on_rank_zero(lambda c=config: rank_jobs.the_end(c.run_dir)) for config in (whole, again)]
            facts = ranks.run_on_rank_zero(lambda c=whole: json.loads((c.run_dir / "run.json").read_text()))
            found[family] = {"ends": ends, "path": facts["path"]}
        except Exception:
            found[family] = {"error": traceback.format_exc()[-1500:]}
    return found


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 37)


if __name__ == "__main__":
    case_runner.serve(globals(), prepare)
