"""Train in many ways, some of which wreck the model, and check that the job reports it: python -m benchmarks.collapse.

The job has no reward here: it judges by the log-probs of 64 answers of the start and of the trained model, and in the
first half of the run only by the log-probs of the chosen responses. The true reward of the answers to 400 prompts that
are in no training data decides whether a run is wrecked: the reward fell, with the whole 95 % interval of the
difference (paired by prompt) below 0, and under half of the answers are whole letters. Each seed has its own data and
random weights; the thresholds were found on seeds of 1000 and above.

Worlds: `letters`, of the tests (tests/helpers/letters.py), and `demo`, whose SFT model and pairs are those of
`python -m prefopt_dist.demo --seed N --folder FOLDER/demo-N`, made here where they are missing. The result of a run is
FOLDER/WORLD-SEED/ways/WAY.json; a result that exists is not computed again. One process, no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from prefopt_dist.commands import export, generate, train
from prefopt_dist.config import load_config
from prefopt_dist.demo import parts
from prefopt_dist.demo import reward as demo_reward
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, write_json
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import interval
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, load_for_sampling
from tests.helpers import letters

RECIPES = Path("launch/recipes")
RESULTS = Path(__file__).parent / "results"
SEEN, NEW_TOKENS = 64, 96
"""Prompts that the job answers, and tokens of an answer."""
QUIET = ["checkpoint.every_steps=null", "tracking.wandb.mode=disabled", "train.micro_batch_tokens=1024"]
"""Settings that are faster on one thread; the layout does not change the result."""


@dataclass(frozen=True)
class Way:
    """One way to train."""

    settings: tuple[str, ...]
    """Overrides of the world's DPO recipe"""
    start: str = "sft"
    """Start of the training: sft; in the world `letters` also narrow (SFT on letters of one tone) or model (random
    weights)"""
    data: str = "train"
    due: str = ""
    """Expected outcome: `wrecks`, or empty for a healthy run"""


ONE, SFT_TERM = "train.epochs=1", "loss.sft_weight=1"
LETTERS_DPO = {
    "run": {"dir": "runs/letters"},
    "model": {"name_or_path": "model", "dtype": "float32"},
    "data": {"train": "train.jsonl", "max_length": 256, "max_prompt_length": 128},
    "loss": {"name": "dpo", "beta": 0.5},
    "optim": {"learning_rate": 1.5e-4},
    "train": {"epochs": 2, "global_batch_pairs": 32},
}
"""An earlier recipe of the demo, which wrecks the model."""
LETTERS_SFT = ("loss.name=sft", "optim.learning_rate=4e-3", "optim.schedule=cosine", "train.epochs=3")
LETTERS_LORA = ("lora.r=8", "lora.alpha=16", "optim.learning_rate=2e-3", ONE)
LETTERS = {
    "dpo": Way((), due="wrecks"),
    "lora": Way(LETTERS_LORA, due="wrecks"),
    "dpo-rate": Way((ONE, "optim.learning_rate=1.5e-3"), due="wrecks"),
    "dpo-beta": Way((ONE, "loss.beta=0.005", "optim.learning_rate=5e-4"), due="wrecks"),
    "dpo-small": Way((ONE, "train.global_batch_pairs=8", "optim.schedule=constant"), due="wrecks"),
    "narrow": Way((SFT_TERM, "optim.learning_rate=2e-3"), start="narrow"),
    "orpo": Way(("loss.name=orpo", "loss.beta=1.0", "optim.learning_rate=4e-3", "train.epochs=3"), start="model"),
}
DEMO: dict[str, Way] = {
    "dpo-rate": Way(("loss.sft_weight=0", "optim.learning_rate=3e-3"), due="wrecks"),
    "dpo-beta": Way(("loss.sft_weight=0", "loss.beta=0.005", "optim.learning_rate=1e-3"), due="wrecks"),
    "hinge-rate": Way(("loss.name=hinge", "loss.beta=0.02", "optim.learning_rate=1.5e-3"), due="wrecks"),
}


@dataclass(frozen=True)
class Start:
    """The files that a way of training starts with."""

    model: Path
    data: Path
    recipe: Path
    """Recipe of DPO in this world"""
    unseen: Path


@dataclass(frozen=True)
class World:
    """A synthetic task: its ways of training, its data and its true reward."""

    ways: dict[str, Way]
    start: Callable[[Path, int, Way], Start]
    """Function that makes the files of a seed in a folder where they are missing"""
    score: Callable[[str, str, dict[str, Any]], float]
    whole: Callable[[str, str], bool]


def start_of_letters(here: Path, seed: int, way: Way) -> Start:
    """Write the letters of a seed and train the start; narrow.jsonl has only demonstrations in the casual tone."""
    data = here / "world"
    if not (data / "model" / "tokenizer_config.json").exists():
        letters.write_world(data, train=2400, evaluation=400, demonstrations=2400, unseen=400, seed=seed)
        casual = [{"prompt": p, "completion": text} for p, _, _, text in islice(letters.letters(seed), 2800, 5200)]
        (data / "narrow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in casual))
        letters.write_model(data / "model", seed=seed)
    recipe = here / "dpo.yaml"
    recipe.write_text(json.dumps(LETTERS_DPO))  # JSON is YAML
    model = data / "model"
    if way.start != "model":
        here_from = [f"model.name_or_path={model}", f"data.train={data / way.start}.jsonl", "answers.number=0"]
        model = _train(here / f"start-{way.start}", recipe, [*LETTERS_SFT, *here_from])
    return Start(model, data / f"{way.data}.jsonl", recipe, data / "unseen.jsonl")


def start_of_demo(here: Path, seed: int, way: Way) -> Start:
    """Make the demo's data, SFT model and pairs of a seed where they are missing."""
    if not (here / "world" / "model" / "tokenizer_config.json").exists():
        parts.make_world(here, seed)
    sft = parts.config_of("sft", here, seed, *QUIET)
    if not (sft.run_dir / "DONE").exists():
        train.run(sft)
    if not (here / "pairs" / "train.jsonl").exists():
        generate.run(parts.config_of("pairs", here, seed))
        parts.split_pairs(here)
    recipe = parts.recipe_file("demo")
    return Start(here / "sft" / "final", here / "pairs" / f"{way.data}.jsonl", recipe, here / "world" / "unseen.jsonl")


def whole_of_letters(prompt: str, answer: str) -> bool:
    """Return whether the answer is a whole letter of either tone."""
    to, name, event = prompt.removeprefix("Write to my ").removesuffix(".").replace(" that ", " ", 1).split(" ", 2)
    both = letters.FORMAL + letters.CASUAL
    return any(answer == text.format(to=to, name=name, event=event) for text in both)


WORLDS = {
    "letters": World(LETTERS, start_of_letters, letters.score, whole_of_letters),
    "demo": World(DEMO, start_of_demo, demo_reward.score, demo_reward.is_whole),
}


def _train(run_dir: Path, recipe: Path, settings: Sequence[str]) -> Path:
    """Train without a reward unless that is done; return the folder of the whole model."""
    fixed = [f"run.dir={run_dir}", f"run.cache={run_dir.parent / 'cache'}", "data.eval=null", *QUIET]
    config = load_config(recipe, [*settings, *fixed, "generate.rewards=[]"]).with_cache()
    train.run(config)
    if not (run_dir / "DONE").exists():
        raise UserError(f"{run_dir} was stopped; run the same command to resume")
    if config.lora is None:
        return run_dir / "final"
    merged = run_dir / "merged"
    if not merged.exists():
        export.run(replace(config, export=replace(config.export, merged=True, dir=str(merged))))
    return merged


def answers_of(path: Path, prompts: Sequence[str], seed: int) -> list[str]:
    """Return an answer at temperature 1 to each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    asked = [Prompt(i, "", text, None, {}, ids[i]) for i, text in enumerate(prompts)]
    sampling = Sampling(1, 1.0, 1.0, NEW_TOKENS, seed, (tokenizer.eos_token_id,))
    model = load_for_sampling(inspect_folder(path, "model"), dtype=torch.float32, device=torch.device("cpu"))
    engine = TransformersEngine(model, str(path), batch_tokens=16384)
    texts = [str(tokenizer.decode(one[0], skip_special_tokens=True)) for one in engine.sample(asked, sampling)]
    engine.close()
    return texts


def truth(world: World, policy: Path, start: Path, unseen: Path, seed: int) -> dict[str, Any]:
    """Return the true reward of both models' answers, and whether the run is wrecked by it."""
    prompts = [json.loads(line)["prompt"] for line in unseen.read_text().splitlines()]
    texts = answers_of(policy, prompts, seed + 1), answers_of(start, prompts, seed)
    rewards, whole = (
        np.array([[of(prompt, text) for prompt, text in zip(prompts, said, strict=True)] for said in texts])
        for of in (lambda prompt, text: world.score(prompt, text, {}), world.whole)
    )
    apart = interval(rewards[0] - rewards[1])
    assert apart["high"] is not None
    after, before = whole.mean(1)
    return {
        "reward": {"before": float(rewards[1].mean()), "after": float(rewards[0].mean()), "difference": apart},
        "whole": {"before": float(before), "after": float(after)},
        "wrecked": bool(apart["high"] < 0 and after < 0.5),
        "shown": [list(one) for one in zip(prompts[:3], texts[0][:3], strict=True)],
    }


def run_way(world: World, here: Path, seed: int, name: str) -> dict[str, Any]:
    """Return what the job reports about a way of training, beside the true reward."""
    way, began = world.ways[name], time.monotonic()
    start = world.start(here, seed, way)
    run_dir = here / "ways" / name
    settings = [*way.settings, f"model.name_or_path={start.model}", f"data.train={start.data}", f"run.seed={seed}"]
    settings += [f"answers.prompts={start.unseen}", f"answers.number={SEEN}", f"answers.max_new_tokens={NEW_TOKENS}"]
    final = _train(run_dir, start.recipe, settings)
    facts = read_json(run_dir / "run.json")
    reported = {finding["id"]: finding["step"] for finding in reversed(facts["health"])}
    steps = facts["training"]["total_steps"]
    last = [row for row in MetricsFile(run_dir / "metrics.jsonl").rows() if row["kind"] == "answers"][-1]
    early = reported.get("likelihood-displaced")
    return {
        "way": name,
        "seed": seed,
        "due": way.due,
        **truth(world, final, start.model, start.unseen, seed),
        "verdict": facts["answers"]["verdict"],
        "collapsed": "answers-collapsed" in reported,
        "displaced_at": None if early is None else early / steps,
        "measures": {k.removeprefix("answers/"): v for k, v in last.items() if k.startswith("answers/")},
        "seconds": time.monotonic() - began,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown, one line per run."""
    lines = [
        "| way | seed | true reward | whole | wrecked | verdict | displaced at "
        "| reference's nats on start, chosen, policy | own |",
        "| --- | ---: | --- | ---: | --- | --- | ---: | --- | ---: |",
    ]
    for f in found:
        m, r = f["measures"], f["reward"]
        at = "" if f["displaced_at"] is None else f"{f['displaced_at']:.0%}"
        chosen = m.get("chosen/reference_nats", float("nan"))
        lines.append(
            f"| {f['way']} | {f['seed']} | {r['before']:.2f} → {r['after']:.2f} | {f['whole']['after']:.0%} | "
            f"{'yes' if f['wrecked'] else ''} | {f['verdict']} | {at} | {m['start/reference_nats']:.2f}, {chosen:.2f}, "
            f"{m['reference_nats']:.2f} | {m['nats']:.2f} |"
        )
    return "\n".join(lines)


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown, one line per way."""
    lines = [
        "| way | runs | wrecked by the true reward | of them collapsed | displaced before half | true reward | whole |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name in dict.fromkeys(f["way"] for f in found):
        mine = [f for f in found if f["way"] == name]
        wrecked = [f for f in mine if f["wrecked"]]
        early = sum(f["displaced_at"] is not None and f["displaced_at"] <= 0.5 for f in mine)
        others = sum(f["collapsed"] for f in mine) - sum(f["collapsed"] for f in wrecked)
        before, after, whole = (
            np.mean([f["reward"]["before"] for f in mine]),
            np.mean([f["reward"]["after"] for f in mine]),
            np.mean([f["whole"]["after"] for f in mine]),
        )
        lines.append(
            f"| {name} | {len(mine)} | {len(wrecked)} | {sum(f['collapsed'] for f in wrecked)}"
            f"{f' (and {others} others)' if others else ''} | {early} | {before:.2f} → {after:.2f} | {whole:.0%} |"
        )
    return "\n".join(lines)


def faults(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each run in which the job's report differs from the true reward."""
    messages = []
    for f in found:
        if f["wrecked"] != f["collapsed"]:
            messages.append(f"{f['way']}, seed {f['seed']}: wrecked {f['wrecked']}, collapsed {f['collapsed']}")
        if not f["due"] and f["displaced_at"] is not None:
            at = f"{f['displaced_at']:.0%}"
            messages.append(f"{f['way']}, seed {f['seed']}: healthy, but likelihood-displaced at {at}")
    return messages


def main() -> int:
    """Run what is missing, print and save the tables; return 1 where the job's report and the true reward differ."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse", description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, default="letters")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--ways", nargs="+", metavar="WAY")
    parser.add_argument("--folder", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--save", metavar="NAME", help="results/NAME.json and NAME.md")
    options = parser.parse_args()
    world = WORLDS[options.world]
    torch.set_num_threads(1)
    ranks.start()
    found: list[dict[str, Any]] = []
    try:
        for seed in options.seeds:
            for name in options.ways or world.ways:
                here = options.folder / f"{options.world}-{seed}"
                file = here / "ways" / f"{name}.json"
                if not file.exists():
                    write_json(file, run_way(world, here, seed, name))
                found.append(read_json(file))
                print(table(found[-1:]).splitlines()[-1], flush=True)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ranks.end()
    text = f"{summary(found)}\n\n{table(found)}\n"
    print(f"\n{text}")
    for fault in faults(found):
        print(f"differs: {fault}")
    if options.save:
        write_json(RESULTS / f"{options.save}.json", found)
        (RESULTS / f"{options.save}.md").write_text(text)
    return 1 if faults(found) else 0


if __name__ == "__main__":
    ranks.exit_now(main())
