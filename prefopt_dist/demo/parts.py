"""The parts of the demo: the task's data, the recipes in a folder, the pairs, the control, and the answers' rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist import shipped
from prefopt_dist.config import Config, load_config
from prefopt_dist.demo.reward import is_whole
from prefopt_dist.demo.world import write_model, write_world
from prefopt_dist.distributed import ranks
from prefopt_dist.files import read_json, write_atomic, write_json
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.setup import compare, prepare_models
from prefopt_dist.setup.own_answers import FILE

DEFAULT_FOLDER = "runs/demo"
"""Folder that the recipes name."""
DEMONSTRATIONS, PROMPTS, HELD_OUT, UNSEEN = 2200, 1600, 200, 400
CONTROL_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of the control (SFT on the chosen answers); the one with the best reward is reported."""


def make_world(folder: Path, seed: int) -> None:
    """Write the data, the tokenizer and the random weights of a seed into FOLDER/world."""
    world = folder / "world"
    write_world(world, demonstrations=DEMONSTRATIONS, prompts=PROMPTS, held_out=HELD_OUT, unseen=UNSEEN, seed=seed)
    write_model(world / "model", seed=seed)


def recipe_file(name: str) -> Path:
    """Return the path of a recipe by its name, such as `demo` or `ipo`."""
    return shipped.ROOT / "launch" / "recipes" / (f"{name}.yaml" if name == "demo" else f"demo_{name}.yaml")


def overrides(name: str, folder: Path, seed: int) -> list[str]:
    """Return the overrides that move a recipe's files into `folder` and set its seed."""
    sections: dict[str, dict[str, Any]] = yaml.safe_load(recipe_file(name).read_text())
    moved = [f"run.seed={seed}"]
    for section, keys in sections.items():
        for key, value in keys.items():
            text = json.dumps(value)
            if DEFAULT_FOLDER in text and str(folder) != DEFAULT_FOLDER:
                moved.append(f"{section}.{key}={text.replace(DEFAULT_FOLDER, str(folder))}")
    return moved


def config_of(name: str, folder: Path, seed: int, *more: str) -> Config:
    """Return the configuration of a recipe in this folder; more: further overrides, `section.key=value` each."""
    return load_config(recipe_file(name), [*overrides(name, folder, seed), *more]).with_cache()


def split_pairs(folder: Path) -> None:
    """Split the sampled pairs by the file of their prompts and write FOLDER/pairs/*.jsonl.

    `train` has the pairs to train on, `eval` those to evaluate on, and `chosen` the chosen answers of `train`, for the
    control.
    """
    rows = [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").read_text().split("\n") if line]
    held_out = [row for row in rows if "held_out.jsonl" in row["origin"]]
    train = [row for row in rows if "held_out.jsonl" not in row["origin"]]
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
    for name, part in (("train", train), ("eval", held_out), ("chosen", chosen)):
        write_atomic(folder / "pairs" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))


def control_name(rate: float) -> str:
    """Return the name of the run folder of a control with this learning rate."""
    return f"control-{rate:g}"


def control_config(folder: Path, seed: int, rate: float) -> Config:
    """Return the configuration of a control: SFT on the chosen answers with this learning rate."""
    return config_of("control", folder, seed, f"run.dir={folder / control_name(rate)}", f"optim.learning_rate={rate}")


def model_of(recipe: str, folder: Path) -> Path:
    """Return the folder of the model that a recipe has trained."""
    config = config_of(recipe, folder, 0)
    last = config.run_dir / f"round-{config.rounds.count}"
    return (last if recipe == "rounds" else config.run_dir) / "final"


def judged_file(folder: Path, name: str) -> Path:
    """Return the path of the file with the rewards of a run's answers to the unseen prompts."""
    return folder / "judged" / f"{name}.json"


def judge_answers(folder: Path, seed: int, name: str, config: Config) -> None:
    """Write the rewards of a run's answers to the unseen prompts beside the SFT model's, once (all ranks call it).

    A training run has already answered these prompts itself. The rounds compare by other prompts, so their model
    answers here.

    Args:
        folder: the demo's folder.
        seed: the demo's seed.
        name: the recipe's or control's name.
        config: configuration of the run.
    """
    file = judged_file(folder, name)
    if ranks.run_on_rank_zero(file.exists):
        return
    if config.answers.prompts is not None:
        found = ranks.run_on_rank_zero(lambda: _read_own_answers(config.run_dir))
    else:
        found = _compare(folder, seed, config)

    def write() -> None:
        file.parent.mkdir(exist_ok=True)
        whole = {which: [is_whole(prompt, text) for prompt, text in texts] for which, texts in found["texts"].items()}
        write_json(file, found | {"whole": {which: sum(flags) / len(flags) for which, flags in whole.items()}})

    ranks.run_on_rank_zero(write)


def _read_own_answers(run_dir: Path) -> dict[str, Any]:
    """Read the answers of a run, and their measures, from its run folder."""
    facts = read_json(run_dir / "run.json")["answers"]
    lines = [json.loads(line) for line in (run_dir / FILE).read_text().split("\n") if line]
    sides = {"policy": facts, "against": facts["start"]}
    return {
        **{
            which: {"reward": side["reward"], "tokens": side["length"], "unfinished": 1 - side["ended"]}
            for which, side in sides.items()
        },
        **{name: facts[name] for name in ("prompts", "difference", "win_rate", "kl", "verdict")},
        "texts": {
            which: [(line["prompt"], line[when]) for line in lines]
            for which, when in (("policy", "after"), ("against", "before"))
        },
    }


def _compare(folder: Path, seed: int, config: Config) -> dict[str, Any]:
    """Compare the last round's model with the SFT model (all ranks call it)."""
    model = config.run_dir / f"round-{config.rounds.count}" / "final"
    judging = config_of(
        "demo",
        folder,
        seed,
        f"run.dir={folder / 'judged'}",
        f"run.cache={folder / '.prefopt'}",
        f"evaluate.prompts={folder / 'world' / 'unseen.jsonl'}",
        "generate.max_new_tokens=96",
    )
    models = prepare_models.load_models(judging)  # the policy of the recipe is the SFT model
    trained = ranks.run_on_all_ranks(lambda: inspect_folder(model, "evaluate.model"))
    comparison = compare.prepare(judging, models, trained, models.policy, models.policy)
    found = comparison.run()
    texts = {}
    for which in ("policy", "against"):
        answered = ranks.run_on_all_ranks(comparison.jobs[which].answered)
        texts[which] = [(one.prompt.prompt, answer.text) for one in answered for answer in one.answers]
    return found | {"texts": texts}
