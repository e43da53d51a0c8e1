"""Whole jobs of two ranks on the pretended device: a kill and a resume, counts of a step, memory that runs out."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import gpu_train
import pretended
import pretended_cuda
import pretended_job
import pytest
import torch
from gpu_results import Place

pytestmark = pytest.mark.slow
STEPS = 6


class Pretended(gpu_train.World):
    """The world of `make test-gpu`, small, whose jobs compute on the pretended device."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Place(torch.device("cuda", 0), True, folder), ranks=2)
        self.environment = pretended.whole_environment()

    def run(self, name: str, dtype: str = "bfloat16", steps: int = STEPS, **train: object) -> Path:
        """Several micro-batches a step, evaluation and export included."""
        asked: dict[str, object] = {"global_batch_pairs": 16, "micro_batch_tokens": 512}
        return super().run(name, dtype, steps, **(asked | train))

    def start(self, run: Path, **more: str) -> gpu_train.Job:
        """Start the ranks; each writes into the folder of counts beside the run's file."""
        counts = run.with_suffix(".counts")
        counts.mkdir(exist_ok=True)
        environment = self.environment | {pretended_job.COUNTS: str(counts)} | more
        door = [str(Path(pretended_job.__file__))]
        return gpu_train.Process(run, self.ranks, run.with_suffix(".log"), door, environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    if pretended.missing():
        pytest.skip(f"{pretended.missing()}; would run jobs of two ranks on a pretended CUDA device")
    return Pretended(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Pretended) -> Path:
    """A run that nobody disturbs."""
    run = world.run("whole")
    world.end(world.start(run), run)
    return run


def test_a_killed_job_ends_with_the_same_weights(world: Pretended, whole: Path) -> None:
    """As the CPU's kernels compute them; tensors of both devices in one operator would have raised."""
    run = world.run("killed")
    found = gpu_train.kill_and_resume(world, run) | gpu_train.compare(run, whole)
    print(found)
    assert 0 < found["resumed_from_step"] <= found["killed_after_step"] < STEPS
    assert found["same_steps_and_pairs"]
    assert found["different_tensors"] == 0
    for of in (run, whole):
        assert "Traceback" not in of.with_suffix(".log").read_text()
        assert (of.with_suffix("") / "final" / "config.json").exists()


def counted(run: Path) -> list[dict[str, Any]]:
    """What each step of each rank counted, but for the first step, which also makes the optimizer's state."""
    files = sorted(run.with_suffix(".counts").glob("rank-*.jsonl"))
    assert len(files) == 2
    return [step for file in files for step in map(json.loads, file.read_text().splitlines()) if step["step"] > 1]


def test_the_host_reads_once_a_step(whole: Path) -> None:
    """Beside the engine's own waits, and none a micro-batch; copies to the device are of page-locked memory."""
    steps = counted(whole)
    assert len(steps) == 2 * (STEPS - 1)
    assert min(step["micro_batches"] for step in steps) > 1
    for step in steps:
        micro_batches = step["micro_batches"]
        by_part: dict[str, dict[str, int]] = {"ours": {}, "engine": {}}
        for part, what, place, times in step["told"]:
            by_part[part][f"{place.partition(':')[2]}: {what}"] = times
        assert by_part["ours"] == {
            "reduce_metrics: wait: copy to the host, pageable": 1,
            "reduce_metrics: copy to the device": 1,
            "rank_work: copy to the device": 1,
            # Twelve tensors of a micro-batch, and the reference's log-probs.
            "to: copy to the device": 12 * micro_batches,
            "__iter__: copy to the device": micro_batches,
        }
        # The gradient norm made and read, small parameters gathered after the update; a stream a micro-batch.
        assert by_part["engine"] == {
            "is_invalid_grad_norm: wait: aten::_local_scalar_dense": 1,
            "get_grad_norm_direct: wait: copy to the device, pageable": 1,
            "_allgather_params_coalesced: wait: device": 1,
            "independent_gradient_partition_epilogue: wait: stream": micro_batches,
        }
        print(f"{step['launched']} kernels in a step of {micro_batches} micro-batches")


@pytest.mark.parametrize(
    ("phase", "tokens_of_first_pass", "remedy"),
    [
        (
            "training step",
            512,
            "train.micro_batch_tokens=2048 (the longest row must fit); model.checkpointing=all (now ",
        ),
        ("first pass", 8192, "reference.micro_batch_tokens=4096 (the longest row must fit); reference.offload=cpu; "),
    ],
    ids=["training step", "first pass"],
)
def test_memory_that_runs_out_ends_both_ranks_with_one_message(
    world: Pretended, phase: str, tokens_of_first_pass: int, remedy: str
) -> None:
    """The device has 10 MiB beside its context; training asks for 14, and a large micro-batch of the first pass too."""
    run = world.run(phase.replace(" ", "-"), micro_batch_tokens=4096, global_batch_pairs=48)
    config = json.loads(run.read_text())
    config["model"]["checkpointing"] = "none"  # else a start that cannot fit is refused before the first step
    config["reference"] = {"micro_batch_tokens": tokens_of_first_pass}
    run.write_text(json.dumps(config))
    status_file = run.with_suffix(".status")
    memory = str(pretended_cuda.CONTEXT + 10 * 2**20)
    job = world.start(run, PREFOPT_STATUS_FILE=str(status_file), **{pretended.MEMORY: memory})
    until = time.monotonic() + gpu_train.LONGEST
    while job.status() is None and time.monotonic() < until:
        time.sleep(0.05)
    ended = time.time()
    job.kill()
    said = run.with_suffix(".log").read_text()
    began = run.with_suffix(".counts") / pretended_job.OUT_OF_MEMORY
    assert began.exists(), said
    seconds = ended - began.stat().st_mtime
    print(f"{seconds:.1f} s from the failure to the end of both ranks")
    assert seconds < 30
    # torchrun's report has each rank that failed with its status.
    assert re.findall(r"exitcode  : (-?\d+)", said) == ["2", "2"], said
    (message,) = re.findall(r"error: out of memory in the (.*(?:\n.*){3})", said)
    print(message)
    assert message.startswith(f"{phase}, on rank "), said
    assert "CUDA out of memory. Tried to allocate" in message
    assert re.search(r"estimate is [\d.]+ [MG]iB, the peak so far [\d.]+ MiB of 522 MiB", message), said
    assert f"Change one of these: {remedy}" in message
    assert "Traceback" not in said.split("torch/distributed/elastic")[0], "torchrun's own comes after"
    assert status_file.read_text().startswith(f"2\nerror: out of memory in the {phase}")
