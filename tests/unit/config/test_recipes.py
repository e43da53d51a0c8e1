"""Recipes of published models: their numbers are the sources', and `--check` and `plan` take them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import worlds
from places import REPOSITORY

from prefopt_dist.cli import main
from prefopt_dist.config import Config, load_config
from prefopt_dist.config.losses import MixLoss

RECIPES = REPOSITORY / "launch" / "recipes"
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml, 19f0345
    "zephyr_7b": (
        "mistral",
        {
            "loss.name": "dpo",
            "loss.beta": 0.01,
            "loss.average": "sums",
            "optim.learning_rate": 5e-7,
            "optim.schedule": "cosine",
            "optim.warmup_ratio": 0.1,
            "train.global_batch_pairs": 8 * 2 * 8,
            "train.epochs": 1,
            "data.max_length": 1024,
            "data.max_prompt_length": 512,
        },
    ),
    # open-instruct, scripts/train/tulu3/dpo_8b.sh, 16c002b
    "tulu3_8b": (
        "llama",
        {
            "loss.name": "dpo",
            "loss.beta": 5.0,
            "loss.average": "tokens",
            "optim.learning_rate": 5e-7,
            "optim.schedule": "linear",
            "optim.warmup_ratio": 0.1,
            "optim.weight_decay": 0.0,
            "train.global_batch_pairs": 1 * 16 * 8,
            "train.epochs": 1,
            "data.max_length": 2048,
        },
    ),
    # open-instruct, scripts/train/olmo3/7b_instruct_dpo.sh, 1dbcb5c
    "olmo3_7b": (
        "olmo3",
        {
            "loss.name": "dpo",
            "loss.beta": 5.0,
            "loss.average": "tokens",
            "optim.learning_rate": 1e-6,
            "optim.schedule": "linear",
            "optim.warmup_ratio": 0.1,
            "optim.weight_decay": 0.0,
            "train.global_batch_pairs": 1 * 4 * 4 * 8,
            "train.epochs": 1,
            "data.max_length": 16384,
        },
    ),
    # alignment-handbook, recipes/smollm3/dpo/apo.yaml, 19f0345
    "smollm3_3b": (
        "smollm3",
        {
            "loss.name": "apo_zero",
            "loss.beta": 0.05,
            "optim.learning_rate": 1e-6,
            "optim.schedule": "cosine",
            "optim.warmup_ratio": 0.1,
            "optim.max_grad_norm": 0.2,
            "train.global_batch_pairs": 1 * 2 * 16,
            "train.epochs": 1,
            "data.max_length": 24576,
        },
    ),
    # InternVL, internvl2_5_8b_internlm2_5_7b_dynamic_res_mpo.sh, b048980
    "mpo_8b": (
        "llama",
        {
            "loss.name": "mix",
            "optim.learning_rate": 1e-6,
            "optim.schedule": "cosine",
            "optim.warmup_ratio": 0.03,
            "optim.weight_decay": 0.05,
            "train.global_batch_pairs": 256,
            "train.epochs": 1,
            "data.max_length": 8192,
        },
    ),
    # arXiv:2407.21783, section 4.1.4
    "llama3_dpo": (
        "llama",
        {"loss.name": "dpo", "loss.beta": 0.1, "loss.sft_weight": 0.2, "optim.learning_rate": 1e-5},
    ),
}
"""The family of the model, and the numbers of the source."""


def value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family, with its tokenizer, and 300 pairs."""
    folder = tmp_path_factory.mktemp("recipes")
    worlds.write_model(folder / "llama", seed=1)
    for family in ("mistral", "olmo3", "smollm3"):
        worlds.write_family(folder / family, folder / "llama", family)
    worlds.write_pairs(folder / "pairs.jsonl", 300)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_sources(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    for key, expected in PUBLISHED[name][1].items():
        assert value(config, key) == expected, key


def test_the_parts_of_the_mix_are_the_sources() -> None:
    loss = load_config(RECIPES / "mpo_8b.yaml").loss
    assert isinstance(loss, MixLoss)
    assert {name: part.weight for name, part in loss.of.items()} == {"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_names_its_sources(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "Planned, not run" in text
    for key in PUBLISHED[name][1]:
        leaf = key.rpartition(".")[2]
        if key == "loss.name" or (key == "loss.average" and f"{leaf}:" not in text):
            continue
        assert re.search(rf"^ *{leaf}: \S+ +# (handbook|script|paper): ", text, re.MULTILINE), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_check_and_plan(made: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a small model of the family and other rows, since the hub is not reached here."""
    pairs, target = made / "pairs.jsonl", made / f"{name}.json"
    overrides = [
        f"model.name_or_path={made / PUBLISHED[name][0]}",
        f"data.train={pairs}",
        f"data.eval={pairs}",
        f"run.dir={made / name}",
        f"run.cache={made / 'cache'}",
        "tracking.wandb.mode=disabled",
    ]
    recipe = str(RECIPES / f"{name}.yaml")
    assert main(["train", recipe, "--check", *overrides]) == 0, capsys.readouterr().err
    assert main(["plan", recipe, f"plan.file={target}", *overrides]) == 0, capsys.readouterr().err
    assert json.loads(target.read_text())["machine"]["ranks"] == load_config(Path(recipe)).plan.nodes * 8
