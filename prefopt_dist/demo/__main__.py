"""`make demo`: a small task, SFT, pairs of the SFT model's own answers, preference training, and its result.

Started again, it resumes where it stopped; once it is done it shows the result at once. To start from the beginning,
remove the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from prefopt_dist import shipped
from prefopt_dist.demo import parts, result
from prefopt_dist.demo.jobs import JobFailed, run_concurrently, run_stage
from prefopt_dist.files import read_json, write_json

RECIPES = ("demo", "ipo", "simpo", "orpo", "kto", "lora", "dpo_sft", "rounds")


def main() -> int:
    """Run the stages that are not done and print the result; return 1 unless the model is better than its start.

    The verdict is "better" where the whole 95 % interval of the difference in reward is above 0.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m prefopt_dist.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order (default 0)")
    parser.add_argument(
        "--folder", type=Path, default=Path(parts.DEFAULT_FOLDER), help=f"default {parts.DEFAULT_FOLDER}"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="demo", help="recipe that follows the SFT (default demo)")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    began = time.monotonic()
    try:
        _run(options.folder, options.seed, options.recipe)
    except JobFailed as e:
        return e.status
    found = read_json(options.folder / "result.json")
    print(result.text(found, options.folder, time.monotonic() - began))
    return 0 if found["verdict"] == "better" else 1


def _run(folder: Path, seed: int, recipe: str) -> None:
    """Run all stages and write FOLDER/result.json."""
    if not (folder / "world" / "model" / "tokenizer_config.json").is_file():
        print("demo: making the data (letters), a tokenizer and a small Llama", flush=True)
        parts.make_world(folder, seed)
    run_stage("train", *_command("sft", folder, seed))
    run_stage("generate", *_command("pairs", folder, seed))
    parts.split_pairs(folder)
    run_stage("rounds" if recipe == "rounds" else "train", *_command(recipe, folder, seed))
    print("\ndemo: SFT on the chosen answers only, for comparison, and answers to unseen prompts", flush=True)
    judging = [sys.executable, "-m", "prefopt_dist.demo.judging", "--folder", str(folder), "--seed", str(seed)]
    first, *others = map(str, parts.CONTROL_RATES)
    run_concurrently([[*judging, "--recipe", recipe, "--controls", first], [*judging, "--controls", *others]])
    write_json(folder / "result.json", result.result_of(folder, seed, recipe))


def _command(recipe: str, folder: Path, seed: int) -> tuple[str, list[str]]:
    return shipped.path_here(parts.recipe_file(recipe)), parts.overrides(recipe, folder, seed)


if __name__ == "__main__":
    sys.exit(main())
