"""slurm/submit and slurm/job.sh without Slurm: stubs of its commands and of Python note what they are asked."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from places import REPOSITORY

# Stands for the package: the check, --print-config a resolved run, `-` the needs of its loss
# and the run folder.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/calls"
case "$*" in
    *--check) eval "$FAKE_CHECK" ;;
    *--print-config)
        printf 'run:\\n  dir: x\\n  cache: null\\ndeepspeed:\\n'
        printf '  policy: deepspeed_configs/policy_zero3.json\\n  reference: mine.json\\n# %s\\n' "$*"
        printf 'plan:\\n  gpu: %s\\n' "$FAKE_GPU" ;;
    "-m prefopt_dist plan "*) eval "$FAKE_PLAN" ;;
    *preflight.rendezvous*) echo 10.0.0.9 ;;
    -*) cat >/dev/null; echo "$FAKE_REFERENCE"; echo "$FAKE/runs/mine" ;;
esac
"""
SBATCH = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$FAKE/submitted"; echo >>"$FAKE/submitted"
[[ $* != *"$FAKE_REFUSES"* ]] || exit 1
echo $((40 + $(wc -l <"$FAKE/submitted")));
"""


class Site:
    """A folder with stubs on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "runs" / "mine"
        (folder / "bin").mkdir()
        for name, text in {
            "python": PYTHON,
            "sbatch": SBATCH,
            "scancel": '#!/usr/bin/env bash\necho "$*" >>"$FAKE/cancelled"\n',
            "scontrol": '#!/usr/bin/env bash\necho "$*" >>"$FAKE/scontrol"\n'
            "case $2 in hostnames) printf 'n1\\nn2\\n' ;; node) echo '   NodeAddr=10.0.0.7 NodeHostName=n1' ;;\n"
            'job) echo "   StartTime=2026-01-01T10:00:00 $FAKE_PREEMPTED" ;; esac\n',
            "sleep": "#!/usr/bin/env bash\n[[ $1 == 60 ]] || exec /bin/sleep 0.05\n",
            "srun": "#!/usr/bin/env bash\nif [[ $* == *check_node.sh* ]]; then\n"
            'echo "$*" >"$FAKE/checked"; eval "$FAKE_NODES"; exit; fi\n'
            'printf "%s|" "$@" >"$FAKE/srun"\neval "$FAKE_JOB"\n',
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "site.env").write_text("PREFOPT_SBATCH=(--partition=gpu '--comment=two words')\n")

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PREFOPT_PYTHON": str(self.folder / "bin" / "python"),
            "PREFOPT_SITE": str(self.folder / "site.env"),
            "FAKE": str(self.folder),
            "FAKE_CHECK": "",
            "FAKE_REFERENCE": "True",
            "FAKE_REFUSES": "nothing",
            "FAKE_JOB": "",
            "FAKE_NODES": "",
            "FAKE_PREEMPTED": "PreemptTime=None",
            "FAKE_GPU": "null",
            "FAKE_PLAN": "exit 9",
            **more,
        }
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=30)

    def submit(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(REPOSITORY / "slurm" / "submit"), *arguments, **more)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def job(self, stage: str = "train", **more: str) -> subprocess.CompletedProcess[str]:
        """The batch script of a stage after a submission, as Slurm starts it."""
        number = self.base.with_name("mine.submit") / "1"
        if not number.exists():
            assert self.submit("r.yaml", "--nodes", "2").returncode == 0
        self.base.mkdir(exist_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"} | more
        script = number / "code" / "slurm" / f"{stage}.sbatch"
        return self.run("bash", str(script), str(number), **{k: v for k, v in job.items() if v})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "RUN.yaml is missing"),
        (["r.yaml", "--nodes"], "--nodes needs a value"),
        (["r.yaml", "--nodes", "0"], "--nodes: got '0'"),
        (["r.yaml", "--gpus-per-node", "two"], "'two'"),
        (["r.yaml", "--gpus-per-node", "2", "--ranks-per-node", "2"], "one rank per GPU"),
        (["r.yaml", "--grace", "5m"], "'5m'"),
        (["r.yaml", "--time", "5"], "--time: got '5', must be at least a minute longer than --grace (300 s)"),
        (["r.yaml", "--time", "5:59"], "--time: got '5:59'"),
        (["r.yaml", "--time", "0-0:05:09"], "--time: got '0-0:05:09'"),
        (["r.yaml", "--time", "1:00:00", "--grace", "3600"], "--time: got '1:00:00'"),
        (["r.yaml", "--unknown"], "unknown option '--unknown'"),
        (["r.yaml", "--sweep", "beta"], "--sweep: got 'beta'"),
        (["r.yaml", "--sweep", "loss.beta="], "--sweep: got"),
        (["r.yaml", "--sweep", "loss.beta=0.1,,0.2"], "empty value"),
        (["r.yaml", "--sweep", "loss.beta=0.1,0.1"], "0.1 is listed twice"),
        (["r.yaml", "--sweep", "loss.beta=$(id)"], "--sweep: got"),
        (["r.yaml", "--sweep", "run.dir=a,b"], "run.dir cannot be swept"),
    ],
)
def test_bad_usage_asks_nobody(site: Site, arguments: list[str], word: str) -> None:
    done = site.submit(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert site.lines("calls") == site.lines("submitted") == []


@pytest.mark.parametrize("limit", ["6", "6:00", "0:06:00", "0-1", "00-00:06", "UNLIMITED", "0"])
def test_a_time_limit_beyond_the_grace(site: Site, limit: str) -> None:
    done = site.submit("r.yaml", "--dry-run", "--time", limit)
    assert (done.returncode, f"--time={limit} " in done.stdout) == (0, True), done.stderr


def test_bad_sites(site: Site) -> None:
    done = site.submit("r.yaml", PREFOPT_SITE="/nowhere/site.env")
    assert (done.returncode, "/nowhere/site.env" in done.stderr) == (2, True)
    for text, word in (
        ("PREFOPT_RUNTIME=docker", "'docker'"),
        ("PREFOPT_RUNTIME=pyxis", "needs PREFOPT_IMAGE"),
    ):
        (site.folder / "site.env").write_text(text + "\n")
        done = site.submit("r.yaml")
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
    (site.folder / "site.env").write_text("")
    done = site.submit("r.yaml", PREFOPT_PYTHON="/nowhere/python")
    assert (done.returncode, "/nowhere/python" in done.stderr) == (2, True)
    assert site.lines("submitted") == []


@pytest.mark.parametrize(("check", "status"), [("echo bad key >&2; exit 2", 2), ("exit 1", 1)])
def test_a_mistake_in_the_run_submits_nothing(site: Site, check: str, status: int) -> None:
    done = site.submit("r.yaml", FAKE_CHECK=check)
    assert done.returncode == status
    assert ("bad key" in done.stderr) == (status == 2)
    assert site.lines("submitted") == []
    assert not (site.folder / "runs").exists()


def test_a_dry_run_writes_and_submits_nothing(site: Site) -> None:
    before = {f for f in site.folder.iterdir() if f.name != "calls"}
    done = site.submit("r.yaml", "--dry-run", "--nodes", "4", "--gpus-per-node", "8", "--time", "1:00:00")
    assert done.returncode == 0, done.stderr
    reference, train, export = done.stdout.splitlines()
    for line in (reference, train):
        assert all(o in line for o in ("--nodes=4", "--gpus-per-node=8", "--time=1:00:00", "--partition=gpu"))
    assert "afterok:" in train
    assert "--gpus-per-node" not in export
    assert {f for f in site.folder.iterdir() if f.name != "calls"} == before


def test_a_chain(site: Site) -> None:
    done = site.submit("r.yaml", "loss.beta=0.3", "--nodes", "2", "--grace", "90")
    assert done.returncode == 0, done.stderr
    reference, train, export = (line.split("|") for line in site.lines("submitted"))
    assert "--signal=B:USR1@90" in reference
    assert "--comment=two words" in reference
    assert "--dependency=afterok:41" in train
    assert "--dependency=afterok:42" in export
    kept = site.base.with_name("mine.submit") / "1"
    assert train[-3:-1] == [f"{kept}/code/slurm/train.sbatch", str(kept)]
    resolved = (kept / "run-0.yaml").read_text()
    assert f"run.dir={site.base}" in resolved
    assert f"run.cache={site.base.parent}/.prefopt" in resolved
    assert f"deepspeed.policy={kept}/code/deepspeed_configs/policy_zero3.json" in resolved
    assert "deepspeed.reference" not in resolved
    assert (kept / "code" / "prefopt_dist" / "__main__.py").exists()
    assert not site.base.exists()  # the run folder is the training's own
    assert "scancel --batch --signal=TERM 42" in done.stdout
    assert site.submit("r.yaml").returncode == 0
    assert (kept.with_name("2") / "job.env").exists()


def test_submissions_at_the_same_moment_have_folders_of_their_own(site: Site) -> None:
    """Each stops where it would make its folder, until the other is there too."""
    (site.folder / "bin" / "mkdir").write_text(
        "#!/usr/bin/env bash\n"
        'if [[ $* == *mine.submit/1 && ! -e $FAKE/$PPID ]]; then touch "$FAKE/$PPID"\n'
        '    for _ in {1..400}; do [[ $(ls "$FAKE"/at.* | wc -l) -lt 2 ]] || break; /bin/sleep 0.02; done\n'
        'fi\nexec /bin/mkdir "$@"\n'.replace("$FAKE/$PPID", "$FAKE/at.$PPID")
    )
    (site.folder / "bin" / "mkdir").chmod(0o755)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda beta: site.submit("r.yaml", f"loss.beta={beta}"), ("0.3", "0.7")))
    assert [d.returncode for d in done] == [0, 0], done
    assert len(list(site.folder.glob("at.*"))) == 2
    folders = sorted(site.base.with_name("mine.submit").iterdir())
    assert [folder.name for folder in folders] == ["1", "2"]
    for folder in folders:
        assert (folder / "job.env").exists()
        assert f"deepspeed.policy={folder}/code/" in (folder / "run-0.yaml").read_text()
    assert sorted(d.stdout.split("kept in: ")[1].split()[0] for d in done) == [str(f) for f in folders]


def test_a_submission_that_has_no_place(site: Site) -> None:
    site.base.parent.mkdir()
    site.base.with_name("mine.submit").write_text("somebody's own")
    done = site.submit("r.yaml")
    assert (done.returncode, "mine.submit cannot be created" in done.stderr) == (2, True)
    assert site.lines("submitted") == []


def test_a_run_that_cannot_fit_is_not_submitted(site: Site) -> None:
    done = site.submit(
        "r.yaml", "--nodes", "4", "--gpus-per-node", "8", FAKE_GPU="h200", FAKE_PLAN="echo no>&2; exit 2"
    )
    assert (done.returncode, "no" in done.stderr.splitlines(), site.lines("submitted")) == (2, True, [])
    [asked] = [line for line in site.lines("calls") if " plan " in line]
    assert asked.endswith(" plan.nodes=4 plan.gpus_per_node=8")
    # The copy of the code, with its DeepSpeed files, is not there yet.
    assert f"deepspeed.policy={REPOSITORY}/deepspeed_configs/policy_zero3.json" in asked
    assert site.submit("r.yaml", FAKE_GPU="h200", FAKE_PLAN="exit 7").returncode == 1
    assert site.submit("r.yaml", FAKE_GPU="h200", FAKE_PLAN="echo it fits").returncode == 0
    assert (site.base.with_name("mine.submit") / "1" / "plan.txt").read_text() == "it fits\n"
    assert "plan.gpu is not set" in site.submit("r.yaml").stderr


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


def test_no_secret_is_kept_with_a_submission(site: Site) -> None:
    """Neither of the environment nor of files beside the code; the site's own values are kept as they are."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    done = site.submit("r.yaml", **dict.fromkeys(names, "planted-secret"))
    assert done.returncode == 0
    assert site.job(**dict.fromkeys(names, "planted-secret")).returncode == 0
    kept = [f for f in site.base.with_name("mine.submit").rglob("*") if f.is_file()]
    assert len(kept) > 100
    assert [f for f in kept if b"planted-secret" in f.read_bytes()] == []
    # Their environment is Slurm's to pass on; it stands in no option.
    assert "planted-secret" not in "".join(site.lines("submitted") + site.lines("srun") + site.lines("checked"))
    assert "planted-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "line", ["WANDB_API_KEY=planted", "A=1; export HF_TOKEN='planted'", 'AWS_SECRET_ACCESS_KEY="x"']
)
def test_a_site_that_would_keep_a_secret_is_refused(site: Site, line: str) -> None:
    (site.folder / "site.env").write_text(f"PREFOPT_SBATCH=()\n{line}\n")
    done = site.submit("r.yaml")
    assert (done.returncode, f"{site.folder}/site.env:2: it sets a secret" in done.stderr) == (2, True)
    assert "planted" not in done.stderr
    assert site.lines("submitted") == []


@pytest.mark.parametrize(
    "line", ["# HF_TOKEN=mine", "HF_TOKEN=$(cat /dev/null)", "TOKENIZERS_PARALLELISM=true", "HF_TOKEN="]
)
def test_a_site_that_keeps_none_is_taken(site: Site, line: str) -> None:
    (site.folder / "site.env").write_text(f"{line}\n")
    assert site.submit("r.yaml", "--dry-run").returncode == 0


def test_a_loss_without_reference_has_no_first_pass(site: Site) -> None:
    assert site.submit("r.yaml", FAKE_REFERENCE="False").returncode == 0
    train, _ = site.lines("submitted")
    assert "--dependency" not in train


def test_a_refused_job_cancels_those_before_it(site: Site) -> None:
    done = site.submit("r.yaml", FAKE_REFUSES="export.sbatch")
    assert done.returncode == 1
    assert site.lines("cancelled") == ["41 42"]


def test_a_sweep_is_an_array_after_one_first_pass(site: Site) -> None:
    done = site.submit("r.yaml", "--sweep", "loss.beta=0.05,1e-1")
    assert done.returncode == 0, done.stderr
    reference, train, export = (line.split("|") for line in site.lines("submitted"))
    assert not any(o.startswith("--array") for o in reference)
    assert "--array=0-1" in train
    assert "--dependency=aftercorr:42" in export
    kept = site.base.with_name("mine.submit") / "1"
    assert f"run.dir={site.base}-beta1e-1 loss.beta=1e-1" in (kept / "run-1.yaml").read_text()
    assert "-beta0.05" in (kept / "job.env").read_text()


def test_rounds_are_one_job_that_comes_back(site: Site) -> None:
    done = site.submit("r.yaml", "--rounds", "--nodes", "2", "--time", "4:00:00")
    assert done.returncode == 0, done.stderr
    (job,) = (line.split("|") for line in site.lines("submitted"))
    assert job[-3].endswith("/code/slurm/rounds.sbatch")
    assert {"--nodes=2", "--time=4:00:00", "--signal=B:USR1@300"} <= set(job)
    assert all(call.startswith("-m prefopt_dist rounds ") for call in site.lines("calls") if call.startswith("-m"))
    assert "--signal=TERM 41 " in done.stdout
    assert site.job("rounds", FAKE_JOB='touch "$FAKE/runs/mine/DONE"').returncode == 0
    assert "|rounds|" in site.lines("srun")[0]
    assert site.submit("r.yaml", "--rounds", "--sweep", "loss.beta=0.1,0.2").returncode == 2
    # The prompts have no chosen and rejected responses, so the plan is of the pairs that are to be made.
    assert site.submit("r.yaml", "--rounds", "--dry-run", FAKE_GPU="h100", FAKE_PLAN="echo fits").returncode == 0
    [asked] = [line for line in site.lines("calls") if " plan " in line]
    assert f" data.train={site.base}/round-1/pairs.jsonl plan.nodes=1 " in asked


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


STOPPED = 'sleep 0.1; echo why >"$FAKE/runs/mine/STOPPED"; '
ASK = 'kill -{} $PPID; until [[ -e $FAKE/runs/mine/STOP ]]; do sleep 0.1; done; rm "$FAKE/runs/mine/STOP"; '
REQUEUE = "requeue 7"


@pytest.mark.parametrize(
    ("work", "status", "requeued"),
    [
        ("exit 1", 1, False),
        (STOPPED, 75, False),
        (ASK.format("TERM") + STOPPED, 75, False),
        (ASK.format("TERM") + STOPPED + "exit 143", 75, False),
        (ASK.format("USR1") + STOPPED, 75, True),
        (ASK.format("USR1") + "kill -TERM $PPID; sleep 0.1; " + STOPPED, 75, False),
        (ASK.format("USR1") + "exit 1", 1, False),
        (ASK.format("USR1") + 'touch "$FAKE/runs/mine/DONE"', 0, False),
        ('printf "2\\nerror: bad key\\n" >"$PREFOPT_STATUS_FILE"; exit 143', 2, False),
    ],
)
def test_the_end_of_a_job(site: Site, work: str, status: int, requeued: bool) -> None:
    done = site.job(FAKE_JOB=work)
    assert done.returncode == status, done.stderr
    assert (REQUEUE in site.lines("scontrol")) == requeued
    assert not (site.base / "STOP").exists()
    assert ("error: bad key" in done.stderr) == (status == 2)


def test_a_start_that_is_woken_before_its_ranks_does_not_come_back(site: Site) -> None:
    done = site.job(FAKE_NODES="kill -USR1 $PPID; sleep 0.2")
    assert done.returncode == 2
    assert "before there were any ranks; give more --time" in done.stderr
    assert REQUEUE not in site.lines("scontrol")
    assert not site.lines("srun")


PREEMPTED = "PreemptTime=2026-01-01T11:00:00"


@pytest.mark.parametrize("work", [STOPPED, ASK.format("USR1") + STOPPED, "exit 143"])
def test_a_preempted_job_comes_back_however_often(site: Site, work: str) -> None:
    done = site.job(FAKE_JOB=work, FAKE_PREEMPTED=PREEMPTED, SLURM_RESTART_COUNT="40", SLURM_TIME_FORMAT="%a %T")
    assert done.returncode == 75
    assert REQUEUE in site.lines("scontrol")


def test_a_preempted_job_that_is_cancelled_stays_away(site: Site) -> None:
    assert site.job(FAKE_JOB=ASK.format("TERM") + STOPPED, FAKE_PREEMPTED=PREEMPTED).returncode == 75
    assert REQUEUE not in site.lines("scontrol")


def test_a_preemption_before_the_ranks_or_in_the_export(site: Site) -> None:
    site.job(FAKE_NODES="exit 143", FAKE_PREEMPTED=PREEMPTED)
    assert site.lines("scontrol").count(REQUEUE) == 1
    site.job("export", FAKE_JOB="exit 1", FAKE_PREEMPTED=PREEMPTED)
    assert site.lines("scontrol").count(REQUEUE) == 2
    assert site.job("export", FAKE_JOB="exit 0", FAKE_PREEMPTED=PREEMPTED).returncode == 0
    assert site.lines("scontrol").count(REQUEUE) == 2


@pytest.mark.parametrize("asked", ["TERM", "USR1"])
def test_a_job_that_slurm_itself_has_put_back(site: Site, asked: str) -> None:
    more = {"FAKE_PREEMPTED": f"Restarts=3 {PREEMPTED}", "SLURM_RESTART_COUNT": "2"}
    for work in (ASK.format(asked) + STOPPED, ASK.format(asked) + "exit 143"):
        done = site.job(FAKE_JOB=work, **more)
        assert (done.returncode, "Slurm has requeued the job" in done.stdout) == (75, True)
    assert REQUEUE not in site.lines("scontrol")


@pytest.mark.parametrize("shown", ["PreemptTime=None Restarts=0", "PreemptTime=2026-01-01T09:00:00", ""])
def test_a_stop_that_is_no_preemption_in_this_start(site: Site, shown: str) -> None:
    assert site.job(FAKE_JOB=STOPPED, FAKE_PREEMPTED=shown).returncode == 75
    assert REQUEUE not in site.lines("scontrol")


def test_the_last_task_of_an_array_does_not_put_back_the_others(site: Site) -> None:
    # Its id, 7, is the array's as well.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert site.job(FAKE_JOB=ASK.format("USR1") + STOPPED, **array).returncode == 75
    assert "requeue 7_0" in site.lines("scontrol")


def test_requeues_are_bounded_and_an_old_word_does_not_count(site: Site) -> None:
    done = site.job(FAKE_JOB=ASK.format("USR1") + STOPPED, SLURM_RESTART_COUNT="10")
    assert done.returncode == 75
    assert "restarted 10 times" in done.stderr
    assert REQUEUE not in site.lines("scontrol")
    os.utime(site.base / "STOPPED", (1, 1))
    assert site.job(FAKE_JOB="exit 1").returncode == 1


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
