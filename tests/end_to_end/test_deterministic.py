"""train.deterministic on the CPU: what it sets, and that it trains, to the same bits as without it; TF32."""

import subprocess
import sys
from pathlib import Path

import job
import pytest
import torch
import worlds
from places import REPOSITORY
from safetensors.torch import load_file

from prefopt_dist.distributed.numerics import DETERMINISTIC_ENVIRONMENT

SETTINGS = """
import os
import torch
import deepspeed

def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        [os.environ.get(n) for n in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_NVLS_ENABLE")],
    )

def init(**_):
    print(*settings(), sep="|")

deepspeed.init_distributed = init
from prefopt_dist.distributed import job_end, ranks
job_end.watch = lambda: None  # it needs the process group
ranks.start(deterministic=DETERMINISTIC)
"""
TF32 = """
import torch
from prefopt_dist.distributed import numerics
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
numerics.use_full_float32()
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision != "tf32",
      torch.backends.cudnn.rnn.fp32_precision != "tf32")
"""


def python(*arguments: str, **variables: str) -> str:
    known = {k: v for k, v in job.ENVIRONMENT.items() if k not in DETERMINISTIC_ENVIRONMENT}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=known | variables, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("override", "before"), [("1", "high True"), ("0", "highest False")])
def test_tf32_is_off_whatever_the_container_says(override: str, before: str) -> None:
    """Without a warning, and with the old and the new names of torch's settings in agreement."""
    said = python("-W", "error", "-c", TF32, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=override).splitlines()
    assert said == [before, "highest False False", "ieee True True"]


def test_a_start_has_tf32_off_and_nothing_deterministic() -> None:
    script = SETTINGS.replace("DETERMINISTIC", "False") + "print(torch.get_float32_matmul_precision())"
    said = python("-c", script, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1").splitlines()
    assert said[-2:] == ["False|True|[None, None, None]", "highest"]


def test_deterministic_settings_stand_before_the_first_collective() -> None:
    said = python("-c", SETTINGS.replace("DETERMINISTIC", "True"), NCCL_ALGO="ring").splitlines()
    assert said[-1] == "True|False|[':4096:8', 'Ring', '0']"


@pytest.mark.slow
def test_the_same_bits_as_without_it(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 24)
    weights = []
    for setting in ("false", "true"):
        run = tmp_path / f"{setting}.yaml"
        worlds.write_run(
            run,
            tmp_path / "model",
            tmp_path / "pairs.jsonl",
            tmp_path / setting,
            run={"dir": str(tmp_path / setting), "cache": str(tmp_path / "cache")},
        )
        python("-m", "prefopt_dist", "train", str(run), f"train.deterministic={setting}", "train.max_steps=2")
        weights.append(load_file(tmp_path / setting / "final" / "model.safetensors"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    one, other = weights
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], before[name]) for name in one)
