"""Reward against KL for several values of beta, as in figure 2 of the DPO paper: python -m benchmarks.frontier.

The task is the demo's, whose true reward is computed by a program, so the reward gained per nat of KL from the start
can be measured. The start (the demo's SFT model, `make demo`) answers 1,200 prompts four times. The best and the worst
answer by a noisy judge form a pair. One first pass scores the pairs for all betas, and DPO trains on them equally long
for each beta. Reward and KL are measured on answers to 400 prompts that are in none of the demo's files. One process,
no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

from prefopt_dist.commands import evaluate, generate, train
from prefopt_dist.config import Config, load_config
from prefopt_dist.demo.parts import DEMONSTRATIONS, HELD_OUT, PROMPTS, UNSEEN
from prefopt_dist.demo.world import tasks
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, write_json
from prefopt_dist.monitoring.statistics import interval_text

RESULTS = Path(__file__).parent / "results"
BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)
RECIPE = "launch/recipes/demo_rounds.yaml"
FRESH = 400
"""Number of prompts on which reward and KL are measured."""
TRUE = 'generate.rewards=[{"function": "prefopt_dist.demo.reward:score"}]'
"""Override for the reward that the answers are measured by; the recipe's own reward makes the pairs."""


def write_fresh(file: Path) -> None:
    """Write the prompts that follow those of the demo's files in the task's stream, in which all are different."""
    used = DEMONSTRATIONS + PROMPTS + HELD_OUT + UNSEEN
    rows = [{"prompt": task.prompt} for task in islice(tasks(seed=0), used, used + FRESH)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def loss_of(beta: float, sft_per_beta: float) -> list[str]:
    """Return the overrides of the recipe for this beta."""
    return [f"loss.beta={beta}", f"loss.sft_weight={sft_per_beta * beta}"]


def run_all(
    recipe: str, folder: Path, betas: Sequence[float], sft_per_beta: float, settings: Sequence[str]
) -> dict[str, Any]:
    """Make the pairs once, then train and evaluate for each beta; what is done already is reused.

    settings: overrides of the recipe for all betas.
    """
    fresh = folder / "fresh.jsonl"
    write_fresh(fresh)
    common = [
        f"run.cache={folder / 'cache'}",
        f"generate.pairs={folder / 'pairs.jsonl'}",
        f"data.train={folder / 'pairs.jsonl'}",
        "tracking.wandb.mode=disabled",
        f"evaluate.prompts={fresh}",
        *settings,
    ]
    source = load_config(recipe)
    prompts = json.dumps([s.path for s in source.prompt_sources])
    common.append(f"generate.prompts={prompts}")
    pairs = load_config(recipe, [*common, f"run.dir={folder / 'pairs'}"])
    if not generate.run(pairs):
        raise UserError("stopped while generating; run the same command to resume")
    points = {}
    for beta in betas:
        of_beta = [TRUE, f"run.dir={folder / f'beta-{beta:g}'}", *loss_of(beta, sft_per_beta)]
        points[beta] = _point(load_config(recipe, [*common, *of_beta]))
    return {
        "sft_per_beta": sft_per_beta,
        "learning_rate": pairs.optim.learning_rate,
        "epochs": pairs.train.epochs,
        "pairs": read_json(folder / "pairs" / generate.FACTS)["pairs"],
        "prompts": points[betas[0]]["prompts"],
        "samples": pairs.evaluate.samples,
        "start": points[betas[0]]["start"],
        "points": [{"beta": beta, **point} for beta, point in points.items()],
    }


def _point(config: Config) -> dict[str, Any]:
    train.run(config)
    if not (config.run_dir / "DONE").exists():
        raise UserError(f"{config.run_dir} was stopped; run the same command to resume")
    evaluate.run(config)
    answers = read_json(config.run_dir / "evaluation.json")["answers"]
    scored = read_json(config.run_dir / "run.json")["reference"]
    return {
        "reward": answers["policy"]["reward"],
        "kl": answers["kl"],
        "win_rate": answers["win_rate"],
        "difference": answers["difference"],
        "tokens": answers["policy"]["tokens"],
        "start": answers["against"],
        "prompts": answers["prompts"],
        "sequences_scored": scored["sequences_scored"],
        "sequences_reused": scored["sequences_reused"],
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown, with 95 % intervals over prompts."""
    lines = [
        "| beta | KL from the start, nats | true reward | win rate against the start | sequences scored |",
        "| ---: | --- | --- | --- | ---: |",
        f"| the start | 0 | {interval_text(found['start']['reward'])} | | |",
    ]
    for p in found["points"]:
        cells = (interval_text(p[name]) for name in ("kl", "reward", "win_rate"))
        lines.append(f"| {p['beta']:g} | {' | '.join(cells)} | {p['sequences_scored']} |")
    return "\n".join(lines)


def faults(found: dict[str, Any]) -> list[str]:
    """Return the violations of: KL rises each time beta falls, and only the first beta needs the first pass."""
    points = sorted(found["points"], key=lambda p: -p["beta"])
    lines = [
        f"KL does not rise from beta {a['beta']:g} ({interval_text(a['kl'])}) "
        f"to {b['beta']:g} ({interval_text(b['kl'])})"
        for a, b in pairwise(points)
        if not a["kl"]["mean"] < b["kl"]["mean"]
    ]
    _, *others = found["points"]
    lines += [
        f"beta {p['beta']:g} scored {p['sequences_scored']} sequences again" for p in others if p["sequences_scored"]
    ]
    return lines


def plot(found: dict[str, Any], file: Path) -> None:
    """Plot the reward against KL, with a point for each beta."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prefopt"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.0, 3.4), layout="constrained")
    start = found["start"]["reward"]["mean"]
    points = sorted(found["points"], key=lambda p: p["kl"]["mean"])
    kls, rewards = ([p[name]["mean"] for p in points] for name in ("kl", "reward"))
    axis.plot([0.0, *kls], [start, *rewards], color="#7fc4a8", linewidth=1, zorder=1)
    for name, values, at in (("kl", kls, "xerr"), ("reward", rewards, "yerr")):
        half = [p[name]["high"] - v for p, v in zip(points, values, strict=True)]
        axis.errorbar(kls, rewards, **{at: half}, fmt="o", color="#1b7f5c", markersize=4, linewidth=0.8)
    axis.plot([0.0], [start], "s", color="#a8443a", markersize=4)
    axis.annotate("start", (0.0, start), textcoords="offset points", xytext=(7, -3), fontsize=8)
    for p, aside in zip(points, cycle([(-38, -3), (2, 7), (6, -11)]), strict=False):  # neighbours may lie close
        where = (p["kl"]["mean"], p["reward"]["mean"])
        axis.annotate(f"β = {p['beta']:g}", where, textcoords="offset points", xytext=aside, fontsize=8)
    axis.set_xlabel("KL(policy ‖ start) on the policy's answers, nats", fontsize=8)
    axis.set_ylabel("mean true reward", fontsize=8)
    axis.tick_params(labelsize=7)
    name = f"DPO + {found['sft_per_beta']:g}β·SFT" if found["sft_per_beta"] else "DPO"
    axis.set_title(
        f"{name} on {found['pairs']} pairs, {found['epochs']} epochs, {found['prompts']} unseen prompts", fontsize=9
    )
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Run what is missing, print the table, save JSON and plot; return 1 where `faults` finds a violation."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=RECIPE, help="a recipe of rounds: model, prompts, rewards, optimiser")
    parser.add_argument("--folder", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS))
    parser.add_argument("--sft-per-beta", type=float, default=0.0, help="the SFT term's weight over beta; 0: plain DPO")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--samples", type=int, default=4, help="answers to each unseen prompt")
    parser.add_argument("--save", metavar="NAME", default="frontier", help="results/NAME.json and NAME.svg")
    options = parser.parse_args()
    settings = (
        f"train.epochs={options.epochs}",
        f"optim.learning_rate={options.learning_rate}",
        f"evaluate.samples={options.samples}",
    )
    began = time.monotonic()
    ranks.start()
    try:
        found = run_all(options.recipe, options.folder, options.betas, options.sft_per_beta, settings)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ranks.end()
    lines = faults(found)
    print(f"\n{table(found)}\n{time.monotonic() - began:.0f} s")
    write_json(RESULTS / f"{options.save}.json", found)
    plot(found, RESULTS / f"{options.save}.svg")
    print("\n".join(lines) or "KL rises each time beta falls; one first pass served every beta")
    return 1 if lines else 0


if __name__ == "__main__":
    ranks.exit_now(main())
