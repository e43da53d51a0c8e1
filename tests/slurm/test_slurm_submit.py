"""slurm/submit without Slurm: usage, sites, chains of jobs, sweeps, rounds, and what is kept with a submission."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from places import REPOSITORY
from slurm_site import Site


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
