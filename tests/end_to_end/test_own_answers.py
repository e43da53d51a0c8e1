"""A run's own answers: what is measured, who made which, stops and kills, and the verdict at the end."""

from __future__ import annotations

import gc
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import answers_cases
import case_runner
import numpy as np
import plain
import pytest
import torch
from answers_cases import NUMBER, samples, write_run
from door import Door, one_process_group
from places import TESTS

from prefopt_dist.cli import main
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts import measures, transformers_engine
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.store import Answer, AnsweredPrompt, SampleStore
from prefopt_dist.setup import answer_engines, own_answers, rewards
from prefopt_dist.training import evaluation


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("answers")
    answers_cases.write_world(folder)
    with one_process_group():
        yield folder


@pytest.fixture
def door(world: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(world, capsys)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("perf/")}


def answered(*answers: list[int]) -> AnsweredPrompt:
    prompt = Prompt(0, "p.jsonl:1", "say", None, {}, [1])
    return AnsweredPrompt(prompt, [Answer(list(ids), "", None, True) for ids in answers], [])


# What is measured


def test_measures_of_the_ids() -> None:
    found = [answered([1, 2, 3, 4, 9]), answered([5, 5, 5, 5, 5, 5]), answered([1, 2, 3, 4, 9])]
    values = measures.text_measures(found, stop_ids=(9,))
    assert values["prompts"] == 3
    assert values["length"] == 16 / 3
    assert values["ended"] == 2 / 3
    assert values["repeated_4grams"] == 2 / 7  # of 2 + 3 + 2 pieces, two of the fives stood before
    assert values["distinct"] == 2 / 3
    assert measures.repeated_share([[1, 2]]) == 0


def test_nats_are_of_all_tokens() -> None:
    assert measures.nats_per_token(np.array([-1.0, -5.0]), [1, 2]) == 2.0


def exact_nats(folder: Path, store: Path) -> float:
    """Nats a token of a store's answers under a model, by plain transformers in float64, one at a time."""
    model = plain.build_plain(folder)
    total = tokens = 0.0
    for one in SampleStore(store).answered(None):
        ids = torch.tensor([one.prompt.ids + one.answers[0].ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, :-1], -1)
        n = len(one.answers[0].ids)
        total += float(logps.gather(1, ids[0, 1:, None])[-n:].sum())
        tokens += n
    return -total / tokens


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("dpo", {}),
        ("lora", {"lora": {"r": 4, "alpha": 8}, "optim": {"learning_rate": 0.02}, "export": {"merged": True}}),
        ("simpo", {"loss": {"name": "simpo", "beta": 2.0, "gamma": 0.5}}),
        ("kto", {"loss": {"name": "kto", "split_pairs": True}}),
        ("sft", {"loss": {"name": "sft"}}),
    ],
)
def test_nats_and_rewards_of_a_run(world: Path, name: str, sections: dict[str, Any]) -> None:
    """Beside a float64 computation of the exported model and of the start; each loss, adapters too."""
    assert main(["train", str(write_run(world, name, **sections))]) == 0
    run = world / "runs" / name
    first, last = rows(run, "answers")
    train = rows(run, "train")
    assert (first["step"], last["step"]) == (0, train[-1]["step"])
    assert first["answers/prompts"] == last["answers/prompts"] == NUMBER
    (policy,) = (run / "answers").iterdir()
    start = next(
        s
        for s in (world / "cache" / "samples").iterdir()
        if "checkpoint" not in json.loads((s / "settings.json").read_text())
    )
    near = pytest.approx
    assert last["answers/nats"] == near(exact_nats(run / "final", policy), rel=1e-5)
    assert last["answers/reference_nats"] == near(exact_nats(world / "model", policy), rel=1e-5)
    assert last["answers/start/reference_nats"] == near(exact_nats(world / "model", start), rel=1e-5)
    assert last["answers/kl_per_token"] == near(last["answers/reference_nats"] - last["answers/nats"], abs=1e-6)
    for measure in ("length", "ended", "repeated_4grams", "distinct", "reward"):
        assert last[f"answers/start/{measure}"] == first[f"answers/{measure}"]
    written = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert len(written) == NUMBER
    apart = np.array([one["reward_after"] - one["reward_before"] for one in written])
    assert last["answers/reward_difference"] == near(apart.mean())
    half = NormalDist().inv_cdf(0.975) * apart.std(ddof=1) / NUMBER**0.5
    assert last["answers/reward_difference_low"] == near(apart.mean() - half)
    won = (apart > 0) + 0.5 * (apart == 0)
    assert last["answers/win_rate"] == near(won.mean())
    facts = json.loads((run / "run.json").read_text())["answers"]
    assert facts["difference"]["mean"] == last["answers/reward_difference"]
    assert facts["verdict_text"] in (run / "DONE").read_text()
    assert str(run / "final") in facts["verdict_text"]


@pytest.mark.slow
def test_a_sweep_samples_the_start_once(world: Path) -> None:
    """Three betas: the first run samples the start, the others find its answers in the cache; so does a resume."""
    loads = 0
    load = answer_engines.load_for_sampling

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal loads
        loads += 1
        return load(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_engines, "load_for_sampling", counted)
        for beta in (0.05, 0.1, 0.5):
            run = write_run(world, f"beta-{beta}", cache="cache-sweep", loss={"name": "dpo", "beta": beta})
            assert main(["train", str(run)]) == 0
            assert loads == 1
    firsts = [rows(world / "runs" / f"beta-{beta}", "answers")[0] for beta in (0.05, 0.1, 0.5)]
    assert without_times(firsts[0]) == without_times(firsts[1]) == without_times(firsts[2])


def test_a_stop_while_the_model_answers_is_obeyed(world: Path, door: Door) -> None:
    run, folder = write_run(world, "stopped"), world / "runs" / "stopped"
    write = SampleStore.write_answers
    made: list[int] = []

    def write_and_ask(self: SampleStore, number: int, answers: Any) -> None:
        write(self, number, answers)
        if self.folder.parent == folder / "answers":
            made.append(number)
            if len(made) == 2:
                (folder / "STOP").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleStore, "write_answers", write_and_ask)
        assert door.ends(run)[0] == 0
        assert "while the trained model answers" in (folder / "STOPPED").read_text()
        assert not (folder / "DONE").exists()
        assert not (folder / "final").exists()
        kept = samples(folder / "answers")
        assert len(kept) == 2
        assert door.ends(run)[0] == 0
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert samples(folder / "answers").items() >= kept.items()
    assert (folder / "DONE").exists()
    assert not (folder / "STOPPED").exists()


EVERY = {
    "data": {"eval": "pairs.jsonl"},
    "eval": {"every_steps": 1, "at_start": False},
    "answers": {"every": 1, "number": 16},
    "checkpoint": {"every_steps": 1},
}


@pytest.mark.slow
def test_answers_between_start_and_end(world: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every evaluation; training itself is not changed by it, and a rollback takes them back."""
    monkeypatch.chdir(world)
    keep = {"checkpoint": {"every_steps": 1, "keep_best": "answers/reward"}}
    assert door.ends(write_run(world, "every", **(EVERY | keep)))[0] == 0
    folder = world / "runs" / "every"
    found = rows(folder, "answers")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    assert all("answers/kl" not in row for row in found[1:4])
    assert all(row["answers/nats"] > 0 for row in found[1:])
    assert len(list((folder / "answers").iterdir())) == 4
    best = max(found[1:], key=lambda row: row["answers/reward"])["step"]
    assert (folder / "checkpoints" / f"step-{best:08d}").is_dir()
    exported = write_run(world, "every", **(EVERY | keep), export={"checkpoint": "best", "dir": "best"})
    assert door.ends(exported, stage="export")[0] == 0
    assert f"step-{best:08d}" in json.loads(Path("best/prefopt_export.json").read_text())["checkpoint"]

    assert door.ends(write_run(world, "seldom", **(EVERY | {"answers": {"number": 16}})))[0] == 0
    for row, other in zip(rows(folder, "train"), rows(world / "runs" / "seldom", "train"), strict=True):
        assert without_times(row) == without_times(other)
    # Back to step 2: what was answered after it is made anew, the same.
    for name in ("step-00000003", "step-00000004"):
        shutil.rmtree(folder / "checkpoints" / name)
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "final")
    assert door.ends(write_run(world, "every", **EVERY))[0] == 0
    again = rows(folder, "answers")
    assert [row["step"] for row in again] == [0, 1, 2, 3, 4]
    for row, other in zip(again, found, strict=True):
        assert row["answers/reward"] == other["answers/reward"]


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["checkpoint.keep_best", "answers/length", "neither longer"], ["checkpoint.keep_best=answers/length"]),
        (["checkpoint.keep_best", "answers/kl", "at the end"], ["checkpoint.keep_best=answers/kl"]),
        (["answers.every", "eval.every_steps"], ["eval.every_steps=null"]),
        (["checkpoint.keep_best", "answers.every"], ["answers.every=null", "checkpoint.keep_best=answers/reward"]),
        (["generate.rewards"], ["generate.rewards=[]", "checkpoint.keep_best=answers/win_rate"]),
        (["answers.every", "generate.rewards[0]"], ['generate.rewards=[{"model": "model"}]']),
        (["answers.max_new_tokens", "data.max_length"], ["answers.max_new_tokens=256"]),
    ],
)
def test_mistakes_in_the_section(world: Path, door: Door, words: list[str], overrides: list[str]) -> None:
    sections = EVERY | {"data": {"eval": str(world / "pairs.jsonl")}}
    door.fails(words, *overrides, run=write_run(world, "mistaken", **sections), early=True)


def test_an_early_stop_by_answers_ends_with_a_verdict(world: Path, door: Door) -> None:
    """Its last row has what the reference says too, and a start that finds the checkpoint knows that it was the end."""
    sections = EVERY | {
        "data": {"eval": str(world / "pairs.jsonl")},
        "train": {"epochs": 3, "early_stop": {"metric": "answers/distinct", "evaluations": 1}},
    }
    run, folder = write_run(world, "early", **sections), world / "runs" / "early"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "HIGHER", (*evaluation.HIGHER, "distinct"))  # a metric that does not change
        assert door.ends(run)[0] == 0
        last = rows(folder, "answers")[-1]
        assert last["step"] == rows(folder, "train")[-1]["step"] == 1  # no better than the start
        assert last["answers/reference_nats"] > 0
        assert (folder / "final").is_dir()
        # Killed before its end: from the checkpoint it is at the end again.
        (folder / "DONE").unlink()
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
        assert door.ends(run)[0] == 0
    assert without_times(rows(folder, "answers")[-1]) == without_times(last)


def test_a_diverged_model_is_exported_and_called_so(world: Path, door: Door) -> None:
    choose = transformers_engine.choose_tokens

    def nothing(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return choose(logits, *arguments) if not diverged else torch.full((len(logits),), logits.shape[-1])

    diverged: list[int] = []
    copy = answer_engines.copy_for_sampling

    def copied(*arguments: Any, **options: Any) -> Any:
        diverged.append(1)
        before = [parameter.ds_status for parameter in arguments[0].parameters()]
        found = copy(*arguments, **options)
        assert [parameter.ds_status for parameter in arguments[0].parameters()] == before, "small ones stay whole"
        return found

    sums = own_answers.answer_sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_engine, "choose_tokens", nothing)
        patch.setattr(answer_engines, "copy_for_sampling", copied)
        patch.setattr(own_answers, "answer_sums", lambda *a: np.nan * sums(*a))
        assert door.ends(write_run(world, "diverged"))[0] == 0
    facts = json.loads((world / "runs" / "diverged" / "run.json").read_text())
    assert facts["answers"]["verdict"] == "collapsed"
    assert "not finite" in facts["answers"]["verdict_text"]
    assert "answers-collapsed" in [finding["id"] for finding in facts["health"]]
    assert (world / "runs" / "diverged" / "final").is_dir()


def test_a_reward_that_fails_at_the_end_costs_no_export(world: Path, door: Door) -> None:
    told = rewards.ConfiguredRewards.to_scores

    def refuses(self: Any, prompt: Any, number: int, values: Any) -> Any:
        if trained:
            raise UserError("generate.rewards[0].function: no")
        return told(self, prompt, number, values)

    trained: list[int] = []
    copy = answer_engines.copy_for_sampling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.ConfiguredRewards, "to_scores", refuses)
        patch.setattr(answer_engines, "copy_for_sampling", lambda *a, **o: trained.append(1) or copy(*a, **o))
        assert door.ends(write_run(world, "refused"))[0] == 0
    folder = world / "runs" / "refused"
    assert json.loads((folder / "run.json").read_text())["answers"]["verdict"] == "not judged"
    assert "reward_after" not in (folder / "answers.jsonl").read_text()
    assert (folder / "final").is_dir()


@pytest.mark.slow
def test_other_answers_than_before_are_made_anew(world: Path, door: Door) -> None:
    """Prompts or rewards that change once all is done but DONE: no row of the old ones stays."""
    run, folder = write_run(world, "changed"), world / "runs" / "changed"
    assert door.ends(run)[0] == 0
    (folder / "DONE").unlink()
    other = write_run(
        world, "changed", answers={"number": 16}, generate={"rewards": [{"function": "rewards_for_tests:same"}]}
    )
    assert door.ends(other)[0] == 0
    (row,) = rows(folder, "answers")
    assert (row["answers/prompts"], row["answers/reward"], row["step"]) == (16, 1.0, 4)
    assert json.loads((folder / "run.json").read_text())["answers"]["verdict"] == "no difference to be seen"
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 16
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "answers")
    assert door.ends(other)[0] == 0  # sampled again, the same
    assert rows(folder, "answers") == [row]


def test_the_training_s_engine_is_gone_when_the_reference_comes(world: Path, door: Door) -> None:
    alive: list[int] = []
    sums = own_answers.compare.sums_under

    def looked(*arguments: Any) -> Any:
        gc.collect()
        engines = [o for o in gc.get_objects() if type(o).__name__ == "DeepSpeedEngine"]
        alive.append(len(engines))
        return sums(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_answers.compare, "sums_under", looked)
        sections = EVERY | {"data": {"eval": str(world / "pairs.jsonl")}}
        assert door.ends(write_run(world, "freed", **sections))[0] == 0
    assert alive == [0]


def test_a_page_shows_answers_with_odd_line_ends(world: Path, door: Door) -> None:
    run = write_run(world, "dpo")
    assert door.ends(run)[0] == 0
    file = world / "runs" / "dpo" / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "p", "before": "a\u2028b", "after": "c\x85d"}, ensure_ascii=False) + "\n")
    assert door.ends(run, stage="report")[0] == 0


def test_no_answers_is_said_and_not_judged(world: Path, door: Door) -> None:
    run = write_run(world, "none", answers={"number": 0})
    assert door.ends(run)[0] == 0
    facts = json.loads((world / "runs" / "none" / "run.json").read_text())["answers"]
    assert facts["verdict"] == "not judged"
    assert "answers.number" in facts["verdict_text"]
    assert rows(world / "runs" / "none", "answers") == []


def test_long_prompts_are_left_out_and_counted(world: Path) -> None:
    """Of 150 prompts those that leave no 230 tokens of 256; all that do are fewer than are wanted."""
    assert main(["train", str(write_run(world, "long", answers={"max_new_tokens": 230, "number": 60}))]) == 0
    facts = json.loads((world / "runs" / "long" / "run.json").read_text())["answers"]
    assert facts["left_out"] > 0
    assert 0 < facts["prompts"] == 150 - facts["left_out"] < 60


def test_a_bad_reward_ends_the_run_before_training(world: Path, door: Door) -> None:
    run = write_run(world, "bad", generate={"rewards": [{"function": "rewards_for_tests:raises"}]})
    status, said = door.ends(run)
    assert status == 2
    assert "no answer column" in said
    assert rows(world / "runs" / "bad", "train") == [] if (world / "runs" / "bad" / "metrics.jsonl").exists() else True


def test_the_old_key_names_its_successor(world: Path, door: Door) -> None:
    run = door.run("old", tracking={"samples": 8})
    assert "answers.number" in door.fails(["tracking.samples"], run=run, early=True)
    config = door.run("older", tracking={"samples": 0})  # as every saved config.yaml of then has it
    assert main(["train", str(config), "--check"]) == 0


# Ranks and kills


@pytest.mark.slow
def test_ranks_and_kills_change_no_answer(tmp_path: Path) -> None:
    """The start's and a given checkpoint's answers are those of one rank; what a kill left is not sampled again."""
    two = tmp_path / "two"
    case_runner.run_cases("answers_cases.py", 2, two, ["resumed", "whole", "sharded"])
    whole, resumed, sharded = (case_runner.found(two, case) for case in ("whole", "resumed", "sharded"))
    assert len(whole["start"]) == len(whole["policy"]) == 5
    assert whole["facts"]["verdict_text"] in whole["done"]
    assert 0 < len(resumed["there"]) < 5
    assert resumed["after"].items() >= resumed["there"].items()
    assert sorted(resumed["made"]) == [n for n in range(5) if f"samples-{n:05d}.jsonl" not in resumed["there"]]
    assert resumed["start_kept"]
    assert resumed["done"]
    # Without room for a whole copy the sharded engine answers: the same tokens.
    assert (sharded["start"], sharded["policy"]) == (whole["start"], whole["policy"])
    assert sharded["facts"]["nats"] == whole["facts"]["nats"]
    # One rank, from nothing: the same start's answers.
    with one_process_group():
        assert main(["train", str(write_run(two, "one", cache="cache-one"))]) == 0
        assert samples(two / "cache-one" / "samples") == whole["start"]
        # One rank, from the two ranks' last checkpoint: the same answers of it.
        shutil.copytree(two / "runs" / "two", two / "runs" / "given")
        assert answers_cases.again(two)["policy"] == whole["policy"]


def test_a_run_from_before_there_were_answers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that d31efad left at step 3: it ends with the same command, and with a verdict."""
    with tarfile.open(TESTS / "data" / "runs_of_before" / "d31efad.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    with one_process_group():
        assert main(["train", "run.yaml"]) == 0
    kinds = [(row["kind"], row["step"]) for row in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())]
    assert kinds == [*(("train", step) for step in range(1, 7)), ("answers", 6)]
    starts = json.loads(Path("run/run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]
    assert "not judged" in Path("run/DONE").read_text()
