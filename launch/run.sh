#!/usr/bin/env bash
# One stage of a run on this machine: all its GPUs, or N CPU ranks.
#
#   launch/run.sh [-n N] STAGE RUN.yaml [section.key=value ...]
#
# On several machines that see one run folder, the same command on each, with PREFOPT_NODES (how many), PREFOPT_NODE
# (which one this is, from 0) and PREFOPT_HEAD (HOST:PORT of machine 0) in the environment; -n is then a machine's.
# A signal to one of them stops all. The user's mistake ends with 2 where rank 0 is, elsewhere with 1.
#
# Ends with 0 done, 75 stopped on request (start again), 2 the user's mistake, 1 a crash.
# To stop reference, train, generate or rounds, send TERM, USR1, HUP or INT (Ctrl-C) to this script: it creates RUN/STOP
# and waits until the checkpoint is committed. A second INT ends the ranks at once (status 1).
#
# The ranks have a session of their own, so that a signal to this script's process group (a scheduler's,
# or Ctrl-C) reaches them only through RUN/STOP. The price: kill -9 of this script leaves them running;
# create RUN/STOP by hand then.
set -euo pipefail
{ # bash reads a script as it goes; in one block it is read whole, so an update under a running job does no harm

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'USAGE'
usage: launch/run.sh [-n N] STAGE RUN.yaml [section.key=value ...]
  STAGE  inspect | plan | reference | train | evaluate | generate | rounds | report | export
  -n N   ranks on this machine; default: one a GPU, or 2 where there is none
CUDA_VISIBLE_DEVICES= (empty) runs on the CPU of a machine with GPUs.
On several machines: PREFOPT_NODES, PREFOPT_NODE and PREFOPT_HEAD=HOST:PORT in the environment.
USAGE
}

mistake() {
    echo "launch/run.sh: $1" >&2
    usage >&2
    exit 2
}

# Arguments

ranks=""
while [[ $# -gt 0 && $1 == -* ]]; do
    case $1 in
        -n)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || mistake "-n: got '${2:-}', must be a number of ranks, at least 1"
            ranks=$2
            shift 2
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) mistake "unknown option '$1'" ;;
    esac
done
[[ $# -ge 2 ]] || mistake "STAGE and RUN.yaml are missing"
stage=$1
arguments=("$@")
for argument in "${arguments[@]}"; do
    [[ $argument != -* ]] || mistake "'$argument': options stand before STAGE; overrides are section.key=value"
done

nodes=${PREFOPT_NODES:-1}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || mistake "PREFOPT_NODES: got '$nodes', must be a number of machines, at least 1"
if ((nodes > 1)); then
    [[ ${PREFOPT_NODE:-} =~ ^(0|[1-9][0-9]*)$ && ${PREFOPT_NODE:-} -lt $nodes ]] ||
        mistake "PREFOPT_NODE: got '${PREFOPT_NODE:-}', must be this machine's number, 0 to $((nodes - 1))"
    [[ ${PREFOPT_HEAD:-} =~ ^.+:[0-9]+$ ]] ||
        mistake "PREFOPT_HEAD: got '${PREFOPT_HEAD:-}', must be HOST:PORT of machine 0"
fi

# Environment

# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=$(choose_python "$repository")
command -v "$python" >/dev/null || mistake "no Python at '$python'; run make lint in $repository or set PREFOPT_PYTHON"

gpus=$(count_gpus)
one_process=no
case $stage in
    inspect | plan | report | export) one_process=yes ;;
esac
if [[ $one_process == yes ]]; then
    ((nodes == 1)) || mistake "$stage is one process; unset PREFOPT_NODES"
    ranks=1
elif ((gpus > 0)); then
    ranks=${ranks:-$gpus}
    ((ranks <= gpus)) || mistake "-n $ranks: this machine has $gpus GPUs; give at most $gpus"
else
    ranks=${ranks:-2}
fi
((gpus > 0)) || export DS_ACCELERATOR=cpu
[[ $one_process == yes ]] || ((gpus == 0)) || export PREFOPT_WANT_GPUS=1
share_cores "$ranks"

# One process

if [[ $one_process == yes ]]; then
    "$python" -m prefopt_dist "${arguments[@]}" &
    job=$!
    trap 'kill -TERM "$job" 2>/dev/null || true' TERM INT HUP USR1 # or it would outlive this script
    status=0
    wait "$job" || status=$?
    while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
        status=0
        wait "$job" || status=$?
    done
    ((status == 0 || status == 2)) || status=1
    exit "$status"
fi

# Many ranks: validate first, in one process

obeys_stop=no # whether the stage looks for RUN/STOP
case $stage in
    reference | train | generate | rounds) obeys_stop=yes ;;
esac
job=""
requests=0
interrupts=0
end_by=TERM # what ends the ranks at once
((nodes == 1)) || end_by=INT # launch/node.sh ignores TERM

# shellcheck disable=SC2317,SC2329 # traps call it
on_signal() { # $1: the signal
    requests=$((requests + 1))
    if [[ $1 == INT ]]; then
        interrupts=$((interrupts + 1))
    fi
    [[ -n $job ]] || return 0
    if [[ $obeys_stop == no ]] || ((interrupts > 1)); then
        echo "launch/run.sh: $1: ending the ranks" >&2
        kill "-$end_by" "$job" 2>/dev/null || true
    elif ((requests == 1)); then
        echo "launch/run.sh: $1: asked for a stop (RUN/STOP); waiting for the checkpoint" >&2
    fi
}
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal HUP' HUP
trap 'on_signal INT' INT

status=0
checked=$("$python" -m prefopt_dist "${arguments[@]}" --check) || status=$?
if ((requests > 0)); then
    echo "launch/run.sh: stopped before the ranks were started" >&2
    [[ $obeys_stop == yes ]] && exit 75
    exit 1
fi
if ((status != 0)); then
    ((status == 2)) && exit 2
    exit 1
fi
run_dir=${checked##*$'\n'}
if [[ -z $run_dir ]]; then
    echo "launch/run.sh: the check named no run folder (a defect of the program)" >&2
    exit 1
fi

# The ranks

PREFOPT_STATUS_FILE=$(mktemp)
export PREFOPT_STATUS_FILE
made_stop=no
# shellcheck disable=SC2317,SC2329 # a trap calls it
clean_up() {
    rm -f "$PREFOPT_STATUS_FILE"
    # Only what this script made: the job has ended, and a stale STOP would be a riddle.
    [[ $made_stop == no ]] || rm -f "$run_dir/STOP"
}
trap clean_up EXIT

echo "launch/run.sh: $stage on $ranks $( ((gpus > 0)) && echo GPU || echo CPU) ranks, run folder $run_dir" >&2
if ((nodes == 1)); then
    command=("$python" -m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node "$ranks" -m prefopt_dist)
else
    echo "launch/run.sh: machine $PREFOPT_NODE of $nodes, which meet at $PREFOPT_HEAD" >&2
    command=("$repository/launch/node.sh" --nodes "$nodes" --ranks "$ranks" --head "$PREFOPT_HEAD" --job prefopt
        --node "$PREFOPT_NODE")
fi
setsid "${command[@]}" "${arguments[@]}" &
job=$!
if ((requests > 0)) && [[ $obeys_stop == no ]]; then # a signal between the check and here
    kill "-$end_by" "$job" 2>/dev/null || true
fi

# bash runs a trap only between two commands, and a signal just before a long `wait` would lie until the job
# ends: so short sleeps, and one `wait` at the end for the status. STOP is seen to each time round, because
# ranks that are still starting remove one as stale.
while kill -0 "$job" 2>/dev/null; do
    if ((requests > 0)) && [[ $obeys_stop == yes && -d $run_dir && ! -e $run_dir/STOP ]]; then
        touch "$run_dir/STOP" && made_stop=yes
    fi
    sleep 0.5 || true # Ctrl-C ends the sleep too
done
status=0
wait "$job" || status=$?

if ((status == 0)); then
    if [[ $obeys_stop == yes && -e $run_dir/STOPPED ]]; then
        exit 75
    fi
    exit 0
fi
((status != 2)) || exit 2 # launch/node.sh could not even start them
# torchrun makes every failure a 1; the ranks say what it was.
said=""
read -r said <"$PREFOPT_STATUS_FILE" || true
if [[ $said == 2 ]]; then
    # Once more, below torchrun's block, where people look.
    tail -n +2 "$PREFOPT_STATUS_FILE" >&2
    exit 2
fi
exit 1
}
