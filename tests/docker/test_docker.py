"""docker/ without Docker: what its scripts refuse, and that the image is made of files that exist and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from places import REPOSITORY

DOCKER = REPOSITORY / "docker"


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def fake_python(folder: Path) -> str:
    """Notes how it was called, and ends."""
    file = folder / "python"
    file.write_text('#!/usr/bin/env bash\necho "$PYTHONPATH $*"\nexit 3\n')
    file.chmod(0o755)
    return str(file)


def test_no_arguments_and_no_scratch_folder(tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    done = run(DOCKER / "entrypoint.sh", PREFOPT_PYTHON=python)
    assert (done.returncode, "STAGE and RUN.yaml are missing" in done.stderr) == (2, True)
    done = run(DOCKER / "entrypoint.sh", "train", "r.yaml", PREFOPT_PYTHON=python, TMPDIR=str(tmp_path / "none"))
    assert (done.returncode, f"{tmp_path}/none is not writable" in done.stderr) == (2, True)
    done = run(DOCKER / "entrypoint.sh", "-n", "0", "train", "r.yaml", PREFOPT_PYTHON=python)
    assert (done.returncode, "-n: got '0'" in done.stderr) == (2, True)


def test_what_the_entrypoint_starts(tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    done = run(DOCKER / "entrypoint.sh", "inspect", "r.yaml", "a.b=c d", PREFOPT_PYTHON=python)
    assert (done.returncode, done.stdout) == (1, f"{REPOSITORY} -m prefopt_dist inspect r.yaml a.b=c d\n")
    done = run(DOCKER / "entrypoint.sh", "demo", PREFOPT_PYTHON=python)
    assert (done.returncode, done.stdout) == (3, f"{REPOSITORY} -m prefopt_dist.demo\n")
    done = run(DOCKER / "entrypoint.sh", "demo", "--seed", "1", "--folder", "a b", PREFOPT_PYTHON=python)
    assert (done.returncode, done.stdout) == (3, f"{REPOSITORY} -m prefopt_dist.demo --seed 1 --folder a b\n")
    done = run(DOCKER / "entrypoint.sh", "bash", "-c", "echo $PYTHONPATH; exit 7")
    assert (done.returncode, done.stdout) == (7, f"{REPOSITORY}\n")
    assert run(DOCKER / "entrypoint.sh", "no-such-command").returncode == 127


def test_every_stage_has_its_word_in_the_entrypoint() -> None:
    from prefopt_dist.cli import STAGES

    words = re.search(r'"" \| -\* \| (.*)\)\n *exec', (DOCKER / "entrypoint.sh").read_text())
    assert words is not None
    assert set(words[1].split(" | ")) == set(STAGES)


@pytest.mark.parametrize("name", ["cpu_adam", "CPU_ADAM=1", "A;id"])
def test_an_operator_of_no_such_name(tmp_path: Path, name: str) -> None:
    done = run("bash", DOCKER / "install_packages.sh", tmp_path / "venv", name)
    assert (done.returncode, f"'{name}'" in done.stderr) == (2, True)
    assert not (tmp_path / "venv").exists()


def test_no_folder_to_install_into() -> None:
    assert "the folder of the environment is missing" in run("bash", DOCKER / "install_packages.sh").stderr


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    """An image that has none of 3.11 or 3.12, and whose distribution has none either."""
    for name, text in {"python3": 'echo "Python 3.9"; exit 1', "apt-get": "", "rm": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = run("/bin/bash", DOCKER / "install_python.sh", PATH=str(tmp_path))
    assert (done.returncode, "Python 3.9; take one with 3.11 or 3.12" in done.stderr) == (1, True)


def test_only_what_the_image_lacks_is_installed(tmp_path: Path) -> None:
    """A Python of the image's own stays; InfiniBand's libraries, which NCCL loads, are in the final image."""
    for name, text in {
        "python3": "exit $FAKE_PYTHON",
        "dpkg": "[[ $2 == have ]]",
        "apt-get": f'echo "$*" >>"{tmp_path}/calls"; [[ $1 != install ]] || FAKE_PYTHON=0',
        "rm": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def installed(*packages: str, python: str) -> list[str]:
        (tmp_path / "calls").write_text("")
        run("/bin/bash", DOCKER / "install_python.sh", *packages, PATH=str(tmp_path), FAKE_PYTHON=python)
        return [c for line in (tmp_path / "calls").read_text().splitlines() if "install" in line
                for c in line.split("--no-install-recommends ")[1].split()]  # fmt: skip

    assert installed(python="0") == installed("have", python="0") == []
    assert installed("have", "lack", python="0") == ["lack"]
    assert installed("lack", python="1") == ["lack", "python3", "python3-venv", "ca-certificates"]
    final = (DOCKER / "Dockerfile").read_text().split("FROM ${BASE}")[1]
    assert "install_python.sh libibverbs1 ibverbs-providers librdmacm1" in final


def test_the_image_is_made_of_what_the_build_may_see() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    files = [f for line in copied for f in line.split()]
    assert "prefopt_dist" in files
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    seen = {line[1:] for line in ignore if line.startswith("!")}
    assert {f.split("/")[0] for f in files} == seen
    assert all((REPOSITORY / f).exists() for f in files)


def test_no_host_is_named() -> None:
    for file in DOCKER.iterdir():
        assert "http" not in file.read_text(), file
