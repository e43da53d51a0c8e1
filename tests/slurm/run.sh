#!/usr/bin/env bash
# Tests slurm/ on a real Slurm of two nodes on this machine, with a tiny model and one CPU rank per node.
#
#   tests/slurm/run.sh [--short] [CASE ...]
#
# Run it as root on Debian or Ubuntu. It installs slurm-wlm and munge if they are missing, starts munge, slurmctld and
# two slurmd on ports of 127.0.0.1 in a temporary folder, and ends them afterwards. --short runs the chain of jobs with
# one requeue, and a plain scancel. KEEP=1 keeps the folder.
# shellcheck disable=SC2317,SC2329 # check, wait_for and a trap call the functions
set -euo pipefail
{
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$repository"
cases=(through unfit raised cancelled gently swept preempted limited)
if [[ ${1:-} == --short ]]; then
    shift
    cases=(requeued cancelled)
fi
(($# == 0)) || cases=("$@")
for case in "${cases[@]}"; do
    [[ $case =~ ^(through|requeued|cancelled|gently|preempted|limited|raised|unfit|swept)$ ]] || { echo "unknown case '$case'" >&2 && exit 2; }
done
[[ $EUID == 0 ]] || { echo "tests/slurm/run.sh: run this as root, in a container for example" >&2 && exit 2; }

# shellcheck source=launch/env.sh
source launch/env.sh
python=$(choose_python "$repository")
python=$(command -v "$python")
export PREFOPT_PYTHON=$python CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PYTHONPATH=$repository
export WANDB_API_KEY=planted-$RANDOM-$RANDOM HF_TOKEN=hf_planted-$RANDOM-$RANDOM
export PREFOPT_CHECK_NODES=no # except in the cases that test the check
faults=$repository:$repository/tests/slurm/fault
unset PREFOPT_CACHE PREFOPT_SITE WANDB_MODE
home=$(mktemp -d)
chmod 755 "$home" # munge runs as a user of its own

# shellcheck source=tests/slurm/cluster.sh
source tests/slurm/cluster.sh
finish() {
    local status=$?
    stop_cluster
    if ((status != 0)); then
        tail -n 25 "$home"/*.submit/*/logs/*.txt 2>/dev/null || true
        echo "tests/slurm/run.sh: FAILED" >&2
    fi
    if [[ -n ${KEEP:-} ]]; then echo "kept: $home"; else rm -rf "$home"; fi
}
trap finish EXIT
install_slurm
start_cluster
"$python" tests/slurm/make_world.py "$home"

check() { # $1: what is checked, the others: a command that must succeed
    local what=$1
    shift
    "$@" || { echo "$case: FAILED: $what ($*)" >&2 && exit 1; }
    echo "$case: $what"
}

state() { # prints the state of job $1, also after its end
    scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1
}

field() { # $1: job, $2: field
    scontrol show job "$1" | sed -n "s/.*\b$2=\([^ ]*\).*/\1/p" | head -n 1
}

wait_for() { # $1: seconds, the others: a command that must succeed within that time
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || { echo "$case: timed out while waiting for: $*" >&2 && squeue >&2 && exit 1; }
        sleep 0.5
    done
}

ended() { # succeeds if these jobs have ended
    local id
    for id in "$@"; do
        case $(state "$id") in PENDING | RUNNING | COMPLETING | CONFIGURING | SUSPENDED) return 1 ;; esac
        [[ -z $(squeue -h -j "$id" 2>/dev/null) ]] || return 1
    done
}

is_field() { [[ $(field "$1" "$2") == "$3" ]]; }
is() { [[ $1 == "$2" ]]; }
is_not() { [[ $1 != "$2" ]]; }
at_step() { [[ -e $1/metrics.jsonl ]] && grep -q "\"step\": $2," "$1/metrics.jsonl"; }
steps() { grep '"kind": "train"' "$1/metrics.jsonl" | grep -o '"step": [0-9]*'; }
no_secret() { # succeeds if the files of these folders contain no secret
    ! grep -rqF -e "$WANDB_API_KEY" -e "$HF_TOKEN" -- "$@"
}
missing() { [[ ! -e $1 ]]; }
committed() { compgen -G "$1/checkpoints/step-*" >/dev/null; }

waits_again() { is_field "$1" Restarts "${2:-1}" && is "$(state "$1")" PENDING; }

no_steps() { ! pgrep -f "^slurmstepd: \\[$1\\." >/dev/null; }

again() { # $1: a job that has requeued itself, $2: how often so far (1)
    wait_for 90 waits_again "$@"
    check "job $1 is in the queue again under its id" is_field "$1" Restarts "${2:-1}"
    # Slurm delays a requeued job by two minutes, so that the end of its first start is not taken for the end of the
    # second. Here the end of all its steps can be seen, so it may start at once, without a time limit.
    wait_for 60 no_steps "$(field "$1" JobId)"
    sleep 3
    scontrol update "JobId=$1" StartTime=now TimeLimit=UNLIMITED
}

submit() { # $@: arguments of slurm/submit; sets reference, train and export to the ids of the jobs
    local output
    output=$(slurm/submit "$@" --nodes 2)
    reference=$(sed -n 's/^reference: job //p' <<<"$output")
    train=$(sed -n 's/^train: job //p' <<<"$output")
    export=$(sed -n 's/^export: job //p' <<<"$output")
}

same_end() {
    "$python" - "$1" "$2" <<'PYTHON'
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file

a, b = (load_file(Path(f) / "final/model.safetensors") for f in sys.argv[1:])
assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "the weights differ"
rows = [[json.loads(r) for r in (Path(f) / "metrics.jsonl").read_text().splitlines()] for f in sys.argv[1:]]
mine, theirs = ([{k: v for k, v in r.items() if not k.startswith("perf/")} for r in x] for x in rows)
assert mine == theirs, "the rows differ"
PYTHON
}

scored() { # succeeds if the store in $1 has every sequence once; prints their number
    "$python" - "$1" <<'PYTHON'
import sys
from pathlib import Path

content = b"".join(f.read_bytes()[8:-16] for f in Path(sys.argv[1]).glob("reference/*/rows-*.bin"))
rows = [content[i : i + 32] for i in range(0, len(content), 40)]
assert rows and len(rows) == len(set(rows)), f"{len(rows)} rows of {len(set(rows))} sequences"
print(len(rows), "sequences, each once")
PYTHON
}

for case in "${cases[@]}"; do
    began=$SECONDS
    case $case in
        through)
            PREFOPT_CHECK_NODES=yes submit "$home/through.yaml"
            # The training still waits for the first pass. The clone in the working directory does not print this line.
            sed -i '1a print("of the copy")' "$home/through.submit/1/code/prefopt_dist/monitoring/console.py"
            wait_for 240 ended "$reference" "$train" "$export"
            for job in "$reference" "$train" "$export"; do
                check "job $job is completed" is "$(state "$job")" COMPLETED
            done
            check "DONE" test -e "$home/through/DONE"
            check "two ranks" grep -q '"world_size": 2' "$home/through/run.json"
            check "the nodes were checked" grep -q "nodes: 2 passed the check; all-reduce" \
                "$home/through.submit/1/logs/train-$train.txt"
            check "a log of each node" test -e "$home/through.submit/1/logs/train-$train.0-node1.txt"
            check "the copy of the code runs" grep -q "of the copy" "$home/through.submit/1/logs/train-$train.0-node0.txt"
            check "the first pass scored once" scored "$home/cache"
            check "no secret in the run, its submission and the logs" no_secret "$home/through" "$home/through.submit"
            ;;
        requeued)
            # Send by hand the signal that Slurm sends before the time limit, since the shortest limit is two minutes.
            PREFOPT_CHECK_NODES=yes PREFOPT_TEST_FAULT=slow-updates PYTHONPATH=$faults submit "$home/requeued.yaml"
            wait_for 240 at_step "$home/requeued" 5
            scancel --batch --signal=USR1 "$train"
            wait_for 60 test -e "$home/requeued/STOPPED"
            echo "$case: $(<"$home/requeued/STOPPED")"
            again "$train"
            wait_for 240 ended "$train" "$export"
            check "the nodes were checked" grep -q "nodes: 2 passed" "$home/requeued.submit/1/logs/train-$train.txt"
            check "the training is completed" is "$(state "$train")" COMPLETED
            check "the export is completed" is "$(state "$export")" COMPLETED
            check "a first pass and two starts" is "$(grep -c '"world_size": 2' "$home/requeued/run.json")" 3
            check "120 steps, one row each" is "$(steps "$home/requeued" | wc -l) $(steps "$home/requeued" | sort -u | wc -l)" \
                "120 120"
            check "DONE" test -e "$home/requeued/DONE"
            ;;
        preempted)
            PREFOPT_TEST_FAULT=slow-updates PYTHONPATH=$faults submit "$home/preempted.yaml"
            wait_for 240 at_step "$home/preempted" 5
            urgent=$(sbatch --parsable --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap="sleep 5")
            wait_for 90 test -e "$home/preempted/STOPPED"
            echo "$case: $(<"$home/preempted/STOPPED")"
            again "$train"
            check "the urgent job has started" is_not "$(state "$urgent")" PENDING
            wait_for 240 ended "$train" "$export" "$urgent"
            check "the training is completed" is "$(state "$train")" COMPLETED
            check "the export is completed" is "$(state "$export")" COMPLETED
            check "120 steps, one row each" is "$(steps "$home/preempted" | wc -l) $(steps "$home/preempted" | sort -u | wc -l)" \
                "120 120"
            ;;
        cancelled | gently)
            submit "$home/$case.yaml"
            wait_for 240 at_step "$home/$case" 5
            if [[ $case == cancelled ]]; then scancel "$train"; else scancel --batch --signal=TERM "$train"; fi
            wait_for 90 ended "$train" "$export"
            check "STOPPED" test -e "$home/$case/STOPPED"
            check "a committed checkpoint" committed "$home/$case"
            check "no requeue" is "$(field "$train" Restarts)" 0
            check "the export is cancelled" is "$(state "$export")" CANCELLED
            check "STOP is gone" missing "$home/$case/STOP"
            [[ $case == cancelled ]] || check "the job ends with 75" is "$(field "$train" ExitCode)" 75:0
            ;;
        limited)
            # The first start is slowed down, so that it reaches the limit in the middle on any machine.
            PREFOPT_TEST_FAULT=slow PYTHONPATH=$faults submit "$home/limited.yaml" --time 2 --grace 60
            wait_for 300 test -e "$home/limited/STOPPED"
            echo "$case: $(<"$home/limited/STOPPED")"
            check "stopped in the first pass" grep -q "first pass" "$home/limited/STOPPED"
            check "some sequences are stored" scored "$home/cache-of-limited"
            some=$(scored "$home/cache-of-limited")
            again "$reference"
            wait_for 120 ended "$reference"
            check "the first pass is completed" is "$(state "$reference")" COMPLETED
            check "the second start has scored the others" is_not "$(scored "$home/cache-of-limited")" "$some"
            wait_for 300 test -e "$home/limited/STOPPED"
            echo "$case: $(<"$home/limited/STOPPED")"
            check "stopped in the training" grep -q "step" "$home/limited/STOPPED"
            wandb=$(grep '"wandb_id"' "$home/limited/run.json")
            again "$train"
            wait_for 300 ended "$train" "$export"
            check "the training is completed" is "$(state "$train")" COMPLETED
            check "the export is completed" is "$(state "$export")" COMPLETED
            check "two starts of each" is "$(grep -c '"world_size": 2' "$home/limited/run.json")" 4
            check "one W&B run" is "$(grep '"wandb_id"' "$home/limited/run.json")" "$wandb"
            launch/run.sh -n 2 train "$home/whole.yaml" >"$home/whole.log" 2>&1
            check "same bits and rows as without an interruption" same_end "$home/limited" "$home/whole"
            ;;
        raised)
            PREFOPT_TEST_FAULT=raise PYTHONPATH=$faults submit "$home/raised.yaml"
            wait_for 240 at_step "$home/raised" 2
            crashed=$SECONDS
            wait_for 60 ended "$train" "$export"
            echo "$case: ended $((SECONDS - crashed)) s after the crash"
            check "the training has failed" is "$(state "$train")" FAILED
            check "with status 1" is "$(field "$train" ExitCode)" 1:0
            check "the export is cancelled" is "$(state "$export")" CANCELLED
            ;;
        unfit)
            PREFOPT_CHECK_NODES=yes PREFOPT_MIN_SHM_GIB=1e9 submit "$home/unfit.yaml"
            wait_for 90 ended "$reference" "$train" "$export"
            check "the job has failed" is "$(state "$reference")" FAILED
            for node in n1 n2; do
                check "$node is named" grep -q "nodes: $node: /dev/shm" "$home/unfit.submit/1/logs/reference-$reference.txt"
            done
            check "there were no ranks" missing "$home/unfit"
            check "the training is cancelled" is "$(state "$train")" CANCELLED
            ;;
        swept)
            PREFOPT_TEST_FAULT=slow-updates PYTHONPATH=$faults submit "$home/swept.yaml" --sweep loss.beta=0.05,0.1,0.3
            wait_for 240 at_step "$home/swept-beta0.3" 5
            check "the last task has the array's id" is "$(field "${train}_2" JobId)" "$train"
            scancel --batch --signal=USR1 "${train}_2"
            wait_for 60 test -e "$home/swept-beta0.3/STOPPED"
            again "${train}_2"
            wait_for 400 ended "$reference" "$train" "$export"
            check "only this task was requeued" is "$(for task in 0 1 2; do field "${train}_$task" Restarts; done | xargs)" "0 0 1"
            for beta in 0.05 0.1 0.3; do
                check "beta $beta is done" test -e "$home/swept-beta$beta/DONE"
                check "beta $beta scored nothing" grep -q '"sequences_scored": 0' "$home/swept-beta$beta/run.json"
            done
            check "each sequence scored once" scored "$home/cache-of-sweep"
            ;;
    esac
    echo "$case: passed in $((SECONDS - began)) s"
done
echo "tests/slurm/run.sh: passed: ${cases[*]}"
exit
}
