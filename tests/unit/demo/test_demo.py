"""The demo's world, its reward and its recipes; the demo itself is `make demo`."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from prefopt_dist.config import load_config
from prefopt_dist.config.losses import SFTLoss
from prefopt_dist.demo import jobs, parts, result
from prefopt_dist.demo.__main__ import RECIPES
from prefopt_dist.demo.reward import JUDGE_NOISE, is_whole, judge, score
from prefopt_dist.demo.world import CASUAL, FORMAL, Task, letter, perfect, tasks, write_model, write_world
from prefopt_dist.files import write_json

TASK = Task("boss", "Ada", ("the train is late", "the key was found"))
FORMAL_LETTER = (
    "Dear boss Ada, Please note that the train is late. I wish to report that the key was found. "
    "I remain at your service. Kind regards"
)
FILES = ("sft", "prompts", "held_out", "unseen")


def drawn(seed: int, n: int) -> list[tuple[str, list[str]]]:
    """Prompts, four letters to each."""
    draw = random.Random(seed)
    return [(task.prompt, [letter(task, draw) for _ in range(4)]) for task in islice(tasks(seed), n)]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_prompt_stands_in_two_files(tmp_path: Path) -> None:
    write_world(tmp_path, demonstrations=60, prompts=40, held_out=20, unseen=20)
    prompts = {name: {row["prompt"] for row in rows(tmp_path / f"{name}.jsonl")} for name in FILES}
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values())) == 140
    assert rows(tmp_path / "few.jsonl") == rows(tmp_path / "prompts.jsonl")[:13]


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_world(tmp_path / str(seed), demonstrations=20, prompts=20, seed=seed)
        write_model(tmp_path / str(seed) / "model", hidden=8, layers=1, vocabulary=300, seed=seed)
    for name in ("sft.jsonl", "prompts.jsonl", "model/model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() != (tmp_path / "2" / name).read_bytes()


def test_a_perfect_letter_has_the_whole_reward() -> None:
    for task in islice(tasks(3), 200):
        assert score(task.prompt, perfect(task), {}) == pytest.approx(1.0)
        assert is_whole(task.prompt, perfect(task))
    assert TASK.prompt == "Write to my boss Ada that the train is late and that the key was found."
    assert score([{"role": "user", "content": TASK.prompt}], FORMAL_LETTER, {}) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("before", "after", "less"),
    [
        ("Kind regards", "Hugs", 0.45 / 5),  # one sentence of five has the wrong tone
        ("Dear boss Ada,", "Hey boss Ada!", 0.45 / 5),
        ("I wish to report that the key was found.", "I wish to report that the train is late.", 0.075 + 0.1 + 0.1),
        (" I remain at your service.", "", 0.1),
        (" I remain", " It was a long day. I remain", 0.1),
        ("Dear boss Ada,", "Dear boss Ben,", 0.45 / 5 + 0.1 + 0.2),  # nobody's greeting: idle, not whole
    ],
)
def test_each_fault_costs_its_part(before: str, after: str, less: float) -> None:
    assert score(TASK.prompt, FORMAL_LETTER.replace(before, after), {}) == pytest.approx(1.0 - less)


def test_the_order_counts() -> None:
    swapped = FORMAL_LETTER.replace("late", "X").replace("the key was found", "the train is late")
    swapped = swapped.replace("the train is X", "the key was found")
    assert score(TASK.prompt, swapped, {}) == pytest.approx(0.9)


def test_the_addressee_decides_the_tone() -> None:
    friend = Task("friend", "Ada", TASK.news)
    formal = FORMAL_LETTER.replace("boss", "friend")
    assert (friend.tone, TASK.tone) == (CASUAL, FORMAL)
    assert score(friend.prompt, formal, {}) == pytest.approx(0.55)


def test_any_text_has_a_reward() -> None:
    assert score(TASK.prompt, "", {}) == 0.0
    for text, most in (("", 0.25), ("Hugs", 0.25), ("!!,,..", 0.25), ("the train", 0.25), (FORMAL_LETTER * 3, 0.9)):
        assert 0.0 <= score(TASK.prompt, text, {}) <= most
        assert not is_whole(TASK.prompt, text)


def test_what_is_whole() -> None:
    """A letter may be poor and whole."""
    for prompt, letters in drawn(5, 300):
        assert all(is_whole(prompt, one) for one in letters)
    assert is_whole(TASK.prompt, "Hey boss Ada! The sky is grey. Guess what: the key was found! Hugs")
    for spoilt in (
        FORMAL_LETTER.removesuffix(" Kind regards"),
        FORMAL_LETTER + " Kind regards",
        FORMAL_LETTER.replace("the key was found", "the window is broken"),  # nobody asked for that
        FORMAL_LETTER.replace("Ada", "Ben"),
        FORMAL_LETTER.replace("late.", "late"),
        FORMAL_LETTER.replace(" I remain", "  I remain"),
    ):
        assert not is_whole(TASK.prompt, spoilt)


def test_the_reward_is_graded_and_the_chosen_letter_better_not_perfect() -> None:
    """Demonstrations are middling and spread out; the best of four by the judge is better, and not perfect."""
    world = drawn(7, 500)
    scores = [[score(prompt, one, {}) for one in letters] for prompt, letters in world]
    every = [value for four in scores for value in four]
    mean = sum(every) / len(every)
    spread = (sum((value - mean) ** 2 for value in every) / len(every)) ** 0.5
    assert 0.45 < mean < 0.65
    assert 0.1 < spread < 0.2
    assert len({round(value, 6) for value in every}) > 100
    chosen = [score(prompt, max(letters, key=lambda one: judge(prompt, one, {})), {}) for prompt, letters in world]
    assert mean + 0.08 < sum(chosen) / len(chosen) < 0.85


def test_the_judge_errs_the_same_way_each_time() -> None:
    world = drawn(9, 500)
    errors = [judge(p, one, {}) - score(p, one, {}) for p, letters in world for one in letters]
    assert errors == [judge(p, one, {}) - score(p, one, {}) for p, letters in world for one in letters]
    assert abs(sum(errors) / len(errors)) < 0.01
    assert (sum(e**2 for e in errors) / len(errors)) ** 0.5 == pytest.approx(JUDGE_NOISE, rel=0.1)


@pytest.mark.parametrize("recipe", ["sft", "pairs", "control", *RECIPES])
def test_recipes_are_of_the_demo_s_world(recipe: str, tmp_path: Path) -> None:
    """Each reads in its usual folder and in another; none sees the prompts that it is judged on."""
    config = load_config(parts.recipe_file(recipe))
    moved = parts.config_of(recipe, tmp_path / "other", 5)
    assert (moved.run.seed, moved.run_dir) == (5, tmp_path / "other" / config.run_dir.name)
    for one, root in ((config, Path(parts.DEFAULT_FOLDER)), (moved, tmp_path / "other")):
        read = [*one.data.train, *(one.generate.prompts or ()), *(one.evaluate.prompts or ())]
        read += [source for sources in (one.data.eval or {}).values() for source in sources]
        assert all(Path(source.path).is_relative_to(root) for source in read)
        assert not [source for source in read if "unseen" in source.path]
        train = {source.path for source in one.data.train}
        assert not train & {source.path for sources in (one.data.eval or {}).values() for source in sources}
        assert Path(one.model.name_or_path).is_relative_to(root)


def test_the_control_makes_as_many_steps() -> None:
    control = load_config(parts.recipe_file("control"))
    assert isinstance(control.loss, SFTLoss)
    for recipe in set(RECIPES) - {"rounds"}:
        config = load_config(parts.recipe_file(recipe))
        halves = 2 if recipe == "kto" else 1  # a pair is two rated answers
        assert config.train.epochs == control.train.epochs
        assert config.train.global_batch_pairs == halves * control.train.global_batch_pairs
    rounds = load_config(parts.recipe_file("rounds"))  # on a third of the prompts each
    assert (rounds.rounds.count, rounds.train.epochs) == (3, control.train.epochs)
    assert rounds.train.global_batch_pairs == control.train.global_batch_pairs


def test_the_pairs_are_parted_by_their_prompts(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    origins = (f"{tmp_path}/world/prompts.jsonl:1", f"{tmp_path}/world/held_out.jsonl:1")
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(row | {"origin": origin}) + "\n" for origin in origins))
    parts.split_pairs(tmp_path)
    assert [r["origin"] for name in ("train", "eval") for r in rows(pairs / f"{name}.jsonl")] == list(origins)
    assert rows(pairs / "chosen.jsonl") == [{"prompt": "p", "completion": "a"}]


def judged(reward: float) -> dict[str, object]:
    """As judge_answers leaves it."""
    near = {"mean": reward, "low": reward - 0.01, "high": reward + 0.01}
    side = {"reward": near, "tokens": 40.0, "unfinished": 0.0}
    return {
        "prompts": 1,
        "policy": side,
        "against": side | {"reward": {"mean": 0.5, "low": 0.49, "high": 0.51}},
        "difference": {name: value - 0.5 for name, value in near.items()},
        "win_rate": near,
        "kl": near,
        "verdict": "better" if reward > 0.51 else "worse",
        "texts": {which: [(TASK.prompt, FORMAL_LETTER)] for which in ("policy", "against")},
        "whole": {"policy": 0.99, "against": 0.9},
    }


def test_the_result(tmp_path: Path) -> None:
    """Its keys, the best control, the verdict, and the words."""
    for name, reward in zip(("demo", *map(parts.control_name, parts.CONTROL_RATES)), (0.8, 0.6, 0.7, 0.4), strict=True):
        parts.judged_file(tmp_path, name).parent.mkdir(exist_ok=True)
        write_json(parts.judged_file(tmp_path, name), judged(reward))
    found = result.result_of(tmp_path, 3, "demo")
    assert {"seed", "recipe", "reward", "control", "win_rate", "kl", "accuracy", "verdict"} <= found.keys()
    assert (found["seed"], found["recipe"], found["control"], found["verdict"]) == (3, "demo", 0.7, "better")
    assert found["reward"] == pytest.approx({"before": 0.5, "after": 0.8, "difference": 0.3, "low": 0.29, "high": 0.31})
    told = result.text(found, tmp_path, 100.0)
    assert "0.500 → 0.800" in told
    assert FORMAL_LETTER in told


@pytest.mark.parametrize(("given", "threads"), [(None, 2), ("1", 1), ("8", 2), ("2,4", 2)])
def test_two_processes_share_the_cores(given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert jobs.threads_per_process() == threads
