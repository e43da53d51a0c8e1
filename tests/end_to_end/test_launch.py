"""launch/run.sh with a fake Python that imitates the stages: exit statuses, signals, environment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import REPOSITORY

from prefopt_dist.config import load_config

RUN_SH = REPOSITORY / "launch" / "run.sh"

# Its first line of work is to note its arguments. The job script stands for torchrun and its ranks.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/calls"
echo "$OMP_NUM_THREADS ${DS_ACCELERATOR:-none} $TOKENIZERS_PARALLELISM ${PREFOPT_WANT_GPUS:-no}" >"$FAKE/environment"
if [[ ${*: -1} == --check ]]; then
    eval "$FAKE_CHECK"
    echo "a line of some library"
    echo "$FAKE/run"
    exit 0
fi
if [[ $* == *preflight.rendezvous* ]]; then
    echo 10.0.0.9
    exit "${FAKE_ADDRESS:-0}"
fi
eval "$FAKE_JOB"
"""


class Launcher:
    """Starts run.sh in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, job: str = "exit 0", check: str = "", **more: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(self.folder),
            "PREFOPT_PYTHON": str(self.python),
            "CUDA_VISIBLE_DEVICES": "",
            "FAKE": str(self.folder),
            "FAKE_JOB": job,
            "FAKE_CHECK": check,
            **more,
        }
        process = subprocess.Popen(
            [str(RUN_SH), *arguments],
            env=environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a process group of its own, which a test may signal
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, job: str = "exit 0", check: str = "", **more: str) -> tuple[int, str]:
        """Exit status and stderr."""
        process = self.start(*arguments, job=job, check=check, **more)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    for process in launcher.started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "STAGE and RUN.yaml are missing"),
        (["train"], "STAGE and RUN.yaml are missing"),
        (["-n"], "-n"),
        (["-n", "0", "train", "r.yaml"], "'0'"),
        (["-n", "two", "train", "r.yaml"], "'two'"),
        (["-x", "train", "r.yaml"], "unknown option '-x'"),
        (["train", "r.yaml", "-n", "2"], "options stand before STAGE"),
        (["train", "r.yaml", "--print-config"], "options stand before STAGE"),
    ],
)
def test_bad_usage(launcher: Launcher, arguments: list[str], word: str) -> None:
    status, errors = launcher.run(*arguments)
    assert status == 2
    assert word in errors
    assert "usage:" in errors
    assert launcher.calls() == []


def test_more_ranks_than_gpus_and_no_python(launcher: Launcher) -> None:
    status, errors = launcher.run("-n", "3", "train", "r.yaml", CUDA_VISIBLE_DEVICES="0,1")
    assert status == 2
    assert "2 GPUs" in errors
    status, errors = launcher.run("train", "r.yaml", PREFOPT_PYTHON="/nowhere/python")
    assert status == 2
    assert "/nowhere/python" in errors


@pytest.mark.parametrize(("check", "status"), [("echo bad key >&2; exit 2", 2), ("exit 3", 1), ("exit 1", 1)])
def test_a_failing_check_starts_no_ranks(launcher: Launcher, check: str, status: int) -> None:
    found, errors = launcher.run("train", "r.yaml", check=check)
    assert found == status
    assert len(launcher.calls()) == 1
    assert ("bad key" in errors) == (status == 2)


@pytest.mark.parametrize(
    ("stage", "job", "status"),
    [
        ("train", "exit 0", 0),
        ("train", 'touch "$FAKE/run/STOPPED"', 75),
        ("reference", 'touch "$FAKE/run/STOPPED"', 75),
        ("evaluate", 'touch "$FAKE/run/STOPPED"', 0),
        ("train", "exit 1", 1),
        ("train", "kill -KILL $$", 1),
        ("train", 'touch "$FAKE/run/STOPPED"; exit 1', 1),
        ("train", 'echo 2 >"$PREFOPT_STATUS_FILE"; exit 1', 2),
        ("train", 'printf 2 >"$PREFOPT_STATUS_FILE"; exit 1', 2),
        ("train", 'echo 1 >"$PREFOPT_STATUS_FILE"; exit 1', 1),
        ("train", 'echo 2 >"$PREFOPT_STATUS_FILE"; exit 0', 0),
    ],
)
def test_exit_status(launcher: Launcher, stage: str, job: str, status: int) -> None:
    assert launcher.run(stage, "r.yaml", job=job)[0] == status
    assert list(launcher.folder.glob("tmp.*")) == []  # the status file is gone


def test_what_is_started_and_with_which_environment(launcher: Launcher) -> None:
    assert launcher.run("-n", "3", "train", "r.yaml", "a.b=c d", OMP_NUM_THREADS="5")[0] == 0
    assert launcher.calls() == [
        "-m prefopt_dist train r.yaml a.b=c d --check",
        "-m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 3"
        " -m prefopt_dist train r.yaml a.b=c d",
    ]
    assert (launcher.folder / "environment").read_text().split() == ["5", "cpu", "false", "no"]
    more = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "TOKENIZERS_PARALLELISM": "true"}
    assert launcher.run("train", "r.yaml", **more)[0] == 0
    assert "--nproc-per-node 4 " in launcher.calls()[-1]
    threads, accelerator, parallelism, wants_gpus = (launcher.folder / "environment").read_text().split()
    assert int(threads) >= 1
    assert (accelerator, parallelism, wants_gpus) == ("none", "true", "1")
    launcher.run("train", "r.yaml")
    assert "--nproc-per-node 2 " in launcher.calls()[-1]


@pytest.mark.parametrize(("job", "status"), [("exit 0", 0), ("exit 2", 2), ("exit 1", 1), ("exit 9", 1)])
@pytest.mark.parametrize("stage", ["inspect", "plan", "report", "export"])
def test_stages_of_one_process(launcher: Launcher, stage: str, job: str, status: int) -> None:
    assert launcher.run("-n", "4", stage, "r.yaml", job=job)[0] == status
    assert launcher.calls() == [f"-m prefopt_dist {stage} r.yaml"]


# Waits for STOP, then works on for a while, as a checkpoint does; a signal that reached it would kill it.
OBEDIENT = """
touch "$FAKE/started"
until [[ -e $FAKE/run/STOP ]]; do sleep 0.05; done
rm "$FAKE/run/STOP"
sleep 0.8
touch "$FAKE/run/STOPPED"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_a_stop_and_waits(launcher: Launcher, number: signal.Signals) -> None:
    process = launcher.start("train", "r.yaml", job=OBEDIENT)
    launcher.wait_for(launcher.folder / "started")
    os.killpg(process.pid, number)  # the whole group, as a scheduler or a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "asked for a stop" in errors
    assert (launcher.run_dir / "STOPPED").exists()
    assert not (launcher.run_dir / "STOP").exists()


def test_a_stop_asked_for_while_the_ranks_start_is_not_lost(launcher: Launcher) -> None:
    job = 'touch "$FAKE/started"; sleep 1.2; rm -f "$FAKE/run/STOP"' + OBEDIENT
    process = launcher.start("train", "r.yaml", job=job)
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_signal_during_the_check_starts_nothing(launcher: Launcher) -> None:
    process = launcher.start("train", "r.yaml", check='touch "$FAKE/started"; sleep 0.5')
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(launcher.calls()) == 1
    assert not (launcher.run_dir / "STOP").exists()


def test_stages_without_stop_end_at_once(launcher: Launcher) -> None:
    process = launcher.start("evaluate", "r.yaml", job='touch "$FAKE/started"; exec sleep 30')
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 1
    assert not (launcher.run_dir / "STOP").exists()


def test_a_second_interrupt_ends_the_ranks(launcher: Launcher) -> None:
    process = launcher.start("train", "r.yaml", job='touch "$FAKE/started"; exec sleep 30')
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGINT)
    launcher.wait_for(launcher.run_dir / "STOP")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 1
    assert not (launcher.run_dir / "STOP").exists()


RECIPES = sorted((RUN_SH.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    config = load_config(recipe)
    header = recipe.read_text().partition("\nrun:")[0].partition("\nbase:")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    command = header[0][2:].split("   ")[0].split(" ")
    assert command[0] in ("launch/run.sh", "slurm/submit")
    assert f"launch/recipes/{recipe.name}" in command
    assert any(said in recipe.read_text() for said in ("# Tried on ", "# Not run", "# Planned, not run"))
    assert config.run.dir.startswith("runs/")


def test_recipes_have_run_folders_of_their_own() -> None:
    folders = [load_config(recipe).run.dir for recipe in RECIPES]
    assert len(set(folders)) == len(folders) > 4


MACHINES = {"PREFOPT_NODES": "2", "PREFOPT_NODE": "1", "PREFOPT_HEAD": "h:1"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"PREFOPT_NODES": "two"}, "PREFOPT_NODES: got 'two'"),
        ({"PREFOPT_NODE": "2"}, "PREFOPT_NODE: got '2', must be this machine's number, 0 to 1"),
        ({"PREFOPT_NODE": ""}, "PREFOPT_NODE: got ''"),
        ({"PREFOPT_HEAD": "h"}, "PREFOPT_HEAD: got 'h'"),
    ],
)
def test_bad_machines(launcher: Launcher, more: dict[str, str], words: str) -> None:
    process = launcher.start("train", "r.yaml", **{**MACHINES, **more})
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, words in errors) == (2, True), errors
    assert not (launcher.folder / "calls").exists()


def test_one_process_is_of_one_machine(launcher: Launcher) -> None:
    process = launcher.start("export", "r.yaml", **MACHINES)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, "unset PREFOPT_NODES" in errors) == (2, True)


@pytest.mark.parametrize(("node", "is_host"), [("0", 1), ("1", 0)])
def test_a_machine_of_several(launcher: Launcher, node: str, is_host: int) -> None:
    process = launcher.start("-n", "3", "train", "r.yaml", **MACHINES | {"PREFOPT_NODE": node})
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    check, address, job = (launcher.folder / "calls").read_text().splitlines()
    assert check == "-m prefopt_dist train r.yaml --check"
    assert address == f"-m prefopt_dist.preflight.rendezvous h:1 {node}"
    assert job.startswith("-m torch.distributed.run --nnodes 2 --nproc-per-node 3 ")
    assert "--rdzv-endpoint h:1 " in job
    assert f"is_host={is_host}," in job
    assert "--local-addr 10.0.0.9 " in job
    assert job.endswith("-m prefopt_dist train r.yaml")


def test_a_head_that_cannot_be_found(launcher: Launcher) -> None:
    status, _ = launcher.run("train", "r.yaml", FAKE_ADDRESS="2", **MACHINES)
    assert status == 2
    assert len(launcher.calls()) == 2  # no torchrun


def test_a_signal_on_one_machine_of_several_stops_all(launcher: Launcher) -> None:
    work = 'touch "$FAKE/started"; until [[ -e $FAKE/run/STOP ]]; do sleep 0.1; done; touch "$FAKE/run/STOPPED"'
    process = launcher.start("train", "r.yaml", job=work, **MACHINES)
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75


# A program, as torchrun is, that hears INT though its shell had it ignored.
INTERRUPTED = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
pathlib.Path(os.environ["FAKE"], "started").touch()
time.sleep(30)
"""


def test_a_stage_without_stop_ends_at_once_on_several_machines(launcher: Launcher) -> None:
    # torchrun's part there is to end at INT, as launch/node.sh ignores TERM.
    process = launcher.start("evaluate", "r.yaml", job=f"exec python3 -c '{INTERRUPTED}'", **MACHINES)
    launcher.wait_for(launcher.folder / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 1


def script(name: str, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", REPOSITORY / name, *arguments], env={"PATH": path}, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("tests/slurm/run.sh", ["thorough"], "unknown case 'thorough'"),
        ("tests/docker/run.sh", ["--keep"], "unknown argument '--keep'"),
        ("tests/docker/run.sh", ["--home"], "--home needs a folder"),
    ],
)
def test_tests_of_the_system_refuse_what_they_do_not_know(name: str, arguments: list[str], words: str) -> None:
    done = script(name, *arguments, path=os.environ["PATH"])
    assert done.returncode in (1, 2)
    assert words in done.stderr


@pytest.mark.parametrize(("make", "status"), [("exit 0", 0), ("exit 2", 2)])
def test_continuous_integration_says_what_it_leaves_out(tmp_path: Path, make: str, status: int) -> None:
    (tmp_path / "make").write_text(f"#!/bin/bash\n{make}\n")
    (tmp_path / "make").chmod(0o755)
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = script(".ci/run", path=str(tmp_path))  # there is no apt-get
    assert done.returncode == status
    assert ("NOT RUN: tests/slurm/run.sh --short" in done.stderr) == (status == 0)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": ""}, ["", None]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ["max_split_size_mb:64", None]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, [None, "backend:native"]),
    ],
)
def test_the_allocator_is_configured_unless_the_user_did(given: dict[str, str], found: list[str | None]) -> None:
    names = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    command = ["bash", "-euo", "pipefail", "-c", "source launch/env.sh; env -0"]
    printed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    after = dict(line.split("=", 1) for line in printed.stdout.split("\0") if line)
    assert [after.get(name) for name in names] == found
