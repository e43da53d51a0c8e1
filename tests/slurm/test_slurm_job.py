"""slurm/job.sh without Slurm, and launch/node.sh: how a job starts, checks its nodes, and fails to start."""

from __future__ import annotations

import pytest
from places import REPOSITORY
from slurm_site import Site


def test_the_check_of_the_nodes_gets_the_plan(site: Site) -> None:
    plan = "[[ $* =~ plan.file=([^ ]*) ]] && echo '{}' >${BASH_REMATCH[1]}"
    assert site.submit("r.yaml", FAKE_GPU="h200", FAKE_PLAN=plan).returncode == 0
    submission = site.base.with_name("mine.submit") / "1"
    assert (submission / "plan.json").read_text() == "{}\n"
    site.job("train", FAKE_JOB="echo 0 >$PREFOPT_STATUS_FILE")
    [checked] = site.lines("checked")
    assert checked.endswith(f" --folder {site.base} --plan {submission}/plan.json")
    (submission / "plan.json").unlink()
    site.job("train", FAKE_JOB="echo 0 >$PREFOPT_STATUS_FILE")
    [checked] = site.lines("checked")
    assert checked.endswith(f" --folder {site.base}")


def test_a_job_starts_one_task_a_node(site: Site) -> None:
    done = site.job()
    assert done.returncode == 0, done.stderr
    [started] = site.lines("srun")
    assert "--nodes=2|--ntasks=2|--ntasks-per-node=1|" in started
    assert "|--head|10.0.0.7:20007|--job|prefopt-7.0|train|" in started
    assert site.lines("scontrol") == ["show hostnames n[1-2]", "show node n1"]


def test_the_nodes_are_checked_before_a_job(site: Site) -> None:
    done = site.job(FAKE_NODES="echo nodes: n2: why; exit 1")
    assert (done.returncode, "nodes: n2: why" in done.stdout) == (1, True)
    assert "exclude the nodes that are named" in done.stderr
    [checked] = site.lines("checked")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 " in checked
    assert f"--hosts n1,n2 --ranks 1 --head 10.0.0.7:20014 --folder {site.base}" in checked
    assert site.lines("srun") == []
    (site.folder / "checked").unlink()
    assert site.job(PREFOPT_CHECK_NODES="no").returncode == 0
    assert site.job("export").returncode == 0
    assert site.lines("checked") == []
    # A job that wants GPUs says so to the check, or a node without a driver would compute on its CPU.
    assert site.submit("r.yaml", "--gpus-per-node", "8").returncode == 0
    assert "GPUS=8" in (site.base.with_name("mine.submit") / "2" / "job.env").read_text().split()


def test_a_check_that_cannot_be_made_is_a_mistake(site: Site) -> None:
    done = site.job(FAKE_NODES="echo PREFOPT_MIN_DISK_GIB: is not a number >&2; exit 2")
    assert (done.returncode, "correct site.env" in done.stderr, site.lines("srun")) == (2, True, [])


def test_the_site_s_own_setup_may_read_what_is_not_set(site: Site) -> None:
    (site.folder / "site.env").write_text("site_setup() { export LOADED=yes$NOBODY_HAS_SET_THIS; }\n")
    done = site.job(FAKE_JOB='echo "$LOADED" >"$FAKE/loaded"')
    assert done.returncode == 0, done.stderr
    assert site.lines("loaded") == ["yes"]
    kept = site.base.with_name("mine.submit") / "1" / "site.env"
    kept.write_text("site_setup() { false; echo not here; }\n")
    assert site.job().returncode != 0


@pytest.mark.parametrize(("stage", "wants"), [("train", "1"), ("export", "no")])
def test_the_ranks_know_that_they_are_for_gpus(site: Site, stage: str, wants: str) -> None:
    assert site.submit("r.yaml", "--gpus-per-node", "8").returncode == 0
    done = site.job(stage, FAKE_JOB='echo "${PREFOPT_WANT_GPUS:-no}" >"$FAKE/wants"', PREFOPT_CHECK_NODES="no")
    assert (done.returncode, site.lines("wants")) == (0, [wants])


def test_a_job_that_is_cancelled_in_the_check_has_stopped(site: Site) -> None:
    done = site.job(FAKE_NODES="kill -TERM $PPID; sleep 0.1; exit 143")
    assert (done.returncode, site.lines("srun")) == (75, [])


@pytest.mark.parametrize(("work", "status"), [("", 0), ("exit 2", 2), ("exit 9", 1)])
def test_the_export_is_one_process(site: Site, work: str, status: int) -> None:
    assert site.job("export", FAKE_JOB=work).returncode == status
    [started] = site.lines("srun")
    assert "--nodes=1|--ntasks=1|" in started
    assert "/launch/run.sh|export|" in started


def test_a_job_that_cannot_start(site: Site) -> None:
    done = site.job(SLURM_NNODES="")
    assert (done.returncode, "SLURM_NNODES is not set" in done.stderr) == (2, True)
    done = site.run("bash", str(REPOSITORY / "slurm" / "train.sbatch"))
    assert done.returncode != 0
    assert "the folder that slurm/submit wrote" in done.stderr
    kept = site.base.with_name("mine.submit") / "1"
    job_env = kept / "job.env"
    whole = job_env.read_text()
    job_env.write_text(whole + "WORK_DIR=/nowhere/at/all\n")
    done = site.job()
    assert (done.returncode, "/nowhere/at/all" in done.stderr) == (2, True)
    job_env.write_text(whole + "port_is_free() { return 1; }\n")
    done = site.job()
    assert (done.returncode, "no free port" in done.stderr) == (1, True)
    assert site.lines("srun") == []


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("pyxis", ["--container-image=/my image", "--container-workdir={work}"]),
        ("apptainer", ["apptainer|exec|--nv|--bind|", "|--pwd|{work}|/my image|"]),
    ],
)
def test_containers(site: Site, runtime: str, words: list[str]) -> None:
    (site.folder / "site.env").write_text(
        f"PREFOPT_RUNTIME={runtime}\nPREFOPT_IMAGE='/my image'\nPREFOPT_PYTHON=/image/python\n"
        "PREFOPT_MOUNTS=(/data:/data)\nPREFOPT_APPTAINER=(--nv)\n"
    )
    assert site.job().returncode == 0
    [started] = site.lines("srun")
    assert "JOB_PYTHON=/image/python\n" in (site.base.with_name("mine.submit") / "1" / "job.env").read_text()
    for word in [*words, f"{site.folder}/runs:{site.folder}/runs", ",/data:/data"]:
        assert word.format(work=site.folder) in started


TWO_NODES = ["--nodes", "2", "--ranks"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--nodes", "2"], "--ranks"),
        (["--nodes", "x", "--ranks", "1"], "--nodes: got 'x'"),
        (["--nodes", "2", "--ranks", "1", "--head", "h"], "HOST:PORT"),
        ([*TWO_NODES, "1", "--head", "h:1"], "--node (or SLURM_NODEID): got ''"),
        ([*TWO_NODES, "1", "--head", "h:1", "--node", "2"], "got '2', must be this node's number, 0 to 1"),
        ([*TWO_NODES, "1", "--head", "h:1", "--node", "1"], "--job"),
        ([*TWO_NODES, "1", "--head", "h:1", "--node", "1", "--job", "j", "train"], "RUN.yaml"),
        (
            [*TWO_NODES, "9", "--head", "h:1", "--node", "1", "--job", "j", "train", "r.yaml"],
            "9 ranks per node, but this node has 2",
        ),
    ],
)
def test_bad_usage_of_a_node(site: Site, arguments: list[str], word: str) -> None:
    done = site.run(str(REPOSITORY / "launch" / "node.sh"), *arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.parametrize(("node", "is_host"), [("0", "1"), ("1", "0")])
def test_a_node(site: Site, node: str, is_host: str) -> None:
    arguments = ["--nodes", "2", "--ranks", "3", "--head", "h:1", "--job", "j", "train", "r.yaml", "a.b=c d"]
    done = site.run(str(REPOSITORY / "launch" / "node.sh"), *arguments, SLURM_NODEID=node, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    address, call = site.lines("calls")
    assert address == f"-m prefopt_dist.preflight.rendezvous h:1 {node}"
    assert call.startswith("-m torch.distributed.run --nnodes 2 --nproc-per-node 3 --max-restarts 0 ")
    assert f"is_host={is_host}," in call
    assert "--local-addr 10.0.0.9 " in call
    assert call.endswith("-m prefopt_dist train r.yaml a.b=c d")
    more = {"SLURM_NODEID": node, "CUDA_VISIBLE_DEVICES": "", "PREFOPT_WANT_GPUS": "1"}
    done = site.run(str(REPOSITORY / "launch" / "node.sh"), *arguments, **more)
    assert (done.returncode, "no GPU here" in done.stderr) == (2, True)
