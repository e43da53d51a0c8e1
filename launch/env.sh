# shellcheck shell=bash
# The environment of every stage, sourced by launch/run.sh and launch/node.sh. A value that you have set yourself wins.

# The tokenizers library forks badly once its threads run; the ranks parallelise by themselves.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# No usage reports from a job.
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"

# Lines of the ranks appear when they are written, not when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# A crash in native code leaves the Python stack of the rank.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# On the CPU activations come and go by the hundred megabytes. glibc would give each block back to the kernel and
# fault its pages in again: 5 to 10 % of a training step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824}"

# NCCL says its version once and its warnings; NCCL_DEBUG=INFO shows which network it took. (Not run here.)
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# What torch does of itself: the flight recorder keeps a rank's last collectives and writes them when one times out, to
# TORCH_FR_DUMP_TEMP_FILE followed by the rank; slurm/job.sh puts that beside the logs.
#
# What differs from site to site is yours to set, under Slurm in slurm/site.env: the network (NCCL_SOCKET_IFNAME,
# GLOO_SOCKET_IFNAME, NCCL_IB_HCA), caches that all nodes see (HF_HOME, PREFOPT_CACHE), nodes without a way to the hub
# (HF_HUB_OFFLINE=1).

# How many GPUs there are to use here.
count_gpus() {
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
        echo 0
    elif [[ ${CUDA_VISIBLE_DEVICES:-} == -* ]]; then
        echo 0 # -1 hides them all
    elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local -a devices
        IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#devices[@]}"
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi -L 2>/dev/null || true; } | { grep -c '^GPU ' || true; }
    else
        echo 0
    fi
}

# The Python of a checkout ($1): PREFOPT_PYTHON, its .venv, or the one on PATH.
choose_python() {
    if [[ -n ${PREFOPT_PYTHON:-} ]]; then
        echo "$PREFOPT_PYTHON"
    elif [[ -x $1/.venv/bin/python ]]; then
        echo "$1/.venv/bin/python"
    else
        echo python3
    fi
}

# The cores of this machine, or of this job on it, go to its ranks ($1) in equal parts.
share_cores() {
    if [[ -z ${OMP_NUM_THREADS:-} ]]; then
        local threads=$(($(nproc) / $1))
        export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    fi
}
