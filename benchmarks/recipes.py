"""Results of the demo's recipes on several seeds: python -m benchmarks.recipes --seeds 0 1 2 3 4.

Each seed has its own data and random weights. Its SFT model, its pairs and its controls (SFT on the chosen answers, the
best of three learning rates) are made once and shared by all recipes. Each recipe's model is judged by the true reward
of its answers to 400 prompts that are in no training data. The settings were chosen on other seeds (1000 and above). It
is one process; what is done already is reused, so the same command resumes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt_dist.commands import generate, rounds, train
from prefopt_dist.demo import parts, result
from prefopt_dist.demo.__main__ import RECIPES
from prefopt_dist.demo.judging import judge_control
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
QUIET = ("tracking.wandb.mode=disabled", "train.micro_batch_tokens=1024")
"""Settings that are faster on one thread; the layout does not change the result."""


def shared(folder: Path, seed: int) -> None:
    """Make a seed's data, SFT model, pairs and controls where they are missing."""
    if not (folder / "world" / "model" / "tokenizer_config.json").is_file():
        parts.make_world(folder, seed)
    _trained(parts.config_of("sft", folder, seed, *QUIET).run_dir, "sft", folder, seed)
    if not generate.run(parts.config_of("pairs", folder, seed, *QUIET)):
        raise UserError("stopped while generating; run the same command to resume")
    parts.split_pairs(folder)
    for rate in parts.CONTROL_RATES:
        if not judge_control(folder, seed, rate):
            raise UserError("a control was stopped; run the same command to resume")


def _trained(run_dir: Path, recipe: str, folder: Path, seed: int) -> None:
    if (run_dir / "DONE").exists():
        return
    stage = rounds if recipe == "rounds" else train
    stage.run(parts.config_of(recipe, folder, seed, *QUIET))
    if not (run_dir / "DONE").exists():
        raise UserError(f"{run_dir} was stopped; run the same command to resume")


def recipe_result(root: Path, seed: int, recipe: str) -> dict[str, Any]:
    """Return the result of a recipe on a seed; compute it where it is missing."""
    folder = root / f"seed-{seed}"
    file = folder / f"result-{recipe}.json"
    if not file.exists():
        shared(folder, seed)
        began = time.monotonic()
        _trained(parts.config_of(recipe, folder, seed).run_dir, recipe, folder, seed)
        parts.judge_answers(folder, seed, recipe, parts.config_of(recipe, folder, seed))
        write_json(file, result.result_of(folder, seed, recipe) | {"seconds": time.monotonic() - began})
    found: dict[str, Any] = read_json(file)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown, one line per recipe and seed."""
    lines = [
        "| recipe | seed | reward before | control | after | difference, 95 % | beyond the control, 95 % | win rate "
        "| KL, nats | accuracy | whole letters | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for r in found:
        reward, whole, apart = r["reward"], r["whole"], r["control_difference"]
        accuracy = "" if r["accuracy"] is None else f"{r['accuracy']:.2f}"
        lines.append(
            f"| {r['recipe']} | {r['seed']} | {reward['before']:.3f} | {r['control']:.3f} | {reward['after']:.3f} | "
            f"{reward['difference']:+.3f} ({reward['low']:+.3f} to {reward['high']:+.3f}) | "
            f"{apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f}) | {r['win_rate']:.2f} | "
            f"{r['kl']:.1f} | {accuracy} | {whole['before']:.1%} → {whole['after']:.1%} | {r['verdict']} |"
        )
    return "\n".join(lines)


def pooled(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown, one line per recipe over its seeds, with differences paired by prompt.

    Every seed has the same number of prompts.
    """
    lines = [
        "| recipe | seeds | better than the start | reward before → after | control | beyond the control, 95 % "
        "| KL, nats | whole letters |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | --- |",
    ]
    for recipe in dict.fromkeys(r["recipe"] for r in found):
        mine = [r for r in found if r["recipe"] == recipe]

        def mean(of: Callable[[dict[str, Any]], float], rows: Sequence[dict[str, Any]] = mine) -> float:
            return sum(map(of, rows)) / len(rows)

        beyond = mean(lambda r: r["control_difference"]["mean"])
        # The prompts of different seeds are independent, so their variances add up.
        half = mean(lambda r: (r["control_difference"]["high"] - r["control_difference"]["mean"]) ** 2) ** 0.5
        half /= len(mine) ** 0.5
        lines.append(
            f"| {recipe} | {len(mine)} | {sum(r['verdict'] == 'better' for r in mine)} | "
            f"{mean(lambda r: r['reward']['before']):.3f} → {mean(lambda r: r['reward']['after']):.3f} | "
            f"{mean(lambda r: r['control']):.3f} | {beyond:+.3f} ({beyond - half:+.3f} to {beyond + half:+.3f}) | "
            f"{mean(lambda r: r['kl']):.1f} | {mean(lambda r: r['whole']['before']):.1%} → "
            f"{mean(lambda r: r['whole']['after']):.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, print and save the table; return 1 where a recipe has not made the model better."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--save", metavar="NAME", default="recipes", help="results/NAME.json and NAME.md")
    options = parser.parse_args()
    ranks.start()
    found: list[dict[str, Any]] = []
    try:
        for seed in options.seeds:
            for recipe in options.recipes:
                found.append(recipe_result(options.folder, seed, recipe))
                print(f"\n{table(found[-1:])}\n", flush=True)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ranks.end()
    found.sort(key=lambda r: (options.recipes.index(r["recipe"]), r["seed"]))
    text = f"{pooled(found)}\n\n{table(found)}\n"
    print(f"\n{text}")
    write_json(RESULTS / f"{options.save}.json", found)
    (RESULTS / f"{options.save}.md").write_text(text)
    return 1 if any(r["verdict"] != "better" for r in found) else 0


if __name__ == "__main__":
    ranks.exit_now(main())
