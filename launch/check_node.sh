#!/usr/bin/env bash
# This node's part of the check before a job: slurm/job.sh starts one a node through srun.
#
#   launch/check_node.sh --hosts N1,N2,... --ranks R --head HOST:PORT --folder RUN [--node I]
#
# Without --node, SLURM_NODEID says which of the hosts this is. In the environment: PREFOPT_MIN_DISK_GIB,
# PREFOPT_MIN_SHM_GIB, PREFOPT_MEETING_SECONDS. Ends with 0, with 1 and a line for each fault with its host, or with 2
# where one of these is no number.
set -euo pipefail
{
trap '' TERM USR1 HUP # it is short; whoever started this has heard them
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=$(choose_python "$repository")
if ! command -v "$python" >/dev/null; then
    echo "launch/check_node.sh: $(hostname): no Python at '$python'; set PREFOPT_PYTHON" >&2
    exit 2
fi
# Without a driver, a job that wants GPUs must be told so: its ranks would compute on the CPU.
if (($(count_gpus) == 0)) && [[ -z ${PREFOPT_WANT_GPUS:-} ]]; then
    export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS=1
node=()
[[ " $* " == *" --node "* ]] || node=(--node "${SLURM_NODEID:?or --node}")
exec "$python" -m prefopt_dist.preflight "${node[@]}" "$@"
}
