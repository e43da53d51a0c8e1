#!/usr/bin/env bash
# This node's part of a stage that runs on several nodes. slurm/job.sh starts one a node through srun; any other
# way of starting one command on every node does as well.
#
#   launch/node.sh --nodes N --ranks R --head HOST:PORT --job NAME [--node I] STAGE RUN.yaml [section.key=value ...]
#
# All nodes get the same arguments but for --node, this node's number: 0 is the head. Without it, SLURM_NODEID says
# which one this is. PREFOPT_STATUS_FILE, on a folder that all nodes see, takes the ranks' word on a mistake.
# Ends with 0 when the ranks ended well (done, or stopped on request), else 1.
set -euo pipefail
{ # read whole before it runs, as launch/run.sh is

# A scheduler's signal reaches every process of the job at once. The ranks themselves obey TERM and USR1 once they
# train; torchrun and ranks that still start must outlive them, so they are ignored here and, through exec, there.
# The request itself is RUN/STOP, which whoever started this has made.
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
            [[ -n ${2:-} ]] || mistake "$1 wants a value"
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
[[ -n $job ]] || mistake "--job: a name that all nodes of this job share is missing"
[[ $# -ge 2 ]] || mistake "STAGE and RUN.yaml are missing"

# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=$(choose_python "$repository")
command -v "$python" >/dev/null || mistake "$(hostname): no Python at '$python'; set PREFOPT_PYTHON"
gpus=$(count_gpus)
if ((gpus > 0)); then
    ((ranks <= gpus)) || mistake "$(hostname): $ranks ranks a node, but $gpus GPUs here; ask for as many GPUs a node"
    export PREFOPT_WANT_GPUS=1
else
    [[ -z ${PREFOPT_WANT_GPUS:-} ]] ||
        mistake "$(hostname): no GPU here (nvidia-smi, CUDA_VISIBLE_DEVICES, DS_ACCELERATOR), $ranks wanted; mend it or leave it out"
    export DS_ACCELERATOR=cpu
fi
share_cores "$ranks"
name=${SLURMD_NODENAME:+$SLURMD_NODENAME${PREFOPT_HEAD_SUFFIX:-}}
address=$("$python" -m prefopt_dist.preflight.rendezvous "$head" "$node" ${name:+"$name"}) || exit 2 # it has said why

exec "$python" -m torch.distributed.run \
    --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$job" \
    --rdzv-conf "is_host=$((node == 0 ? 1 : 0)),join_timeout=900,read_timeout=900" --local-addr "$address" \
    --signals-to-handle SIGINT --shutdown-timeout 10 \
    -m prefopt_dist "$@"
}
