"""Denormals are 0 wherever a run computes on the CPU: in the forward pass, in the backward pass, and in torch's pool.

A processor may take eight times as long for products of denormals, which the gradients of saturated pairs are.
`python -m benchmarks.saturated` measures the time; this test is about its cause.
"""

import json
import subprocess
import sys
from pathlib import Path

import job
import torch
import worlds
from places import REPOSITORY

SCRIPT = """
import json
import sys

import torch

from prefopt_dist.cli import main
from prefopt_dist.distributed import ranks
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.rollouts.transformers_engine import TransformersEngine
from prefopt_dist.training import step, validation

LARGE = 1 << 20  # elements of which each thread of the pool takes a part
found, where = {}, ["first pass"]


def look(place):
    one = (torch.full((1,), 1e-30) * 1e-10).item()
    many = int((torch.full((LARGE,), 1e-30) * 1e-10).count_nonzero())
    found[place] = [one == 0 and many == 0, *found.get(place, [])]


def within(module, name, place):
    called = getattr(module, name)

    def inside(*given, **named):
        before, where[0] = where[0], place
        try:
            return called(*given, **named)
        finally:
            where[0] = before

    setattr(module, name, inside)


forward, states = Scorer.forward, Scorer._states


def looking_forward(self, batch, *given, **named):
    look(where[0])
    return forward(self, batch, *given, **named)


def looking_states(self, batch):
    hidden = states(self, batch)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: look("backward"))
    return hidden


next_logits = TransformersEngine._forward


def looking_answer(self, *given, **named):
    look("answers")
    return next_logits(self, *given, **named)


TransformersEngine._forward = looking_answer
Scorer.forward, Scorer._states = looking_forward, looking_states
within(step, "forward_backward", "training")
within(validation, "evaluate", "evaluation")
assert torch.get_num_threads() == 2
status = main(sys.argv[1:])
print(json.dumps({place: [all(results), len(results)] for place, results in found.items()}))
ranks.exit_now(status)
"""


def test_denormals_are_0_in_each_thread_that_computes(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 12)
    worlds.write_pairs(tmp_path / "eval.jsonl", 4, seed=1)
    run = tmp_path / "run.yaml"
    worlds.write_run(
        run,
        tmp_path / "model",
        tmp_path / "pairs.jsonl",
        tmp_path / "run",
        data={"eval": str(tmp_path / "eval.jsonl")},
        answers={"number": 2},
        train={"max_steps": 2},
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "train", str(run)],
        env=job.ENVIRONMENT | {"OMP_NUM_THREADS": "2"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    places = {"first pass", "training", "backward", "evaluation", "answers"}
    assert {place for place, (zero, times) in found.items() if zero and times} == places, found


def test_a_process_alone_computes_with_denormals() -> None:
    """So that the test above would fail without the setting."""
    assert (torch.full((1,), 1e-30) * 1e-10).item() > 0
