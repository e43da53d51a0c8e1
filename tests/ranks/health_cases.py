"""Runs that are ill on purpose and runs that are well, on two ranks: torchrun tests/ranks/health_cases.py FOLDER CASE …

All are runs of the world of letters, from the command line's own stage; what differs is the data or one option.
Other letters, weights and orders with HEALTH_SEED=1, 2, …
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import case_runner
import letters
import pytest
import torch

from prefopt_dist.commands import train
from prefopt_dist.config import load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.metrics_file import MetricsFile

SEED = int(os.environ.get("HEALTH_SEED", "0"))
G, STEPS = 32, 60
SLOW_STEPS = 20
"""Three of the shortest windows, and some more"""
PAIRS, HELD_OUT = G * STEPS, 128
LEARNING_RATE = 1e-3
BETA = 0.5
SFT = {"name": "sft"}
DPO = {"name": "dpo", "beta": BETA}
FILLER = (" I hope you are well.", " Please tell everybody.", " There is more to come.", " It was a long day.")


def pairs(n: int, seed: int, *, wrong: float = 0.0) -> list[dict[str, str]]:
    """Letters in the right tone and in the other one; a share of the labels is the wrong way round."""
    coin, rows = random.Random(seed), []
    for prompt, formal_fits, formal, casual in islice(letters.letters(seed), n):
        chosen, rejected = (formal, casual) if formal_fits else (casual, formal)
        if coin.random() < wrong:
            chosen, rejected = rejected, chosen
        rows.append({"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected})
    return rows


def longer_is_chosen(n: int, seed: int) -> list[dict[str, str]]:
    """Letters of either tone; the chosen one goes on for longer."""
    draw, rows = random.Random(seed), []
    for prompt, _, *texts in islice(letters.letters(seed), n):
        draw.shuffle(texts)
        less = draw.randrange(2)
        more = less + draw.randrange(1, 3)
        chosen, rejected = (t + "".join(draw.sample(FILLER, k)) for t, k in zip(texts, (more, less), strict=True))
        rows.append({"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected})
    return rows


def demonstrations(n: int, seed: int, *, fitting: bool = False, wordy: bool = False) -> Iterator[dict[str, str]]:
    """Letters in the fitting tone or in either; wordy ones go on for a sentence or more."""
    coin = random.Random(seed)
    for prompt, formal_fits, formal, casual in islice(letters.letters(seed), n):
        right, other = (formal, casual) if formal_fits else (casual, formal)
        text = right if fitting else coin.choice((right, other))
        more = "".join(coin.sample(FILLER, coin.randrange(4))) if wordy else ""
        yield {"prompt": prompt, "completion": text + more}


def prepare(folder: Path) -> None:
    if (folder / "model").exists():
        return
    letters.write_model(folder / "model", hidden=64, layers=2, seed=SEED)
    of = 100 * SEED
    files = {
        "neutral": demonstrations(1600, of + 11),
        "fitting": demonstrations(1600, of + 12, fitting=True),
        "wordy": demonstrations(1600, of + 13, wordy=True),
        "clean": pairs(PAIRS, of + 1),
        "random": pairs(PAIRS, of + 1, wrong=0.5),
        "fifth": pairs(PAIRS, of + 1, wrong=0.2),
        "flipped": pairs(PAIRS, of + 1, wrong=1.0),
        "longer": longer_is_chosen(PAIRS, of + 1),
        "few": pairs(64, of + 1, wrong=0.25),
        "held_out": pairs(HELD_OUT, of + 2),
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    folder: Path,
    name: str,
    loss: dict[str, Any],
    data: str = "clean",
    start: str = "neutral",
    held_out: str = "",
    **sections: Any,
) -> dict[str, Any]:
    """One run by the stage itself: its findings, and what an evidence was made of."""
    run_dir = folder / "runs" / name
    optim = {"learning_rate": LEARNING_RATE}
    config: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": SEED},
        "model": {"name_or_path": str(folder / "runs" / start / "final" if start else folder / "model")},
        "data": {"train": str(folder / f"{data}.jsonl"), "max_length": 256, "max_prompt_length": 128},
        "loss": loss,
        "optim": optim,
        "train": {"global_batch_pairs": G, "micro_batch_tokens": 4096},
        "checkpoint": {"every_steps": None},
        "tracking": {"wandb": {"mode": "disabled"}},
        "answers": {"prompts": str(folder / "held_out.jsonl"), "number": 128 if start else 0, "max_new_tokens": 60},
        "generate": {"rewards": [{"function": "letters:score"}]},
    }
    config["model"]["dtype"] = "float32"
    if held_out:
        config["data"]["eval"] = str(folder / f"{held_out}.jsonl")
    for section, keys in sections.items():
        config[section] = config.get(section, {}) | keys
    file = folder / f"{name}.yaml"
    ranks.run_on_rank_zero(lambda: file.write_text(json.dumps(config)))
    train.run(load_config(file).with_cache())
    facts = ranks.run_on_rank_zero(lambda: json.loads((run_dir / "run.json").read_text()))
    rows = ranks.run_on_rank_zero(lambda: MetricsFile(run_dir / "metrics.jsonl").rows())
    last = [row for row in rows if row["kind"] == "train"][-1]
    answers = facts["answers"]
    return {"health": facts["health"], "last": last, "verdict": answers["verdict"], "text": answers["verdict_text"]}


def sft(folder: Path, name: str) -> dict[str, Any]:
    """What the others start from: letters of either tone, or of the fitting one."""
    train = {"global_batch_pairs": G, "micro_batch_tokens": 4096, "epochs": 3}
    return run(folder, name, SFT, name, start="", optim={"learning_rate": 5e-3, "schedule": "linear"}, train=train)


def slow_rank(folder: Path) -> dict[str, Any]:
    """The last rank sleeps in each forward, as if its processor were slow."""
    forward = Scorer.forward
    slow = ranks.rank() == ranks.world_size() - 1

    def sleepy(self: Scorer, *args: Any) -> Any:
        if slow and torch.is_grad_enabled():
            time.sleep(0.3)
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "forward", sleepy)
        return run(folder, "slow-rank", DPO, train={"global_batch_pairs": G, "max_steps": SLOW_STEPS})


AS_RECIPES: dict[str, Any] = {
    "train": {"epochs": 2, "global_batch_pairs": G, "micro_batch_tokens": 4096},
}
"""Epochs and weight of the SFT term as in the demo's recipes, whose answers become better.

Chosen on HEALTH_SEED=1 and 2, so others judge it. At half the rate the accuracy of IPO and SimPO was still near 0.55 at
a third of a run, where `accuracy-stuck` speaks.
"""
STARTS = ("neutral", "fitting", "wordy")
HEALTHY = ("healthy-dpo", "healthy-ipo", "healthy-simpo")
DUE = {
    "labels-random": "accuracy-stuck",
    "labels-fifth-wrong": "noisy-labels",
    "labels-flipped": "labels-flipped",
    "beta-too-low": "chosen-falls",
    "rate-times-100": "diverging",
    "longer-chosen": "length-bias",
    "many-epochs": "overfit",
    "slow-rank": "slow-rank",
    "displaced": "answers-collapsed",
}
"""The finding that each ill run must get."""
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "neutral": lambda f: sft(f, "neutral"),
    "fitting": lambda f: sft(f, "fitting"),
    "wordy": lambda f: sft(f, "wordy"),
    "healthy-dpo": lambda f: run(
        f, "healthy-dpo", DPO | {"sft_weight": 4.0}, held_out="held_out", eval={"every_steps": 12}, **AS_RECIPES
    ),
    # A margin of 1/6 nats a token is its aim; with an aim of 1/3 the chosen responses lose about 0.5, which is ill.
    "healthy-ipo": lambda f: run(f, "healthy-ipo", {"name": "ipo", "beta": 3.0, "sft_weight": 1.0}),
    "healthy-simpo": lambda f: run(
        f, "healthy-simpo", {"name": "simpo", "beta": 2.0, "gamma": 0.5, "sft_weight": 4.0}, **AS_RECIPES
    ),
    "labels-random": lambda f: run(f, "labels-random", DPO, data="random"),
    "labels-fifth-wrong": lambda f: run(f, "labels-fifth-wrong", DPO, data="fifth"),
    "labels-flipped": lambda f: run(f, "labels-flipped", DPO, data="flipped", start="fitting"),
    "beta-too-low": lambda f: run(f, "beta-too-low", DPO | {"beta": BETA / 300}),
    "rate-times-100": lambda f: run(f, "rate-times-100", DPO, optim={"learning_rate": 100 * LEARNING_RATE}),
    "longer-chosen": lambda f: run(f, "longer-chosen", DPO, data="longer", start="wordy"),
    "many-epochs": lambda f: run(
        f,
        "many-epochs",
        DPO,
        data="few",
        held_out="held_out",
        train={"epochs": STEPS // 2, "global_batch_pairs": G, "micro_batch_tokens": 4096},
        eval={"every_steps": 6},
    ),
    "slow-rank": slow_rank,
    # No more is wrong with it than that nothing holds the chosen letters: its accuracy is as good as healthy-dpo's.
    "displaced": lambda f: run(f, "displaced", DPO, train={"epochs": 2, "global_batch_pairs": G}),
}


if __name__ == "__main__":
    case_runner.serve(CASES, prepare)
