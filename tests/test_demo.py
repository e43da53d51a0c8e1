"""The demo's data files and recipes; the demo itself is `make demo`."""

import json
from pathlib import Path

import pytest

from prefopt_dist.config import load_config
from prefopt_dist.demo.__main__ import UNSEEN
from prefopt_dist.demo.world import write_world

FOLDER = Path(__file__).parents[1] / "launch" / "recipes"
ROUNDS = FOLDER / "demo_rounds.yaml"
RECIPES = sorted(set(FOLDER.glob("demo*.yaml")) - {ROUNDS})
FILES = ("train.jsonl", "eval.jsonl", "sft.jsonl", "unseen.jsonl", "rated.jsonl")
MADE = (*FILES, "prompts.jsonl")


def test_no_prompt_stands_in_two_files(tmp_path: Path) -> None:
    write_world(tmp_path, train=60, evaluation=20, demonstrations=60, unseen=20, prompts=20)
    rows = {name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in MADE}
    prompts = {name: {row["prompt"] for row in rows[name]} for name in MADE}
    apart = [prompts[name] for name in MADE if name != "rated.jsonl"]
    assert len(set().union(*apart)) == sum(map(len, apart)) == 180
    # One letter of each training pair, of either kind.
    pairs = {row["prompt"]: row for row in rows["train.jsonl"]}
    assert prompts["rated.jsonl"] == pairs.keys()
    assert len(rows["rated.jsonl"]) == len(pairs)
    assert {row["label"] for row in rows["rated.jsonl"]} == {True, False}
    for row in rows["rated.jsonl"]:
        assert row["completion"] == pairs[row["prompt"]]["chosen_response" if row["label"] else "rejected_response"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_of_the_demo_s_world(recipe: Path) -> None:
    """None trains on the pairs that its figures are of."""
    config = load_config(recipe)
    train = {source.path for source in config.data.train}
    evaluation = {source.path for sources in (config.data.eval or {}).values() for source in sources}
    assert {Path(path).name for path in train | evaluation} <= set(FILES)
    assert not train & evaluation
    assert not evaluation & {f"runs/demo/world/{name}" for name in ("sft.jsonl", "rated.jsonl", "train.jsonl")}


def test_the_rounds_are_judged_on_other_prompts() -> None:
    """On enough, which stand in no other file and on which no settings were chosen."""
    config = load_config(ROUNDS)
    asked, judged = config.generate.prompts, config.evaluate.prompts
    assert asked is not None
    assert judged is not None
    assert [Path(source.path).name for source in (*asked, *judged)] == ["prompts.jsonl", "unseen.jsonl"]
    assert UNSEEN >= 200
