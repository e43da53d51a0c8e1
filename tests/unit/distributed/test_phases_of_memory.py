"""Memory that runs out: what is taken for it, the phase that it is told with, and the changes that are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import worlds

from prefopt_dist.config import load_config
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.setup import export_run, memory_advice


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Phase and first line of each report."""
    found: list[tuple[str, str]] = []
    monkeypatch.delenv("PREFOPT_STATUS_FILE", raising=False)
    monkeypatch.setattr(out_of_memory, "_describe", None)
    out_of_memory.describe_with(lambda phase, fault: found.append((phase, fault)) or "said")  # type: ignore[func-returns-value]
    yield found
    out_of_memory.describe_with("{}: {}".format)


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_what_is_taken_for_it(fault: Exception) -> None:
    assert out_of_memory.is_out_of_memory(fault)
    other = ValueError("something else")
    assert not out_of_memory.is_out_of_memory(other)
    other.__cause__ = fault
    assert out_of_memory.is_out_of_memory(other), "it led to the other one"
    elsewhere = ranks.OtherRankFailed(f"rank 1: OutOfMemoryError: {fault}")
    assert not out_of_memory.is_out_of_memory(elsewhere), "the other rank reports it"


def test_the_innermost_phase_is_told_once(
    told: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFOPT_STATUS_FILE", str(tmp_path / "status"))

    @out_of_memory.phase("inner")
    def inner() -> None:
        raise torch.OutOfMemoryError("no room\nmore lines")

    @out_of_memory.phase("outer")
    def outer() -> None:
        with out_of_memory.phase("earlier"):
            pass
        inner()

    with pytest.raises(torch.OutOfMemoryError):
        outer()
    assert out_of_memory.reported()
    assert told == [("inner", "no room")]
    assert capsys.readouterr().err == "[rank 0] error: said\n"
    assert (tmp_path / "status").read_text() == "2\nerror: said\n"


def test_an_export_is_a_phase(told: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ranks, "run_on_rank_zero", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        export_run.export_checkpoint(None, None, tmp_path, None, target=tmp_path, merged=False)  # type: ignore[arg-type]
    assert told == [("export", "no room")]


def test_other_faults_are_not_told(told: list[tuple[str, str]]) -> None:
    with pytest.raises(RuntimeError), out_of_memory.phase("work"):
        raise RuntimeError("shape mismatch")
    assert told == []


@pytest.mark.parametrize(
    ("stage", "phase", "overrides", "first", "not_named"),
    [
        ("train", "training step", [], ["train.micro_batch_tokens=256", "model.checkpointing=all"], "reference."),
        ("train", "training step", ["model.checkpointing=all"], ["train.micro_batch_tokens=256"], "checkpointing"),
        ("train", "first pass", [], ["reference.micro_batch_tokens=512", "reference.offload=cpu"], "checkpointing"),
        ("train", "first pass", ["reference.offload=cpu"], ["reference.micro_batch_tokens=512"], "offload=cpu"),
        ("train", "evaluation", ["reference.micro_batch_tokens=300"], ["reference.micro_batch_tokens=150"], "train."),
        ("evaluate", "evaluation", [], ["reference.micro_batch_tokens=512"], "offload_optimizer"),
        ("generate", "sampling", ["generate.batch_tokens=100"], ["generate.batch_tokens=50"], "answers"),
        ("train", "sampling", ["answers.max_new_tokens=40"], ["answers.max_new_tokens=20", "answers.number=0"], "gen"),
        ("generate", "scoring by the rewards", [], ["generate.batch_tokens=", "GPUs with more memory"], "offload"),
        ("train", "scoring by the rewards", [], ["generate.batch_tokens=", "GPUs with more memory"], "ranks"),
        ("train", "export", [], ["reference.offload=cpu", "more ranks"], "deepspeed"),
        ("export", "export", ["lora.r=4", "export.merged=true"], ["export.merged=false", "reference.off"], "deepspeed"),
        ("train", "start", [], ["offload_optimizer (device cpu)"], "tokens"),
    ],
)
def test_the_changes_that_are_named(
    tmp_path: Path, stage: str, phase: str, overrides: list[str], first: list[str], not_named: str
) -> None:
    run = tmp_path / "run.yaml"
    worlds.write_run(run, tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run")
    named = memory_advice._remedies(load_config(run, overrides), stage, phase)
    assert len(named) >= len(first), named
    assert all(change.startswith(wanted) for change, wanted in zip(named[: len(first)], first, strict=True)), named
    assert not [change for change in named if not_named in change]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's YAML beside its model, and two ranks."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))
    worlds.write_model(tmp_path / "model")
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run")
    return tmp_path / "run.yaml"


def test_the_estimate_is_that_of_the_stage(run: Path) -> None:
    """A training samples by the section answers, whatever generate says; an evaluation alone has no optimizer."""
    rewarded = "generate.rewards=[{function: rewards_for_tests:letters}]"

    def estimate(stage: str, phase: str, *overrides: str) -> int:
        return memory_advice._estimate(load_config(run, overrides), stage, phase)

    much = "generate.batch_tokens=100000"
    assert estimate("train", "sampling", rewarded, much) == estimate("train", "sampling")
    assert estimate("generate", "sampling", rewarded, much) > estimate("generate", "sampling", rewarded)
    assert estimate("evaluate", "evaluation") == estimate("train", "first pass") < estimate("train", "evaluation")
    with pytest.raises(LookupError, match="server"):
        estimate("generate", "sampling", rewarded, "generate.engine=server")


def test_the_estimate_is_that_of_the_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' attention has no blocks of scores, and the rectangles' hidden states are copied."""
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda"))
    config = load_config(run)
    shared = memory_advice._estimate(config, "train", "first pass")
    config.run_dir.mkdir()
    (config.run_dir / "run.json").write_text(json.dumps({"path": "plain"}))
    assert memory_advice._estimate(config, "train", "first pass") != shared


def test_the_message_comes_whatever_cannot_be_read(run: Path, tmp_path: Path) -> None:
    gone = load_config(run, [f"deepspeed.policy={tmp_path / 'gone.json'}"])
    said = memory_advice.describe(gone, "train", "training step", "CUDA out of memory")
    assert "out of memory in the training step, on rank 0" in said
    assert "The plan's estimate is unknown (UserError: " in said
    assert "Change one of these: more ranks (other changes are unknown, UserError: " in said
