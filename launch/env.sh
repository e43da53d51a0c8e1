# shellcheck shell=bash
# Environment of every stage; launch/run.sh and launch/node.sh source it. Values that you have set are kept.

# Forking is not safe once the tokenizers library has started threads. The ranks run in parallel anyway.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Do not send usage reports from a job.
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"

# Show the ranks' output at once instead of when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# Print the Python stack of a rank that crashes in native code.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# On the CPU, activations of hundreds of megabytes are allocated and freed in each step. By default glibc returns each
# block to the kernel, and the page faults of the next allocation take 5 to 10 % of a training step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824}"

# On a GPU, torch's allocator grows its blocks instead of leaving holes between them, unless you have configured it
# yourself. (Not run on a GPU.)
if [[ -z ${PYTORCH_ALLOC_CONF+set} && -z ${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi

# NCCL prints its version once, and warnings. NCCL_DEBUG=INFO also shows the network that it uses. (Not tested here.)
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Set what differs between sites yourself, under Slurm in slurm/site.env: the network (NCCL_SOCKET_IFNAME,
# GLOO_SOCKET_IFNAME, NCCL_IB_HCA), caches on a shared file system (HF_HOME, PREFOPT_CACHE), and nodes without access
# to the hub (HF_HUB_OFFLINE=1).

# Prints the number of GPUs that may be used on this machine.
count_gpus() {
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
        echo 0
    elif [[ ${CUDA_VISIBLE_DEVICES:-} == -* ]]; then
        echo 0 # -1 hides all GPUs
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

# Prints the Python of a checkout ($1): PREFOPT_PYTHON, else its .venv, else the one on PATH.
choose_python() {
    if [[ -n ${PREFOPT_PYTHON:-} ]]; then
        echo "$PREFOPT_PYTHON"
    elif [[ -x $1/.venv/bin/python ]]; then
        echo "$1/.venv/bin/python"
    else
        echo python3
    fi
}

# Divides the cores of this machine, or of this job on it, equally among its ranks ($1).
share_cores() {
    if [[ -z ${OMP_NUM_THREADS:-} ]]; then
        local threads=$(($(nproc) / $1))
        export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    fi
}
