"""The small parts of training: schedule, optimizer, requests, run folder, gate."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from prefopt_dist.checkpoint.export import MARKER, check_target
from prefopt_dist.checkpoint.run_folder import LIBRARIES, RunFolder
from prefopt_dist.commands.rounds import Asked
from prefopt_dist.config import Config, identity, load_config
from prefopt_dist.errors import UserError
from prefopt_dist.objectives import DPO, SFT, Sequences, Terms
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check
from prefopt_dist.setup import prepare_models
from prefopt_dist.training.optimizer import adamw, learning_rate
from prefopt_dist.training.stop import Request, Requests

# Schedule


def rates(total: int, shape: str, warmup_ratio: float) -> list[float]:
    return [learning_rate(k, total, peak=2.0, shape=shape, warmup_ratio=warmup_ratio) for k in range(total)]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 1001])
def test_no_rate_is_zero_or_above_the_peak(shape: str, warmup_ratio: float, total: int) -> None:
    found = rates(total, shape, warmup_ratio)
    assert all(0 < r <= 2.0 for r in found)
    assert max(found) == 2.0
    top = found.index(2.0)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_rates_by_hand() -> None:
    """Four updates of warm-up, then six that end one step before 0."""
    up = [0.5, 1.0, 1.5, 2.0]
    assert rates(10, "linear", 0.4) == pytest.approx([*up, 2.0, 2 * 5 / 6, 2 * 4 / 6, 1.0, 2 * 2 / 6, 2 / 6])
    assert rates(10, "constant", 0.4) == pytest.approx([*up, *[2.0] * 6])
    down = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert rates(10, "cosine", 0.4) == pytest.approx([*up, *down])
    assert rates(4, "linear", 0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(1, "linear", 0.1) == rates(1, "cosine", 0.0) == [2.0]


def test_last_rates() -> None:
    assert rates(1000, "linear", 0.1)[-1] == pytest.approx(2 / 900)
    assert rates(1000, "cosine", 0.1)[-1] == pytest.approx(1 - math.cos(math.pi / 900))


def test_the_warm_up_is_the_ratio_s_share() -> None:
    assert rates(100, "constant", 0.07).index(2.0) == 6


# Optimizer


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    return adamw(model, learning_rate=0.1, weight_decay=weight_decay, betas=(0.8, 0.95), eps=1e-6)


def test_weight_decay_is_for_matrices() -> None:
    model = Parts()
    groups = optimizer(model, 0.3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    first, second = ([id(p) for p in g["params"]] for g in groups)
    assert first == [id(model.matrix.weight), id(model.table.weight)]
    assert second == [id(model.matrix.bias), id(model.norm.weight), id(model.norm.bias)]
    for g in groups:
        assert (g["lr"], g["betas"], g["eps"]) == (0.1, (0.8, 0.95), 1e-6)


def test_without_weight_decay_there_is_one_group() -> None:
    model = Parts()
    (group,) = optimizer(model, 0.0).param_groups
    assert group["weight_decay"] == 0.0
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


def test_no_empty_group() -> None:
    (group,) = optimizer(nn.Linear(3, 4, bias=False), 0.3).param_groups
    assert group["weight_decay"] == 0.3
    (group,) = optimizer(nn.LayerNorm(3), 0.3).param_groups
    assert group["weight_decay"] == 0.0


def test_the_dimensions_of_a_sharded_parameter_are_those_of_the_whole() -> None:
    model = nn.Linear(3, 4)
    for p in model.parameters():
        shape = p.shape
        p.data = torch.zeros(0)
        p.ds_shape = shape  # type: ignore[attr-defined]
    groups = optimizer(model, 0.3).param_groups
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(model.weight)], [id(model.bias)]]


def test_a_step_is_that_of_the_paper() -> None:
    """First step, bias-corrected: θ ← (1 − ηλ) θ − η g / (|g| + ε)."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.copy_(torch.tensor([3.0]))
    it = optimizer(model, 0.5)
    model.weight.grad, model.bias.grad = torch.tensor([[0.3, -4.0]]), torch.tensor([0.01])
    it.step()
    assert model.weight.tolist() == [pytest.approx([0.95 - 0.1, -1.9 + 0.1], rel=1e-4)]
    assert model.bias.tolist() == pytest.approx([2.9], rel=1e-4)


# Requests


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def test_nothing_is_asked(tmp_path: Path) -> None:
    assert Requests(tmp_path, rank=0, max_hours=None).look() == Request(stop=False, save=False)
    assert Requests(tmp_path / "absent", rank=0, max_hours=1.0).look() == Request(stop=False, save=False)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [(["STOP"], (True, False)), (["SAVE"], (False, True)), (["STOP", "SAVE"], (True, True))],
)
def test_files_are_rank_0_s_to_see(tmp_path: Path, files: list[str], wanted: tuple[bool, bool]) -> None:
    first, second = (Requests(tmp_path, rank=r, max_hours=None) for r in (0, 1))
    for name in files:
        (tmp_path / name).touch()
    assert first.look() == wanted
    assert second.look() == (False, False)
    second.obeyed()
    assert all((tmp_path / name).exists() for name in files)
    if "STOP" in files:
        assert first.reason() == "asked by the file STOP"
    first.obeyed()
    assert not any((tmp_path / name).exists() for name in files)
    assert first.look() == (False, False)
    first.obeyed()  # nothing to remove


def test_a_round_that_saves_leaves_the_stop_to_the_rounds(tmp_path: Path) -> None:
    asked = Asked(tmp_path, rank=0, max_hours=None)
    (tmp_path / "SAVE").touch()
    assert asked.look() == (False, True)
    asked.obeyed()
    assert not (tmp_path / "SAVE").exists()
    assert asked.look() == (False, False)  # not again after each step
    (tmp_path / "STOP").touch()
    assert asked.look() == (True, False)
    asked.obeyed()
    assert (tmp_path / "STOP").exists()
    assert asked.look() == (True, False)
    asked.ended()
    assert not (tmp_path / "STOP").exists()
    assert asked.look() == (False, False)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_any_rank(tmp_path: Path, handlers: None, rank: int, number: signal.Signals) -> None:
    requests = Requests(tmp_path, rank=rank, max_hours=None)
    requests.catch_signals()
    assert not requests.look().stop
    os.kill(os.getpid(), number)
    assert requests.look() == Request(stop=True, save=False)
    assert requests.look().stop  # until it is obeyed by ending
    assert requests.reason() == f"asked by {number.name}"


def test_max_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Requests(tmp_path, rank=r, max_hours=0.5) for r in (0, 1))
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 1790)
    assert not first.look().stop
    monkeypatch.setattr(time, "monotonic", lambda: start + 1810)
    assert first.look().stop
    assert not second.look().stop
    assert first.reason() == "train.max_hours=0.5 are over"


def test_reason_for_a_signal_to_another_rank(tmp_path: Path) -> None:
    assert Requests(tmp_path, rank=0, max_hours=9.0).reason() == "asked by a signal to another rank"


def test_a_stop_that_comes_while_a_checkpoint_is_saved_is_kept(tmp_path: Path) -> None:
    """The loop after SAVE: look, save a checkpoint (minutes), obeyed. A STOP of those minutes must stop it."""
    requests = Requests(tmp_path, rank=0, max_hours=None)
    (tmp_path / "SAVE").touch()
    assert requests.look() == Request(stop=False, save=True)
    (tmp_path / "STOP").touch()
    requests.obeyed()
    assert requests.look().stop


# Run folder


def config(tmp_path: Path, *overrides: str) -> Config:
    text = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "model": {"name_or_path": "some/model"},
        "data": {"train": [{"path": "a.jsonl", "weight": 0.5}, "b.jsonl"], "eval": {"x": "c.jsonl"}},
        "optim": {"learning_rate": 5e-7},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(text))
    return load_config(file, overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    it = RunFolder(tmp_path / "run")
    yield it
    it.close()


def test_a_first_start(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=2)
    said = json.loads((folder.path / "run.json").read_text())
    assert said.keys() == {"run_id", "wandb_id", "identity", "starts", "data", "reference", "versions"}
    assert said["identity"] == json.loads(json.dumps(identity(config(tmp_path))))
    assert said["versions"].keys() == {*LIBRARIES, "python"}
    assert (
        said["versions"]["torch"] == torch.__version__.split("+")[0] or said["versions"]["torch"] == torch.__version__
    )
    assert said["data"] == {"train": None, "eval": None}
    assert said["reference"] is None
    (start,) = said["starts"]
    assert start["world_size"] == 2
    assert start["step"] is None
    assert datetime.fromisoformat(start["time"]).tzinfo is not None
    assert dict(folder.facts) == said
    assert load_config(folder.path / "config.yaml") == config(tmp_path)
    assert folder.metrics == folder.path / "metrics.jsonl"
    assert folder.summary() is None


def test_a_second_start_goes_on(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=2)
    folder.note_start_step(0)
    folder.note(reference={"key": "k", "sequences_scored": 1, "sequences_reused": 0})
    folder.stopped("asked by the file STOP", 7)
    folder.close()
    for name in ("STOP", "SAVE"):
        (folder.path / name).touch()
    text = (folder.path / "STOPPED").read_text()
    assert "asked by the file STOP" in text
    assert "step 7" in text

    again = RunFolder(folder.path)
    again.open(config(tmp_path, "train.micro_batch_tokens=99", "run.cache=elsewhere"), world_size=3)
    again.note_start_step(7)
    said = json.loads((folder.path / "run.json").read_text())
    assert [(s["world_size"], s["step"]) for s in said["starts"]] == [(2, 0), (3, 7)]
    assert said["run_id"] == folder.facts["run_id"]
    assert said["wandb_id"] == folder.facts["wandb_id"]
    assert said["reference"]["key"] == "k"
    assert not (folder.path / "STOPPED").exists()
    assert not (folder.path / "STOP").exists()
    assert load_config(folder.path / "config.yaml").train.micro_batch_tokens == 99
    again.close()


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["run.seed=4"], ["run.seed: was 3, now 4"]),
        (["loss.beta=0.2"], ["loss.beta: was 0.1, now 0.2"]),
        (["loss.name=sft"], ["loss.name: was dpo, now sft", "loss.beta: was 0.1, now absent"]),
        (["optim.learning_rate=1e-6", "train.epochs=2"], ["optim.learning_rate: was 5e-07", "train.epochs: was 1"]),
        (["train.global_batch_pairs=8"], ["train.global_batch_pairs: was 64, now 8"]),
        (["data.max_length=700"], ["data.max_length: was 1024, now 700"]),
        (["reference.name_or_path=other"], ["reference.name_or_path: was None, now other"]),
    ],
)
def test_another_run_is_refused_with_its_keys(
    tmp_path: Path, folder: RunFolder, overrides: list[str], lines: list[str]
) -> None:
    folder.open(config(tmp_path), world_size=1)
    folder.close()
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    for attempt in (
        lambda it, c: it.check_identity(c),
        lambda it, c: it.open(c, world_size=1),
    ):
        with pytest.raises(UserError) as caught:
            attempt(RunFolder(folder.path), config(tmp_path, *overrides))
        message = str(caught.value)
        assert str(folder.path) in message
        assert all(line in message for line in lines)
        assert "tracking" not in message
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_what_may_change_between_starts(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=1)
    free = ["train.max_hours=2", "eval.every_steps=7", "checkpoint.keep=3", "tracking.wandb.mode=disabled"]
    free += ["model.checkpointing=all", "reference.offload=cpu", "data.eval=other.jsonl", "tracking.log_every_steps=2"]
    RunFolder(folder.path).check_identity(config(tmp_path, *free))


def test_identity_of_an_absent_folder(tmp_path: Path, folder: RunFolder) -> None:
    folder.check_identity(config(tmp_path))
    assert not folder.path.exists()


HOLD = """
import sys, time
from pathlib import Path
from prefopt_dist.config import load_config
from prefopt_dist.checkpoint.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open(load_config(sys.argv[2]), world_size=1)
print("held", flush=True)
sys.stdin.readline()
"""


def test_one_job_at_a_time(tmp_path: Path, folder: RunFolder) -> None:
    """A second process is refused with the holder's name; when the holder is killed the folder is free."""
    config(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path), str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = (folder.path / "run.json").read_bytes()
        (folder.path / "STOP").touch()
        with pytest.raises(UserError) as caught:
            folder.open(config(tmp_path), world_size=1)
        message = str(caught.value)
        assert f"process {process.pid}" in message
        assert os.uname().nodename in message
        assert str(folder.path / "STOP") in message
        assert (folder.path / "run.json").read_bytes() == before
        assert (folder.path / "STOP").exists()  # it is meant for the holder
    finally:
        process.kill()
        process.wait(30)
    again = RunFolder(folder.path)
    again.open(config(tmp_path), world_size=1)
    assert f"process {os.getpid()}" in (folder.path / ".lock").read_text()
    assert str(process.pid) not in (folder.path / ".lock").read_text().split("process ")[1].split(",")[0]
    again.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open(config(tmp_path), world_size=1)


def test_a_refused_lock_leaves_no_descriptor(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=1)
    before = len(os.listdir("/proc/self/fd"))
    refused = [RunFolder(folder.path) for _ in range(3)]
    for it in refused:
        with pytest.raises(UserError, match="held by another job"):
            it.open(config(tmp_path), world_size=1)
    after = len(os.listdir("/proc/self/fd"))
    for it in refused:
        it.close()
    assert after == before


def test_two_first_starts_of_other_runs(tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run begins and ends between this one's look and its lock."""
    mine, theirs = config(tmp_path), config(tmp_path, "run.seed=4")
    take = RunFolder._take_lock

    def slow(self: RunFolder) -> None:
        monkeypatch.setattr(RunFolder, "_take_lock", take)
        other = RunFolder(folder.path)
        other.open(theirs, world_size=1)
        other.close()
        take(self)

    monkeypatch.setattr(RunFolder, "_take_lock", slow)
    with pytest.raises(UserError, match=r"run\.seed: was 4, now 3"):
        folder.open(mine, world_size=1)


def test_done(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=1)
    folder.done("it went well\n  loss 0.1")
    assert folder.summary() == "it went well\n  loss 0.1"


def test_stopped_in_the_first_pass(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(config(tmp_path), world_size=1)
    folder.stopped("asked by SIGTERM", None, "in the first pass")
    assert "asked by SIGTERM; stopped in the first pass" in (folder.path / "STOPPED").read_text()


def test_a_run_json_that_is_none_names_itself(tmp_path: Path, folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json:1"):
        folder.open(config(tmp_path), world_size=1)


# Gate, on one rank: the reduction is rank_cases.py's


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *a, **k: None)


def units(off: float, reference: float = -100.0, tokens: int = 1) -> tuple[Terms, torch.Tensor, torch.Tensor]:
    stored = torch.tensor([[reference, -50.0], [-0.1, -7.0]], dtype=torch.float64)
    live = stored.clone()
    live[0, 0] += off
    counts = torch.full((2, 2), tokens)
    return DPO(0.1)(Sequences(live, counts, stored)), stored, counts


def decide(off: float, loss: float = math.log(2), *, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    gate = Step0Check(DPO(0.1), RoundingTolerance.of(LlamaConfig(), dtype), torch.device("cpu"))
    gate.add(*units(0.0))
    gate.add(*units(off, **more))
    nothing = torch.zeros(0, 2)
    gate.add(DPO(0.1)(Sequences(nothing, nothing, nothing)), nothing, nothing)
    gate.decide(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_lets_the_start_pass(one_rank: None, dtype: torch.dtype) -> None:
    """Up to the tolerance of the dtype, and not beyond it."""
    decide(0.0, dtype=dtype)
    decide(9e-4 if dtype == torch.float32 else 2.2, dtype=dtype)
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(1.1e-3 if dtype == torch.float32 else 2.3, dtype=dtype)


@pytest.mark.parametrize(("config", "allowed"), [(LlamaConfig(), 1e-5), (MixtralConfig(), 0.2 + 1e-5)])
def test_a_router_s_last_bit_is_rounding(config: PreTrainedConfig, allowed: float) -> None:
    """0.1 nats times the root of 4 tokens in float32, where there are experts."""
    live, stored = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    times = RoundingTolerance.of(config, torch.float32).times(live, stored, torch.tensor([4.0]))
    assert times.item() == pytest.approx(0.5 / allowed)


def test_a_short_likely_response_in_bfloat16_is_allowed_the_rounding_of_its_logits(one_rank: None) -> None:
    decide(0.2, dtype=torch.bfloat16, reference=-0.01)
    decide(2.4, dtype=torch.bfloat16, reference=-0.01, tokens=100)
    with pytest.raises(UserError, match=r"differ by up to 0\.3 nats, and by 1\.11 times"):
        decide(0.3, dtype=torch.bfloat16, reference=-0.01)


@pytest.mark.parametrize("off", [1.1e-3, -1.1e-3, 5.0, math.nan, math.inf])
def test_the_gate_refuses_other_log_probs(one_rank: None, off: float) -> None:
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(off)


def test_the_gate_refuses_a_stored_nan(one_rank: None) -> None:
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(0.0, reference=math.nan)


@pytest.mark.parametrize("loss", [0.70, 0.68, math.nan, math.inf])
def test_the_gate_refuses_another_loss(one_rank: None, loss: float) -> None:
    with pytest.raises(UserError, match=r"must be 0\.693147"):
        decide(0.0, loss)


def test_the_gate_of_a_loss_without_a_closed_form(one_rank: None) -> None:
    """Any loss passes for it, where one with a closed form refuses the same number."""
    Step0Check(SFT(), RoundingTolerance.of(LlamaConfig(), torch.float32), torch.device("cpu")).decide(3.0)
    with pytest.raises(UserError, match="the loss is 3"):
        Step0Check(DPO(0.1), RoundingTolerance.of(LlamaConfig(), torch.float32), torch.device("cpu")).decide(3.0)


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path) -> None:
    check_target(tmp_path / "absent")
    check_target(tmp_path)
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match=r"export\.dir: .* is no export of this job"):
        check_target(tmp_path)
    (tmp_path / MARKER).write_text("{}")
    check_target(tmp_path)


def test_deepspeeds_files_of_the_repository_serve_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "deepspeed_configs/policy_zero3.json"
    usual = prepare_models.zero_settings(str(Path(__file__).parents[1] / name), "deepspeed.policy")
    monkeypatch.chdir(tmp_path)
    assert prepare_models.zero_settings(name, "deepspeed.policy") == usual
    for other in ("deepspeed_configs/mine.json", "deepspeed_configs/../pyproject.toml"):
        with pytest.raises(UserError, match="does not exist"):
            prepare_models.zero_settings(other, "deepspeed.policy")
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 3, "sub_group_size": 7}}')
    assert prepare_models.zero_settings(name, "deepspeed.policy")["zero_optimization"]["sub_group_size"] == 7
