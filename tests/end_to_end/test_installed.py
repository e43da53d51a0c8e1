"""The package as pip installs it, away from the repository: its command, and the demo's training with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PREFOPT_")} | {"DS_ACCELERATOR": "cpu"}
BUILT_FROM = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("prefopt_dist", "launch", "slurm", "deepspeed_configs"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the repository and install it alone into a folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in BUILT_FROM:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", source / "wheel", source], check=True)
    (wheel,) = (source / "wheel").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def prefopt(installed: Path, here: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder that has nothing of the repository."""
    command = [installed / "bin" / "prefopt", *map(str, arguments)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)


def make_world(installed: Path, here: Path) -> str:
    """Write the demo's world by the installed package; return where that lies."""
    code = "from pathlib import Path; from prefopt_dist.demo import parts; "
    code += "parts.make_world(Path('demo'), 0); print(parts.__file__)"
    environment = ENVIRONMENT | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_command_trains_the_demo(installed: Path, tmp_path: Path) -> None:
    shipped = installed / "prefopt_dist" / "shipped_files"
    assert os.access(shipped / "launch" / "node.sh", os.X_OK)
    assert make_world(installed, tmp_path).startswith(str(installed))
    overrides = ["run.dir=demo/sft", "model.name_or_path=demo/world/model", "data.train=demo/world/sft.jsonl"]
    overrides += ["train.max_steps=2", "answers.number=0", "checkpoint.every_steps=null", "data.eval=null"]
    overrides += ["tracking.wandb.mode=disabled"]
    recipe = shipped / "launch" / "recipes" / "demo_sft.yaml"
    done = prefopt(installed, tmp_path, "launch", "-n", "2", "train", recipe, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo" / "sft" / "final" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (tmp_path / "demo" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] == 2


def test_the_command_lists_its_stages(installed: Path, tmp_path: Path) -> None:
    done = prefopt(installed, tmp_path, "--help")
    assert done.returncode == 0
    for name in ("inspect", "train", "launch", "submit"):
        assert f"  {name} " in done.stdout
    assert prefopt(installed, tmp_path, "submit", "--help").stdout.startswith("usage: slurm/submit")


def test_submit_carries_the_package(installed: Path, tmp_path: Path) -> None:
    """The jobs of a submission use a copy of scripts and package: it must have both where they are installed apart."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (fake / "sbatch").chmod(0o755)
    assert make_world(installed, tmp_path).startswith(str(installed))
    (tmp_path / "run.yaml").write_text(
        "run: {dir: runs/one}\nmodel: {name_or_path: demo/world/model, dtype: float32}\n"
        "data: {train: demo/world/sft.jsonl, max_length: 256, max_prompt_length: 128}\nloss: {name: sft}\n"
        "train: {global_batch_pairs: 8}\ntracking: {wandb: {mode: disabled}}\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(installed), "PATH": f"{fake}:{os.environ['PATH']}"}
    command = [installed / "bin" / "prefopt", "submit", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    code = tmp_path / "runs" / "one.submit" / "1" / "code"
    for name in ("launch/node.sh", "slurm/job.sh", "prefopt_dist/cli.py", "deepspeed_configs/policy_zero3.json"):
        assert (code / name).is_file()
    assert not (code / "prefopt_dist" / "shipped_files").exists()
