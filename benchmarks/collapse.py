"""Train in many ways, some of which wreck the model, and save what its answers tell: python -m benchmarks.collapse

For the health rules that are to know a wrecked run by the model's own answers, with no reward at hand. Each seed makes
a world of its own with its start; each way trains from it, and start and trained model answer 400 unseen prompts at
temperature 1. Whether a run is wrecked the world's true reward says: it fell beyond the 95 % interval of the answers
paired by prompt, and under half of the answers are whole. What the rule may look at is of the first 64 of them.

A run's figures are saved as FOLDER/WORLD-SEED/WAY.json; what is there is not made again. One process, no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_dist.config import load_config
from prefopt_dist.demo import world as letters_world
from prefopt_dist.demo.__main__ import DEMONSTRATIONS, EVALUATION, TRAIN
from prefopt_dist.demo.reward import score
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, write_json
from prefopt_dist.generation.comparison import interval
from prefopt_dist.generation.prompts import Prompt
from prefopt_dist.generation.sampling import Sampling
from prefopt_dist.generation.transformers_engine import TransformersEngine
from prefopt_dist.generation.whole_model import padded
from prefopt_dist.model.load import inspect_folder
from prefopt_dist.stages import export, train
from prefopt_dist.tracking.metrics_file import MetricsFile

RECIPES = Path("launch/recipes")
UNSEEN, SEEN = 400, 64
"""Prompts that the true reward is of, and the first of them, which the rule may look at."""
NEW_TOKENS = 64
PARTS = 10
"""Windows of a run, for the early evidence."""


@dataclass(frozen=True)
class World:
    """What a world can do; another one is another entry of WORLDS."""

    write: Callable[[Path, int], None]
    """Writes train, rated, sft, narrow and unseen.jsonl and the folder model, of a seed"""
    score: Callable[[str, str], float]
    """The true reward of an answer to a prompt"""
    whole: Callable[[str, str], bool]
    """Whether it is one that somebody could have written, liked or not"""


def write_letters(folder: Path, seed: int) -> None:
    """The demo's world; narrow.jsonl: its demonstrations in the casual tone alone."""
    sizes = {"train": TRAIN, "evaluation": EVALUATION, "demonstrations": DEMONSTRATIONS, "unseen": UNSEEN}
    letters_world.write_world(folder, **sizes, seed=seed)
    stream = islice(letters_world.letters(seed), TRAIN + EVALUATION, TRAIN + EVALUATION + DEMONSTRATIONS)
    casual = [json.dumps({"prompt": prompt, "completion": text}) for prompt, _, _, text in stream]
    (folder / "narrow.jsonl").write_text("\n".join(casual) + "\n")
    letters_world.write_model(folder / "model", seed=seed)


def whole_letter(prompt: str, answer: str) -> bool:
    """A whole letter of either tone, which the true reward does not tell from a fitting greeting and close."""
    to, name, event = prompt.removeprefix("Write to my ").removesuffix(".").replace(" that ", " ", 1).split(" ", 2)
    both = letters_world.FORMAL + letters_world.CASUAL
    return any(answer == letter.format(to=to, name=name, event=event) for letter in both)


WORLDS = {"letters": World(write_letters, lambda prompt, answer: score(prompt, answer, {}), whole_letter)}


@dataclass(frozen=True)
class Way:
    """One way to train."""

    recipe: str
    settings: tuple[str, ...] = ()
    start: str = "sft"
    """sft, narrow (SFT on narrow.jsonl) or model (random weights)"""
    data: str = "train"


SFT_TERM = "loss.sft_weight=1"
ONE = "train.epochs=1"
WAYS = {
    # As the recipes are, and ways that were thought to wreck.
    "demo": Way("demo"),
    "lora": Way("demo_lora"),
    "dpo-rate": Way("demo", (ONE, "optim.learning_rate=1.5e-3")),
    "dpo-beta": Way("demo", (ONE, "loss.beta=0.005", "optim.learning_rate=5e-4")),
    "dpo-small": Way("demo", (ONE, "train.global_batch_pairs=8", "optim.schedule=constant")),
    "ipo-rate": Way("demo_ipo", ("loss.beta=0.02", "optim.learning_rate=1.5e-3")),
    "kto-rate": Way("demo_kto", ("loss.beta=0.05", "optim.learning_rate=3e-3"), data="rated"),
    "simpo-beta": Way("demo_simpo", ("loss.beta=50", "loss.gamma=25", "optim.learning_rate=1e-3")),
    "hinge": Way("demo", (ONE, "loss.name=hinge", "loss.beta=0.02", "optim.learning_rate=5e-4")),
    # Ways with a cure or a small rate, and those of other losses; the short ones end in the middle of the way.
    "dpo-sft": Way("demo", (SFT_TERM,)),
    "dpo-sft-short": Way("demo", (ONE, SFT_TERM)),
    "dpo-sft-rate": Way("demo", (ONE, SFT_TERM, "optim.learning_rate=1.5e-3")),
    "dpo-low": Way("demo", (ONE, "optim.learning_rate=3e-5")),
    "ipo": Way("demo_ipo"),
    "simpo": Way("demo_simpo"),
    "kto": Way("demo_kto", data="rated"),
    "narrow": Way("demo", (SFT_TERM, "optim.learning_rate=2e-3"), start="narrow"),
    "narrow-short": Way("demo", (ONE, SFT_TERM, "optim.learning_rate=1e-3"), start="narrow"),
    "orpo": Way("demo_orpo", start="model"),
    "sft-chosen": Way("demo_sft", (ONE, "optim.learning_rate=1e-3")),
}


def trained(recipe: str, folder: Path, model: Path, data: Path, settings: Sequence[str] = ()) -> Path:
    """Trains where that is not done; the folder of the whole model."""
    fixed = [f"run.dir={folder}", f"run.cache={folder.parent / 'cache'}", f"model.name_or_path={model}"]
    fixed += [f"data.train={data}", "data.eval=null", "checkpoint.every_steps=null", "tracking.wandb.mode=disabled"]
    fixed.append("train.micro_batch_tokens=1024")  # quicker on one thread
    config = load_config(RECIPES / f"{recipe}.yaml", [*fixed, *settings])
    train.run(config)
    if not (folder / "DONE").exists():
        raise UserError(f"{folder} was stopped; the same command goes on")
    if config.lora is None:
        return folder / "final"
    merged = folder / "merged"
    if not merged.exists():
        export.run(replace(config, export=replace(config.export, merged=True, dir=str(merged))))
    return merged


@dataclass(frozen=True)
class Model:
    """A model folder with its answers to the unseen prompts."""

    path: Path
    tokenizer: Any
    prompts: list[list[int]]
    answers: list[list[int]]

    @classmethod
    def answering(cls, path: Path, prompts: Sequence[str], seed: int) -> Model:
        """Answers at temperature 1, each with its end token where it ended."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
        asked = [Prompt(i, "", text, None, {}, ids[i]) for i, text in enumerate(prompts)]
        sampling = Sampling(
            n=1, temperature=1.0, top_p=1.0, max_new_tokens=NEW_TOKENS, seed=seed, stop_ids=(tokenizer.eos_token_id,)
        )
        folder = inspect_folder(path, "model")
        engine = TransformersEngine(folder, dtype=torch.float32, device=torch.device("cpu"), batch_tokens=16384)
        answers = [one[0] for one in engine.sample(asked, sampling)]
        engine.close()
        return cls(path, tokenizer, ids, answers)

    def texts(self) -> list[str]:
        """The answers without their end."""
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in self.answers]

    @torch.inference_mode()
    def nats(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """−log π(answer | prompt) of each."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        lines = [p + a for p, a in zip(prompts, answers, strict=True)]
        ids, mask = padded(lines, self.tokenizer.pad_token_id, "right", torch.device("cpu"))
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        of_tokens = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        spans = [(len(p) - 1, len(p) + len(a) - 1) for p, a in zip(prompts, answers, strict=True)]
        return [-float(of_tokens[i, a:b].double().sum()) for i, (a, b) in enumerate(spans)]


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """The share of an answer's n-grams that stood in it before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def evidence(policy: Model, start: Model, chosen: Sequence[str]) -> dict[str, Any]:
    """What the rule may look at, of the first prompts; the start is the reference. Per token all tokens weigh alike."""
    prompts, end = policy.prompts[:SEEN], start.tokenizer.eos_token_id
    own, before = policy.answers[:SEEN], start.answers[:SEEN]
    liked = [[*start.tokenizer(text, add_special_tokens=False).input_ids, end] for text in chosen[:SEEN]]
    of = {"R_pol": (start, own), "R_own": (start, before), "R_chosen": (start, liked), "P_own": (policy, own)}
    of |= {"P_chosen": (policy, liked), "P_start": (policy, before)}
    sums = {name: model.nats(prompts, answers) for name, (model, answers) in of.items()}
    found: dict[str, Any] = {name: sum(sums[name]) / sum(map(len, answers)) for name, (_, answers) in of.items()}
    for name, model in (("", policy), ("start_", start)):
        answers = model.answers[:SEEN]
        found[f"{name}ended"] = float(np.mean([ids[-1] == end for ids in answers]))
        found[f"{name}repeated"] = float(np.mean([repeated(ids) for ids in answers]))
        found[f"{name}distinct"] = len(set(map(tuple, answers))) / SEEN
        found[f"{name}tokens"] = float(np.mean([len(ids) for ids in answers]))
    return found | {"sums": sums, "lengths": {name: [len(ids) for ids in answers] for name, (_, answers) in of.items()}}


def falls(folder: Path) -> list[float | None]:
    """At the end of each part of a run: how far the chosen log-prob has fallen, over what the reference gives it."""
    rows = [row for row in MetricsFile(folder / "metrics.jsonl").rows() if row["kind"] == "train"]
    chosen = [row.get("train/logps/chosen") for row in rows]
    ratios = [row.get("train/logratio/chosen") for row in rows]
    edges = [round(len(rows) * k / PARTS) for k in range(PARTS + 1)]

    def mean(values: Sequence[float | None], k: int) -> float:
        there = [v for v in values[edges[k] : edges[k + 1]] if v is not None]
        return sum(there) / len(there) if there else math.nan

    found = []
    for k in range(PARTS):
        now, ratio = mean(chosen, k), mean(ratios, k)
        before = mean(chosen, 0) if math.isnan(ratio) else now - ratio
        found.append(None if math.isnan(now) else (now - before) / -before)
    return found


def judged(world: World, policy: Model, start: Model, prompts: Sequence[str]) -> dict[str, Any]:
    """The true reward of both, and whether the run is wrecked by it."""
    asked = list(zip(prompts, policy.texts(), start.texts(), strict=True))
    rewards = np.array([[world.score(prompt, text) for text in texts] for prompt, *texts in asked])
    wholes = np.mean([[world.whole(prompt, text) for text in texts] for prompt, *texts in asked], axis=0)
    apart = interval(rewards[:, 0] - rewards[:, 1])
    assert apart["high"] is not None
    return {
        **dict(zip(("reward", "start_reward"), rewards.mean(0).tolist(), strict=True)),
        **dict(zip(("whole", "start_whole"), wholes.tolist(), strict=True)),
        "difference": apart,
        "wrecked": bool(apart["high"] < 0 and wholes[0] < 0.5),
        "shown": asked[:6],
    }


def one_run(name: str, seed: int, folder: Path, way: str) -> dict[str, Any]:
    """World and start where they are missing, then the way."""
    world, here, began = WORLDS[name], folder / f"{name}-{seed}", time.monotonic()
    data, plan = here / "world", WAYS[way]
    if not (data / "model" / "tokenizer_config.json").exists():
        world.write(data, seed)
    begin = data / "model"
    if plan.start != "model":
        begin = trained("demo_sft", here / f"start-{plan.start}", begin, data / f"{plan.start}.jsonl")
    setup = time.monotonic() - began
    final = trained(plan.recipe, here / way, begin, data / f"{plan.data}.jsonl", plan.settings)
    rows = [json.loads(line) for line in (data / "unseen.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    start, policy = Model.answering(begin, prompts, seed), Model.answering(final, prompts, seed + 1)
    found = judged(world, policy, start, prompts)
    found |= evidence(policy, start, [row["chosen_response"] for row in rows])
    found |= {"falls": falls(here / way), "way": way, "of": asdict(plan), "seed": seed, "setup": setup}
    return found | {"seconds": time.monotonic() - began - setup}


COLUMNS = (
    *("start_reward", "reward", "whole", "R_pol", "R_own", "R_chosen", "P_own", "P_chosen"),
    *("ended", "repeated", "distinct", "tokens", "seconds"),
)


def table(all_found: Sequence[dict[str, Any]]) -> str:
    """As Markdown; the last column is the early evidence at each part of the run."""
    lines = [f"| way | seed | wrecked | {' | '.join(COLUMNS)} | falls |", "| --- " * (len(COLUMNS) + 4) + "|"]
    for f in all_found:
        early = " ".join("-" if v is None else f"{v:.2f}" for v in f["falls"])
        cells = " | ".join(f"{f[column]:.2f}" for column in COLUMNS)
        lines.append(f"| {f['way']} | {f['seed']} | {'yes' if f['wrecked'] else ''} | {cells} | {early} |")
    return "\n".join(lines)


def main() -> int:
    """Makes what is missing and prints the table of what was asked for."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse", description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, default="letters")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), metavar="WAY")
    parser.add_argument("--folder", type=Path, default=Path("runs/collapse"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks.start()
    all_found = []
    for seed in options.seeds:
        for way in options.ways:
            file = options.folder / f"{options.world}-{seed}" / f"{way}.json"
            if not file.exists():
                try:
                    write_json(file, one_run(options.world, seed, options.folder, way))
                except UserError as e:
                    print(f"error: {e}", file=sys.stderr)
                    return 2
            all_found.append(read_json(file))
            print(table(all_found[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(all_found)}")
    ranks.end()
    return 0


if __name__ == "__main__":
    ranks.leave(main())
