"""`plan` as a command: work, memory and disk of a run's own data, and its statuses."""

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import worlds

from prefopt_dist.cli import main
from prefopt_dist.config import load_config
from prefopt_dist.data import open_rows
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.setup.prepare_data import tokenised_train_folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    worlds.write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # the plan needs none
    worlds.write_pairs(tmp_path / "pairs.jsonl", 40)
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "runs" / "run")
    return tmp_path


def planned_by(world: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, dict[str, Any]]:
    """Status, all that was said, and the JSON."""
    file = world / "plan.json"
    status = main(["plan", str(world / "run.yaml"), f"plan.file={file}", "plan.gpu=h100", *overrides])
    said = capsys.readouterr()
    return status, said.out + said.err, json.loads(file.read_text()) if file.exists() else {}


def test_copies_of_a_store_are_in_the_plan(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the tokenised rows, which are those of the local file."""
    status, said, local = planned_by(world, capsys)
    assert status == 0, said
    url = "memory://bucket/pairs.jsonl"
    (pairs,) = (source.path for source in load_config(world / "run.yaml", []).data.train)
    fsspec.filesystem("memory").pipe("/bucket/pairs.jsonl", Path(pairs).read_bytes())
    status, said, plan = planned_by(world, capsys, f"data.train={url}")
    assert status == 0, said
    assert plan["disk_bytes"]["data"] - local["disk_bytes"]["data"] == Path(pairs).stat().st_size


def test_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys)
    assert status == 0, said
    assert "8 GPUs (h100)" in said
    assert plan["work"]["steps"] == 4
    assert plan["work"]["known"]
    assert plan["disk_bytes"]["store"] == 40 * plan["work"]["sequences"]
    columns = [file for file in world.rglob("tokenised/*/*.bin") if file.is_file()]
    assert plan["disk_bytes"]["data"] == sum(file.stat().st_size for file in columns) > 0
    assert "; data in run.cache " in said
    assert plan["memory"][0]["fits"]
    assert plan["seconds"]["total"] > 4 * plan["seconds"]["step"] > 0
    assert not (world / "runs" / "run").exists()
    assert "network: " not in said, "one node"
    assert plan["network"]["bytes_a_micro_batch"] == 3 * 4 * plan["model"]["parameters"], "of float32"
    status, said, on_two = planned_by(world, capsys, "plan.nodes=2")
    assert f"below {on_two['network']['needed_gb_per_second']:.3g} GB/s of all-reduce the ranks wait for it" in said
    status, said, adapted = planned_by(world, capsys, "lora.r=4")
    assert status == 0, said
    assert "of the adapters are trained" in said
    assert "reference.name_or_path: the path " not in said
    status, said, _ = planned_by(world, capsys, f"reference.name_or_path={world / 'model'}")
    assert "reference.name_or_path: the path shared: " in said, "a plainer path of it would be the run's"
    assert adapted["model"]["trained"] == 4864 < plan["model"]["trained"] == plan["model"]["parameters"]
    assert adapted["seconds"]["step"] == pytest.approx(2 / 3 * plan["seconds"]["step"])


def test_answering_prompts_is_planned_where_there_are_rewards(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def phases(*overrides: str) -> dict[str, Any]:
        status, said, plan = planned_by(world, capsys, "generate.max_new_tokens=40", *overrides)
        assert status == 0, said
        assert ("without generating, loading" in said) == bool(overrides)
        return {p["name"]: p for p in plan["memory"][0]["phases"]}

    rewards = "generate.rewards=[{function: my:score}]"
    assert "generation" not in phases()
    found = phases(rewards)["generation"]
    assert found["host_bytes"] > 0
    judged = phases(rewards, f"evaluate.prompts={world / 'pairs.jsonl'}")["generation"]
    assert judged["device_bytes"] > found["device_bytes"], "one answer each leaves room for more prompts"


def test_kto_s_rows_and_its_pass_before_the_step(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair is two rows, each scored beside its partner's response too."""
    pairs = planned_by(world, capsys)[2]["work"]
    status, said, plan = planned_by(world, capsys, "loss.name=kto", "loss.split_pairs=true")
    assert status == 0, said
    assert (pairs["steps"], plan["work"]["steps"]) == (4, 8)  # 40 pairs, 80 rows, of 11 a step
    assert pairs["sequences"] < plan["work"]["sequences"] <= 160
    work = plan["work"]
    assert work["ahead_flop"] == pytest.approx(work["step_flop"], rel=0.2)  # other responses of the same set
    assert pairs["ahead_flop"] == 0
    world.joinpath("pairs.jsonl").unlink()
    status, said, plan = planned_by(world, capsys, "loss.name=kto", "loss.split_pairs=true")
    assert plan["work"]["ahead_flop"] == plan["work"]["step_flop"] > 0


def test_a_reference_that_moves_costs_a_pass(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first pass and the updates are about what the first pass of a reference that stays is."""
    stays = planned_by(world, capsys)[2]["work"]
    status, said, plan = planned_by(world, capsys, "reference.update_every_steps=1")
    assert status == 0, said
    work = plan["work"]
    assert stays["updates_flop"] == 0 < work["updates_flop"]
    assert work["first_pass_flop"] < 0.6 * stays["first_pass_flop"]
    assert work["first_pass_flop"] + work["updates_flop"] == pytest.approx(stays["first_pass_flop"], rel=0.05)
    sorted_pairs = planned_by(world, capsys, "reference.update_every_steps=1", "loss.name=aot")[2]["work"]
    assert sorted_pairs["updates_flop"] == work["updates_flop"], "its pass is the policy's"
    status, said, _ = planned_by(world, capsys, "reference.update_every_steps=2", "loss.name=orpo")
    assert status == 2
    assert "reference.update_every_steps: got 2, but loss.name=orpo has no reference" in said


def test_data_that_cannot_be_read(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "pairs.jsonl").unlink()
    status, said, plan = planned_by(world, capsys)
    assert status == 0, said
    assert "every row is taken to be as long as data.max_length allows" in said
    assert plan["work"]["steps"] is None
    assert plan["work"]["step_tokens"] == 11 * (128 + 2 * 127)
    assert planned_by(world, capsys, "train.max_steps=7")[2]["work"]["steps"] == 7


def test_a_refusal_ends_with_2(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys, "train.micro_batch_tokens=900000000")
    assert status == 2
    assert "error: plan: " in said
    assert "train.micro_batch_tokens from 900000000 to at most" in said
    assert not plan


def test_ranked_rows_are_planned_with_their_prompt_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of a step, all of the data, and the store's sequences, counted here; one letter is one token or less."""
    draw, rows = np.random.RandomState(4), []
    for i in range(12):
        texts = [f"{'abcdefgh'[k]} " * int(draw.randint(3, 9)) + str(i) for k in range(2 + i % 3)]
        rows.append({"prompt": f"say {i} " * 9, "responses": texts, "ranks": list(range(len(texts)))})
    (world / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={world / 'ranked.jsonl'}", "train.global_batch_pairs=12", "loss.name=plackett_luce"]
    status, said, plan = planned_by(world, capsys, *overrides)
    assert status == 0, said
    config = load_config(world / "run.yaml", overrides)
    tokenizer = load_tokenizer(world / "model", "model.tokenizer")
    data = open_rows(tokenised_train_folder(config, tokenizer, 300))
    assert plan["work"]["sequences"] == sum(2 + i % 3 for i in range(12))
    tokens = 0
    for i in range(data.n):
        beginnings = set()
        for k in range(data.responses_held(i)):
            ids = data.response(i, k).tolist()[:-1]
            beginnings |= {tuple(ids[:n]) for n in range(1, len(ids) + 1)} if k == 0 else set()
            tokens += sum(k == 0 or tuple(ids[:n]) not in beginnings for n in range(1, len(ids) + 1))
        tokens += len(data.prompt(i))
    assert plan["work"]["step_tokens"] == tokens
    status, said, _ = planned_by(world, capsys, *overrides[1:], "data.train=elsewhere/rows")
    assert "as data.max_length allows, with two responses" in said


def test_data_that_would_stop_the_job_stops_its_plan(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys, "inspect.few_rows=stop")
    assert status == 2
    assert "inspect.few_rows" in said
    assert not plan
