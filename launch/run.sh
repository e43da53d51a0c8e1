#!/usr/bin/env bash
# Runs one stage on this machine, with one rank on each of its GPUs, or with N ranks on the CPU.
#
#   launch/run.sh [-n N] STAGE RUN.yaml [section.key=value ...]
#
# On several machines that share the run folder, start the same command on each, with the environment variables
# PREFOPT_NODES (number of machines), PREFOPT_NODE (number of this machine, from 0) and PREFOPT_HEAD (HOST:PORT of
# machine 0). -n is then the number of ranks on each machine. A signal to one of them stops all. A user's mistake ends
# with 2 on the machine of rank 0 and with 1 on the others; memory that runs out ends with 2 on all.
#
# Exit status: 0 done, 75 stopped on request (start again to resume), 2 the user's mistake, 1 a crash.
# To stop reference, train, generate or rounds, send TERM, USR1, HUP or INT (Ctrl-C) to this script: it creates RUN/STOP
# and waits until the checkpoint is committed. A second INT ends the ranks at once (status 1).
#
# The ranks run in a session of their own, so a signal to the process group of this script (from a scheduler or from
# Ctrl-C) reaches them only through RUN/STOP. The drawback: after kill -9 of this script they keep running; create
# RUN/STOP by hand to stop them.
set -euo pipefail
{ # bash reads a script while it runs it; it reads a block at once, so an update does not disturb a running job

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'USAGE'
usage: launch/run.sh [-n N] STAGE RUN.yaml [section.key=value ...]
  STAGE  inspect | plan | reference | train | evaluate | generate | rounds | report | export
  -n N   ranks on this machine; default: one per GPU, or 2 on a machine without GPUs
CUDA_VISIBLE_DEVICES= (empty) runs on the CPU of a machine with GPUs.
On several machines: set PREFOPT_NODES, PREFOPT_NODE and PREFOPT_HEAD=HOST:PORT in the environment.
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
    [[ $argument != -* ]] || mistake "got '$argument' after STAGE, must be section.key=value; options stand before STAGE"
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
command -v "$python" >/dev/null || mistake "there is no Python at '$python'; run make install in $repository or set PREFOPT_PYTHON"

gpus=$(count_gpus)
one_process=no
case $stage in
    inspect | plan | report | export) one_process=yes ;;
esac
if [[ $one_process == yes ]]; then
    ((nodes == 1)) || mistake "$stage runs in one process; unset PREFOPT_NODES"
    ranks=1
elif ((gpus > 0)); then
    ranks=${ranks:-$gpus}
    ((ranks <= gpus)) || mistake "-n: got $ranks, must be at most $gpus, since this machine has $gpus GPUs"
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
    trap 'kill -TERM "$job" 2>/dev/null || true' TERM INT HUP USR1 # else it would keep running after this script
    status=0
    wait "$job" || status=$?
    while kill -0 "$job" 2>/dev/null; do # the wait was ended by a signal, not by the end of the job
        status=0
        wait "$job" || status=$?
    done
    ((status == 0 || status == 2)) || status=1
    exit "$status"
fi

# Several ranks: validate the configuration first, in one process

obeys_stop=no # whether the stage checks for RUN/STOP
case $stage in
    reference | train | generate | rounds) obeys_stop=yes ;;
esac
job=""
requests=0
interrupts=0
end_by=TERM # signal that ends the ranks at once
((nodes == 1)) || end_by=INT # launch/node.sh ignores TERM

# shellcheck disable=SC2317,SC2329 # the traps call it
on_signal() { # $1: the signal
    requests=$((requests + 1))
    if [[ $1 == INT ]]; then
        interrupts=$((interrupts + 1))
    fi
    [[ -n $job ]] || return 0
    if [[ $obeys_stop == no ]] || ((interrupts > 1)); then
        echo "launch/run.sh: $1: ends the ranks" >&2
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
    echo "launch/run.sh: the check printed no run folder; this is a bug, please report it" >&2
    exit 1
fi

# The ranks

PREFOPT_STATUS_FILE=$(mktemp)
export PREFOPT_STATUS_FILE
made_stop=no
# shellcheck disable=SC2317,SC2329 # a trap calls it
clean_up() {
    rm -f "$PREFOPT_STATUS_FILE"
    # Remove only a STOP that this script created: the job has ended, and a stale STOP would confuse the user.
    [[ $made_stop == no ]] || rm -f "$run_dir/STOP"
}
trap clean_up EXIT

echo "launch/run.sh: $stage on $ranks $( ((gpus > 0)) && echo GPU || echo CPU) ranks, run folder $run_dir" >&2
if ((nodes == 1)); then
    command=("$python" -m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node "$ranks" -m prefopt_dist)
else
    echo "launch/run.sh: machine $PREFOPT_NODE of $nodes; rendezvous at $PREFOPT_HEAD" >&2
    command=("$repository/launch/node.sh" --nodes "$nodes" --ranks "$ranks" --head "$PREFOPT_HEAD" --job prefopt
        --node "$PREFOPT_NODE")
fi
setsid "${command[@]}" "${arguments[@]}" &
job=$!
if ((requests > 0)) && [[ $obeys_stop == no ]]; then # a signal arrived after the check
    kill "-$end_by" "$job" 2>/dev/null || true
fi

# bash runs a trap only between two commands, so a signal just before a long `wait` would be handled only when the job
# ends. Hence short sleeps, and one `wait` at the end for the status. STOP is created again in every round, because
# ranks that are still starting remove it as stale.
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
((status != 2)) || exit 2 # launch/node.sh could not start the ranks
# torchrun ends with 1 after every failure; the ranks' own status is in the file.
ranks_status=""
read -r ranks_status <"$PREFOPT_STATUS_FILE" || true
if [[ $ranks_status == 2 ]]; then
    # Repeat the message below torchrun's block, where users look.
    tail -n +2 "$PREFOPT_STATUS_FILE" >&2
    exit 2
fi
exit 1
}
