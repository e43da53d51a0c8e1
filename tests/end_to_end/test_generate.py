"""The stages generate, evaluate with answers, and rounds, through their door."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import case_runner
import patience
import pytest
import worlds
from door import Door
from generation_cases import TORCHRUN
from generation_world import PROMPTS, opened_world, write_run
from places import PYTHONPATH
from reward_models import write_reward
from safetensors.torch import load_file, save_file

from prefopt_dist.checkpoint.save import committed
from prefopt_dist.cli import main
from prefopt_dist.commands import rounds
from prefopt_dist.config import identity, load_config
from prefopt_dist.errors import StopRequested
from prefopt_dist.rollouts.shards import HALT, over_shards
from prefopt_dist.setup import compare, prepare_rollouts, rewards

REWARDS = [{"function": "rewards_for_tests:letters"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("generate")) as folder:
        yield folder


@pytest.fixture
def door(world: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(world, capsys)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# What is made


def test_pairs_are_made_of_the_best_and_the_worst(world: Path) -> None:
    """And the same for other sizes of batches; another choice of pairs samples and scores nothing again."""
    assert main(["generate", str(write_run(world, "one"))]) == 0
    made = world / "runs" / "one" / "pairs.jsonl"
    facts = json.loads((world / "runs" / "one" / "generation.json").read_text())
    found = rows(made)
    assert facts["pairs"] == len(found) > PROMPTS / 2
    assert facts["pairs"] + sum(facts["prompts_without_pair"].values()) == facts["prompts"] == PROMPTS
    assert facts["answers"]["all"] == 4 * PROMPTS
    lines = [int(row["origin"].rpartition(":")[2]) for row in found]
    assert lines == sorted(lines)
    for row in found:
        scores = [row[f"{name}_score"]["reward"] for name in ("chosen", "rejected")]
        hint = 0.25 * ((int(row["origin"].rpartition(":")[2]) - 1) % 3)
        assert scores[0] > scores[1]
        assert scores == [sum(c.islower() for c in row[name]) + hint for name in ("chosen", "rejected")]
        assert row["generated"]["sampling"]["temperature"] == 0.9
        assert len(row["generated"]["model"]) == 32

    small = write_run(world, "small", cache="cache-small", generate={"batch_tokens": 40})
    assert main(["generate", str(small)]) == 0
    assert (world / "runs" / "small" / "pairs.jsonl").read_bytes() == made.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(prepare_rollouts, "TransformersEngine")
        patch.delattr(rewards, "FunctionReward")
        assert (
            main(["generate", str(write_run(world, "margin", generate={"pairing": "margin", "min_margin": 2.0}))]) == 0
        )
    wide = rows(world / "runs" / "margin" / "pairs.jsonl")
    assert all(row["chosen_score"]["reward"] - row["rejected_score"]["reward"] >= 2 for row in wide)
    assert {row["origin"] for row in wide} < {row["origin"] for row in found}


def test_pairs_are_the_same_on_two_ranks_and_after_a_kill(world: Path, tmp_path: Path) -> None:
    case_runner.run_cases("generation_cases.py", 2, tmp_path / "two", ["pairs", "resumed"])
    assert main(["generate", str(write_run(tmp_path / "two", "one"))]) == 0
    expected = (tmp_path / "two" / "runs" / "one" / "pairs.jsonl").read_bytes()
    two, resumed = (case_runner.found(tmp_path / "two", case) for case in ("pairs", "resumed"))
    assert Path(two["file"]).read_bytes() == expected
    assert 0 < resumed["there"] < 3
    assert resumed["kept"]
    assert Path(resumed["file"]).read_bytes() == expected


def test_a_job_halts_itself_alone(world: Path, tmp_path: Path) -> None:
    """Where the file system has no locks, another job may be asked to stop in the same folder."""
    others, done = tmp_path / HALT.format(job="another"), []

    def work(number: int) -> None:
        others.touch()
        done.append(number)

    over_shards(tmp_path, [0, 1, 2], "mine", work, lambda: False)
    assert done == [0, 1, 2]
    with pytest.raises(StopRequested):
        over_shards(tmp_path, [3, 4], "mine", work, lambda: 3 in done)
    assert done[3:] == [3]
    assert list(tmp_path.iterdir()) == [others]


def test_other_settings_in_the_same_run_are_refused(world: Path, door: Door) -> None:
    run = write_run(world, "once", generate={"prompts": str(world / "new.jsonl")})
    assert door.ends(run, stage="generate")[0] == 0
    assert door.ends(run, stage="generate")[0] == 0
    door.fails(
        ["generate.pairs: ", "min_margin: was 0.0, now 1.0", "remove"],
        "generate.min_margin=1.0",
        stage="generate",
        run=run,
    )
    pairs = Path(json.loads(run.read_text())["run"]["dir"]) / "pairs.jsonl"
    whole = pairs.read_text()
    pairs.write_text("".join(whole.splitlines(keepends=True)[1:]))
    door.fails(
        [f"generate.pairs: {pairs} is not as this run wrote it", "data.train", "remove"], stage="generate", run=run
    )
    pairs.unlink()
    assert door.ends(run, stage="generate")[0] == 0
    assert pairs.read_text() == whole
    mine = door.lines("mine.jsonl", {"my": "file"})
    other = write_run(world, "other", generate={"prompts": str(world / "new.jsonl")})
    door.fails(
        [mine, "was not made by this run", "another file"], f"generate.pairs={mine}", stage="generate", run=other
    )


def test_pairs_pin_what_they_depend_on_alone(world: Path, door: Door) -> None:
    """The rate of the training that comes after them may change until it begins, their own seed may not."""
    run, folder = write_run(world, "later", generate={"prompts": str(world / "new.jsonl")}), world / "runs" / "later"
    assert door.ends(run, stage="generate")[0] == 0
    assert not (folder / "run.json").exists()
    changed = ["generate.pairs: ", "sampling.seed: was 0, now 1"]
    assert "samples:" not in door.fails(changed, "run.seed=1", stage="generate", run=run)
    changed = ["generate.n: was 4, now 5", "Set these keys back to go on", "remove"]
    door.fails(changed, "generate.n=5", stage="generate", run=run)
    (folder / "STOPPED").write_text("once\n")
    assert door.ends(run, "optim.learning_rate=1e-3", stage="generate")[0] == 0
    assert not (folder / "STOPPED").exists()
    assert door.ends(run, "optim.learning_rate=2e-3", "train.max_steps=1")[0] == 0
    assert json.loads((folder / "run.json").read_text())["identity"]["optim.learning_rate"] == 2e-3
    door.fails(["run.dir: ", "optim.learning_rate"], "train.max_steps=1", stage="generate", run=run)


def test_a_reward_that_fails_stops_with_the_prompt_or_is_dropped(world: Path, door: Door) -> None:
    bad = {"prompts": str(world / "new.jsonl"), "rewards": [*REWARDS, {"function": "rewards_for_tests:nothing"}]}
    status, said = door.ends(write_run(world, "bad", generate=bad), stage="generate")
    assert status == 2
    assert "Traceback" not in said
    assert "generate.rewards[1].function: for response" in said
    assert "new.jsonl:" in said
    assert "which is not finite" in said or "which is not a number" in said
    assert "generate.on_bad_reward=drop" in said
    status, said = door.ends(
        write_run(world, "bad"),
        "generate.on_bad_reward=drop",
        f"generate.prompts={world / 'new.jsonl'}",
        "generate.rewards=[{function: rewards_for_tests:nothing}]",
        stage="generate",
    )
    assert status == 2
    assert "no pair is left of 40 prompts" in said
    assert "no reward" in said


def test_evaluate_compares_two_models_by_their_answers(world: Path, door: Door) -> None:
    """Against itself a model neither wins nor loses, and its KL from itself is 0; from another one it is not."""
    run = write_run(world, "one", evaluate={"prompts": str(world / "new.jsonl"), "model": str(world / "model")})
    if not (world / "runs" / "one").exists():
        assert main(["generate", str(run)]) == 0
    assert door.ends(run, stage="evaluate")[0] == 0
    found = json.loads((world / "runs" / "one" / "evaluation.json").read_text())["answers"]
    assert found["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["kl"]["mean"] == 0
    assert found["policy"].pop("nats") == found["policy"]["reference_nats"]
    assert found["policy"] == found["against"]
    assert found["verdict"] == "no difference to be seen"
    assert str(world / "model") in found["verdict_text"]
    other = world / "other-model"
    worlds.write_model(other, seed=2, scale=3.0)
    (other / "generation_config.json").write_bytes((world / "model" / "generation_config.json").read_bytes())
    arguments = [f"evaluate.model={other}", "evaluate.samples=4"]
    assert door.ends(run, *arguments, stage="evaluate")[0] == 0
    found = json.loads((world / "runs" / "one" / "evaluation.json").read_text())["answers"]
    assert found["kl"]["low"] > 0.2
    assert found["win_rate"]["low"] < found["win_rate"]["mean"] < found["win_rate"]["high"]
    difference = found["policy"]["reward"]["mean"] - found["against"]["reward"]["mean"]
    assert found["difference"]["mean"] == pytest.approx(difference)


def test_models_that_are_nearly_the_same_do_not_tie(world: Path, door: Door) -> None:
    """Weights that differ in the seventh digit draw other answers, each model the more often as often as not."""
    nearly = world / "nearly"
    shutil.copytree(world / "model", nearly)
    weights = load_file(nearly / "model.safetensors")
    weights["model.norm.weight"] *= 1 + 2**-22
    save_file(weights, nearly / "model.safetensors", {"format": "pt"})
    run = write_run(
        world, "nearly", evaluate={"prompts": str(world / "prompts.jsonl"), "model": str(nearly), "samples": 2}
    )
    assert door.ends(run, stage="evaluate")[0] == 0
    found = json.loads((world / "runs" / "nearly" / "evaluation.json").read_text())["answers"]
    assert found["policy"] != found["against"]
    assert found["win_rate"]["high"] - found["win_rate"]["low"] > 0.05  # ties alone would leave nothing of it
    for name, none in (("win_rate", 0.5), ("difference", 0.0)):
        half = found[name]["high"] - found[name]["mean"]
        assert abs(found[name]["mean"] - none) < 2 * half  # four standard errors


def sampled_at(cache: Path) -> list[float]:
    """The temperatures of all that was answered; the prompts for pairs at 0.9, those of evaluations at 1."""
    folders = {file.parent for file in cache.rglob("samples-*.jsonl")}
    return sorted(json.loads((f / "settings.json").read_text())["sampling"]["temperature"] for f in folders)


def test_pairs_that_are_there_need_no_answers(world: Path, door: Door) -> None:
    run, pairs = write_run(world, "kept", cache="cache-kept"), world / "runs" / "kept" / "pairs.jsonl"
    arguments = [f"generate.prompts={world / 'new.jsonl'}"]
    assert door.ends(run, *arguments, stage="generate")[0] == 0
    made = pairs.read_bytes()
    shutil.rmtree(world / "cache-kept" / "samples")
    assert door.ends(run, *arguments, stage="generate")[0] == 0
    assert sampled_at(world / "cache-kept") == []
    pairs.unlink()
    assert door.ends(run, *arguments, stage="generate")[0] == 0
    assert pairs.read_bytes() == made
    assert sampled_at(world / "cache-kept") == [0.9]


@pytest.mark.slow
def test_rounds_go_on_where_they_were(world: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, then the same with two; the second starts from the first one's model."""
    judged = door.lines("judged.jsonl", *rows(world / "new.jsonl"))
    sections: dict[str, dict[str, Any]] = {
        "generate": {"prompts": str(world / "new.jsonl"), "n": 4},
        "evaluate": {"prompts": judged, "samples": 4},
        "rounds": {"count": 1, "reference": "first"},
        "optim": {"learning_rate": 0.02},
        "train": {"global_batch_pairs": 8, "micro_batch_tokens": 1024},
        "checkpoint": {"every_steps": 1},
    }
    run, folder = write_run(world, "rounds", cache="cache-rounds", **sections), world / "runs" / "rounds"
    assert door.ends(run, stage="rounds")[0] == 0
    (first,) = json.loads((folder / "rounds.json").read_text())["rounds"]
    judged_by = json.loads((folder / "round-1" / "run.json").read_text())["answers"]["verdict_text"]
    assert "rounds" in judged_by
    assert "answers.number" not in judged_by  # which the user has not set
    kept = [path.name for path in committed(folder / "round-1" / "checkpoints")]
    assert len(kept) == 2  # no round has come after it
    exported = (folder / "round-1" / "final" / "model.safetensors").read_bytes()
    # A cleaned cache costs the answers to the evaluation's prompts, and no round.
    shutil.rmtree(world / "cache-rounds" / "samples")
    (folder / "round-1" / "pairs.jsonl").unlink()
    assert door.ends(run, "rounds.count=2", stage="rounds")[0] == 0
    assert not (folder / "round-1" / "pairs.jsonl").exists()
    assert sampled_at(world / "cache-rounds") == [0.9, 1.0, 1.0, 1.0]  # round 2's pairs; start and both rounds
    assert [path.name for path in committed(folder / "round-1" / "checkpoints")] == kept[1:]
    assert len(committed(folder / "round-2" / "checkpoints")) == 2
    one, two = json.loads((folder / "rounds.json").read_text())["rounds"]
    assert one == first
    assert (folder / "round-1" / "final" / "model.safetensors").read_bytes() == exported
    # Packed beside other answers, so within rounding.
    assert two["against"].pop("reference_nats") == pytest.approx(one["policy"]["reference_nats"])
    assert two["against"] == {name: one["policy"][name] for name in two["against"]}
    assert one["kl"]["mean"] > 0
    assert one["from_start"] == {name: one[name] for name in ("win_rate", "difference")}
    apart = two["policy"]["reward"]["mean"] - one["against"]["reward"]["mean"]
    assert two["from_start"]["difference"]["mean"] == pytest.approx(apart)
    table = (folder / "DONE").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[3:6]] == ["0", "1", "2"]
    second = json.loads((folder / "round-2" / "run.json").read_text())
    assert second["identity"]["model.name_or_path"] == str(folder / "round-1" / "final")
    assert second["identity"]["reference.name_or_path"] == str(world / "model")
    # A request that comes in a round ends the rounds.
    answer = prepare_rollouts.RolloutJob.run

    def answer_and_ask(self: prepare_rollouts.RolloutJob, stop_asked: Any) -> None:
        answer(self, stop_asked)
        if self.config.run_dir.name == "round-3":
            (folder / "STOP").touch()

    monkeypatch.setattr(prepare_rollouts.RolloutJob, "run", answer_and_ask)
    assert door.ends(run, "rounds.count=3", stage="rounds")[0] == 0
    assert "stopped in round 3" in (folder / "STOPPED").read_text()
    assert not (folder / "STOP").exists()
    assert (folder / "round-3" / "pairs.jsonl").exists()
    assert not (folder / "round-3" / "DONE").exists()
    # It was done after two rounds and is not now; what says that it was stopped goes at the next start.
    assert not (folder / "DONE").exists()
    monkeypatch.setattr(prepare_rollouts.RolloutJob, "run", answer)
    assert door.ends(run, "rounds.count=3", stage="rounds")[0] == 0
    assert (folder / "DONE").exists()
    assert not (folder / "STOPPED").exists()
    # What a model has learnt from stays: no file is to be removed.
    said = door.ends(run, "rounds.count=4", "generate.n=5", stage="rounds")
    assert said[0] == 2
    assert "generate.n: was 4, now 5" in said[1]
    assert "A training on these pairs is done: set these keys back" in said[1]
    assert "remove" not in said[1]
    # As it is, nothing is compared again; with another prompt in the same file all is, and no round is made again.
    before = (folder / "DONE").read_text()
    sampled = sampled_at(world / "cache-rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Comparison, "run", None)
        assert door.ends(run, "rounds.count=3", stage="rounds")[0] == 0
        assert (folder / "DONE").read_text() == before
    door.lines("judged.jsonl", *rows(world / "new.jsonl")[1:], {"prompt": "quite another one"})
    assert door.ends(run, "rounds.count=3", stage="rounds")[0] == 0
    assert (folder / "DONE").read_text() != before
    assert sampled_at(world / "cache-rounds") == [*sampled, *[1.0] * 4]  # the start and three rounds


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def test_the_table_tells_the_whole_way_and_which_round_was_worse() -> None:
    def of_round(number: int, reward: float, difference: float, whole: float) -> dict[str, Any]:
        known = {"round": number, "pairs": 9, "prompts": 200, "samples": 4, "kl": interval(1, 0.1)}
        models = {
            name: {"reward": interval(r, 0.05), "tokens": 8.0} for name, r in (("policy", reward), ("against", 0.5))
        }
        apart = {"difference": interval(difference, 0.02), "win_rate": interval(0.5, 0.1)}
        return known | models | apart | {"from_start": {**apart, "difference": interval(whole, 0.03)}}

    done = [of_round(1, 0.7, 0.2, 0.2), of_round(2, 0.69, -0.01, 0.19)]
    *_, way, verdict = rounds.table(done).splitlines()
    assert way == (
        "from the start to round 2: reward 0.500 (0.450 to 0.550) → 0.690 (0.640 to 0.740), "
        "difference 0.190 (0.160 to 0.220), win rate 0.500 (0.400 to 0.600)"
    )
    assert verdict == "significantly worse than the round before: none"
    verdict = rounds.table([*done, of_round(3, 0.6, -0.09, 0.1)]).splitlines()[-1]
    assert verdict == "significantly worse than the round before: 3"


def test_a_round_is_the_same_however_its_folder_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(world, "named")

    def second(folder: str) -> dict[str, Any]:
        return identity(rounds.round_config(load_config(run, [f"run.dir={folder}"]), 2))

    monkeypatch.chdir(world)
    relative = second("runs/named")
    assert second(str(world.resolve() / "runs" / "named")) == relative  # as slurm/submit names it
    assert relative["model.name_or_path"] == "runs/named/round-1/final"
    monkeypatch.chdir(world.parent)
    elsewhere = second(str(world / "runs" / "named"))
    assert second("elsewhere/named") != elsewhere


@pytest.mark.slow
def test_small_rounds_take_turns_with_the_prompts(world: Path, door: Door) -> None:
    sections: dict[str, dict[str, Any]] = {
        "generate": {"prompts": str(world / "new.jsonl")},
        "evaluate": {"prompts": str(world / "new.jsonl")},
        "rounds": {"count": 2, "prompts_per_round": 16},
        "train": {"global_batch_pairs": 4, "micro_batch_tokens": 1024},
    }
    run = write_run(world, "small-rounds", cache="cache-small-rounds", **sections)
    assert door.ends(run, stage="rounds")[0] == 0
    folders = [world / "runs" / "small-rounds" / f"round-{number}" for number in (1, 2)]
    assert [json.loads((f / "generation.json").read_text())["prompts"] for f in folders] == [16, 16]
    first, second = ({row["origin"] for row in rows(folder / "pairs.jsonl")} for folder in folders)
    assert first
    assert first.isdisjoint(second)


@pytest.mark.slow
def test_killed_rounds_end_with_the_same_weights(world: Path, door: Door) -> None:
    """SIGKILL as soon as the second round has its pairs; then the same command."""
    sections: dict[str, dict[str, Any]] = {
        "generate": {"prompts": str(world / "new.jsonl")},
        "evaluate": {"prompts": str(world / "new.jsonl")},
        "rounds": {"count": 2},
        "optim": {"learning_rate": 0.01},
        "train": {"global_batch_pairs": 4, "micro_batch_tokens": 1024},
    }
    assert door.ends(write_run(world, "whole", cache="cache-whole", **sections), stage="rounds")[0] == 0
    run, folder = write_run(world, "cut", cache="cache-cut", **sections), world / "runs" / "cut"
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    environment["PYTHONPATH"] = PYTHONPATH
    process = subprocess.Popen([sys.executable, "-m", "prefopt_dist", "rounds", str(run)], env=environment)
    patience.wait_until(process, (folder / "round-2" / "pairs.jsonl").exists, folder, world / "cache-cut")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "DONE").exists()
    assert door.ends(run, stage="rounds")[0] == 0
    final = Path("round-2") / "final" / "model.safetensors"
    assert (folder / final).read_bytes() == (world / "runs" / "whole" / final).read_bytes()
    tables = [(world / "runs" / name / "DONE").read_text() for name in ("whole", "cut")]
    assert tables[0] == tables[1]


# Mistakes


def mistakes(world: Path) -> list[tuple[list[str], list[str], str, bool]]:
    """Words, overrides, stage, found by --check."""
    two = world / "two-outputs"
    if not two.exists():
        write_reward(two, outputs=2)
    return [
        (["generate.rewards: not set", "give [{"], ["generate.rewards=[]"], "generate", True),
        (["generate.n: got 1, must be at least 2"], ["generate.n=1"], "generate", True),
        (
            ["generate.rewards[0].function", "'rewards_for_tests' has no", "letters?"],
            ["generate.rewards=[{function: rewards_for_tests:letter}]"],
            "generate",
            True,
        ),
        (["has 2 outputs", "must have 1"], [f"generate.rewards=[{{model: {two}}}]"], "generate", True),
        (
            ["generate.max_new_tokens: got 256", "data.max_length (256)"],
            ["generate.max_new_tokens=256"],
            "generate",
            True,
        ),
        (["generate.rewards: an entry has function None"], ["generate.rewards=[{weight: 2.0}]"], "generate", True),
        (["generate.prompts", "nowhere.jsonl", "does not exist"], ["generate.prompts=nowhere.jsonl"], "generate", True),
        (["evaluate.prompts: not set", "give prompts"], [], "rounds", True),
        (
            ["reference.name_or_path", "rounds.reference=start", "rounds.reference=first"],
            [f"evaluate.prompts={world / 'new.jsonl'}", f"reference.name_or_path={world / 'model'}"],
            "rounds",
            True,
        ),
        (
            ["data.weight: got 'confidence'", "made of its answers", "chosen_score.reward"],
            [f"evaluate.prompts={world / 'new.jsonl'}", "data.weight=confidence"],
            "rounds",
            True,
        ),
        (
            ["data.margin: got 'chosen_score.reward - other'", "no number in 'other'"],
            [f"evaluate.prompts={world / 'new.jsonl'}", "data.margin=chosen_score.reward - other"],
            "rounds",
            True,
        ),
    ]


def test_mistakes_end_with_one_message(world: Path, door: Door) -> None:
    run = write_run(world, "mistakes")
    for words, overrides, stage, early in mistakes(world):
        words = [word.replace("'rewards_for_tests' has", "rewards_for_tests has") for word in words]
        if "nowhere.jsonl" in words:  # read by the ranks in another way
            door.fails(words, *overrides, "--check", stage=stage, run=run)
        else:
            door.fails(words, *overrides, stage=stage, run=run, early=early)


def test_rounds_in_the_folder_of_a_training_that_is_done(world: Path, door: Door) -> None:
    run = write_run(world, "trained", evaluate={"prompts": str(world / "new.jsonl")})
    folder = world / "runs" / "trained"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"identity": identity(load_config(run))}))
    (folder / "DONE").write_text("trained\n")
    door.fails(["run.dir", "holds one training, which is done, and no rounds"], stage="rounds", run=run)
    assert (folder / "DONE").exists()


def test_prompts_without_prompts(door: Door, world: Path) -> None:
    file = door.lines("texts.jsonl", {"text": "the cat"}, {"text": "sings"})
    door.fails(
        ["texts.jsonl:1: missing_field", "prompt", "name a file of prompts"],
        f"generate.prompts={file}",
        stage="generate",
        run=write_run(world, "mistakes"),
    )
    long = door.lines("long.jsonl", {"prompt": "the cat " * 200})
    door.fails(
        ["long.jsonl:1: prompt_too_long", "244", "data.max_length"],
        f"generate.prompts={long}",
        stage="generate",
        run=write_run(world, "mistakes"),
    )
