#!/usr/bin/env bash
# Runs this node's part of a stage on several nodes. slurm/job.sh starts it once on each node through srun. Any other
# way to start a command on every node works too.
#
#   launch/node.sh --nodes N --ranks R --head HOST:PORT --job NAME [--node I] STAGE RUN.yaml [section.key=value ...]
#
# All nodes get the same arguments except --node, the number of this node: 0 is the head. Without --node, SLURM_NODEID
# is used. The ranks write a user's mistake into PREFOPT_STATUS_FILE, which must be in a folder that all nodes share.
# Exit status: 0 if the ranks ended normally (done, or stopped on request), 2 if these arguments or this node are not
# right, else 1.
set -euo pipefail
{ # bash reads the whole block before it runs, as in launch/run.sh

# A scheduler sends a signal to every process of the job at once. Ranks that are training handle TERM and USR1 by
# themselves. torchrun and ranks that are still starting must survive these signals, so they are ignored here and,
# through exec, in torchrun. The request to stop is the file RUN/STOP, which the script that started this one creates.
trap '' TERM USR1 HUP

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

mistake() {
    echo "launch/node.sh: $1" >&2
    exit 2
}

nodes="" ranks="" head="" job="" node=${SLURM_NODEID:-}
while [[ ${1:-} == -* ]]; do
    case $1 in
        --nodes | --ranks | --head | --job | --node)
            [[ -n ${2:-} ]] || mistake "$1 needs a value"
            case $1 in
                --nodes) nodes=$2 ;;
                --ranks) ranks=$2 ;;
                --head) head=$2 ;;
                --job) job=$2 ;;
                --node) node=$2 ;;
            esac
            shift 2
            ;;
        *) mistake "unknown option '$1'" ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || mistake "--nodes: got '$nodes', must be a number of nodes, at least 1"
[[ $ranks =~ ^[1-9][0-9]*$ ]] || mistake "--ranks: got '$ranks', must be a number of ranks a node, at least 1"
[[ $head =~ ^.+:[0-9]+$ ]] || mistake "--head: got '$head', must be HOST:PORT of the first node"
[[ $node =~ ^(0|[1-9][0-9]*)$ && $node -lt $nodes ]] ||
    mistake "--node (or SLURM_NODEID): got '$node', must be this node's number, 0 to $((nodes - 1))"
[[ -n $job ]] || mistake "--job is missing; give a name that is the same on all nodes of this job"
[[ $# -ge 2 ]] || mistake "STAGE and RUN.yaml are missing"

# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=$(choose_python "$repository")
command -v "$python" >/dev/null || mistake "$(hostname): there is no Python at '$python'; set PREFOPT_PYTHON"
gpus=$(count_gpus)
if ((gpus > 0)); then
    ((ranks <= gpus)) || mistake "$(hostname): got $ranks ranks per node, but this node has $gpus GPUs; request one GPU per rank"
    export PREFOPT_WANT_GPUS=1
else
    [[ -z ${PREFOPT_WANT_GPUS:-} ]] ||
        mistake "$(hostname): no GPU here (nvidia-smi, CUDA_VISIBLE_DEVICES, DS_ACCELERATOR), but $ranks are needed; repair this node or exclude it"
    export DS_ACCELERATOR=cpu
fi
share_cores "$ranks"
name=${SLURMD_NODENAME:+$SLURMD_NODENAME${PREFOPT_HEAD_SUFFIX:-}}
address=$("$python" -m prefopt_dist.preflight.rendezvous "$head" "$node" ${name:+"$name"}) || exit 2 # it has printed the reason

exec "$python" -m torch.distributed.run \
    --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$job" \
    --rdzv-conf "is_host=$((node == 0 ? 1 : 0)),join_timeout=900,read_timeout=900" --local-addr "$address" \
    --signals-to-handle SIGINT --shutdown-timeout 10 \
    -m prefopt_dist "$@"
}
