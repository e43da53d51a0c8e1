"""Memory that runs out on one of two ranks: both end at once with status 2, by one message, and lose nothing."""

from __future__ import annotations

import json
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import campaign
import patience
import pytest
from campaign import World
from points import Fault
from ports import free_port

P = "prefopt_dist."
STEP = Fault("training step", "memory", at=1, target=P + "training.step:forward_backward", call=5)
OTHERS = (
    Fault("first pass", "memory", at=1, target=P + "reference.first_pass:_sums", call=2),
    Fault("evaluation", "memory", at=1, target=P + "training.evaluation:with_reference_point", call=1),
    Fault("sampling", "memory", at=1, target=P + "rollouts.transformers_engine:TransformersEngine.sample", call=1),
    Fault("checkpoint", "memory", at=1, target=P + "checkpoint.save:save", call=2),
    Fault("loading of the policy", "memory", at=1, target=P + "distributed.zero3:policy_engine", call=1),
)
REMEDIES = {
    "training step": "train.micro_batch_tokens=256 (the longest row must fit); model.checkpointing=all (now auto); "
    "offload_optimizer (device cpu) in deepspeed_configs/policy_zero3.json; more ranks.",
    "first pass": "reference.micro_batch_tokens=256 (the longest row must fit); reference.offload=cpu; more ranks.",
    "evaluation": "reference.micro_batch_tokens=256 (the longest row must fit); offload_optimizer (device cpu)",
    "sampling": "answers.max_new_tokens=64; answers.number=0 (no answers and no verdict); GPUs with more memory.",
    "checkpoint": "offload_optimizer (device cpu)",
    "loading of the policy": "offload_optimizer (device cpu)",
}


class Answering(World):
    """The campaign's world, whose runs also answer prompts."""

    def run(self, name: str) -> Path:
        file = super().run(name)
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"answers": {"number": 16}}))
        return file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = Answering(tmp_path_factory.mktemp("world"))
    world.write_data()
    return world


@pytest.mark.slow
@pytest.mark.parametrize("fault", [STEP, *OTHERS], ids=lambda fault: fault.stage)
def test_both_ranks_end_at_once_with_one_message(world: World, fault: Fault, request: pytest.FixtureRequest) -> None:
    name = fault.stage.replace(" ", "-")
    start = campaign.Start(world, name, [fault])
    request.addfinalizer(start.end)  # a job that hangs would go on
    status = start.wait()
    ended = time.time()
    said = start.log.read_text()
    assert start.struck() is not None, said
    seconds = ended - start.notes.stat().st_mtime
    print(f"{fault.stage}: {seconds:.1f} s from the fault to the end of launch/run.sh")
    assert status == 2, said
    assert seconds < 30
    assert start.orphans() == []
    # torchrun's report has each rank that failed with its status.
    assert re.findall(r"exitcode  : (-?\d+)", said) == ["2", "2"], said
    assert said.count("error: out of memory") == 2, "once, and once more below torchrun's block"
    assert said.count(f"error: out of memory in the {fault.stage}, on rank 1 of host ") == 2, said
    assert "Traceback" not in said.split("torch/distributed/elastic")[0], "torchrun's own comes after"
    last = said[said.rindex("error: out of memory") :]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB. (planted)" in last
    assert f"Change one of these: {REMEDIES[fault.stage]}" in last, last
    assert "Committed checkpoints and stored scores are safe: start again" in last
    known = fault.stage in ("training step", "first pass", "evaluation", "sampling")
    assert re.search(r"The plan's estimate is [\d.]+ [MG]iB, the peak so far [\d.]+ [MG]iB \(res", last) or not known, (
        last
    )
    kept = [p.name for p in sorted((world.folder / name / "run" / "checkpoints").glob("step-*"))]
    assert kept == (["step-00000003"] if fault.stage in ("training step", "checkpoint") else [])


@pytest.mark.slow
def test_both_machines_end_at_once(world: World, request: pytest.FixtureRequest) -> None:
    """Two launchers with a rank each: the one whose rank lives on ends with 2 and the same message."""
    name, port = "machines", free_port()
    (world.folder / name).mkdir()
    environment = campaign.environment(world.folder / name, [STEP])
    jobs, logs = [], [world.folder / name / f"{node}.log" for node in (0, 1)]
    for node, log in enumerate(logs):
        more = {"PREFOPT_NODES": "2", "PREFOPT_NODE": str(node), "PREFOPT_HEAD": f"127.0.0.1:{port}"}
        with log.open("w") as file:
            command = ["launch/run.sh", "-n", "1", "train", str(world.run(name))]
            jobs.append(
                subprocess.Popen(
                    command, env=environment | more, cwd=campaign.REPOSITORY, stdout=file, stderr=subprocess.STDOUT
                )
            )
        request.addfinalizer(partial(patience.kill_tree, jobs[-1]))
    statuses = [patience.wait_for_end(job, world.folder / name) for job in jobs]
    seconds = time.time() - (world.folder / name / "notes.jsonl").stat().st_mtime
    said = [log.read_text() for log in logs]
    print(f"two machines: {seconds:.1f} s from the fault to the end of both")
    assert statuses == [2, 2], said
    assert seconds < 30
    assert all("error: out of memory in the training step, on rank 1 of host" in text.splitlines()[-4] for text in said)
