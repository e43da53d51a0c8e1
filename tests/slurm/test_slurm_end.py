"""slurm/job.sh without Slurm: the status of a job that ends, and whether it comes back after a stop or a preemption."""

from __future__ import annotations

import os

import pytest
from slurm_site import Site

STOPPED = 'sleep 0.1; echo why >"$FAKE/runs/mine/STOPPED"; '
ASK = 'kill -{} $PPID; until [[ -e $FAKE/runs/mine/STOP ]]; do sleep 0.1; done; rm "$FAKE/runs/mine/STOP"; '
REQUEUE = "requeue 7"
PREEMPTED = "PreemptTime=2026-01-01T11:00:00"


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
