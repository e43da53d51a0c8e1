#!/usr/bin/env bash
# Runs this node's part of the check before a job. slurm/job.sh starts it once on each node through srun.
#
#   launch/check_node.sh --hosts N1,N2,... --ranks R --head HOST:PORT --folder RUN [--node I] [--plan plan.json]
#
# With a plan (plan.file of the stage plan) it warns where the network is slower than the run needs. Without --node, SLURM_NODEID is the number of this host in the list. Environment variables: PREFOPT_MIN_DISK_GIB,
# PREFOPT_MIN_SHM_GIB, PREFOPT_MEETING_SECONDS. Exit status: 0; 1 with a line for each fault and its host; 2 if one of
# these variables is not a number.
set -euo pipefail
{
trap '' TERM USR1 HUP # the check is short, and the script that started it handles these signals
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=$(choose_python "$repository")
if ! command -v "$python" >/dev/null; then
    echo "launch/check_node.sh: $(hostname): there is no Python at '$python'; set PREFOPT_PYTHON" >&2
    exit 2
fi
# Do not select the CPU in a job for GPUs: on a node without a driver its ranks would run on the CPU unnoticed.
if (($(count_gpus) == 0)) && [[ -z ${PREFOPT_WANT_GPUS:-} ]]; then
    export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS=1
node=()
[[ " $* " == *" --node "* ]] || node=(--node "${SLURM_NODEID:?or --node}")
exec "$python" -m prefopt_dist.preflight "${node[@]}" "$@"
}
