# shellcheck shell=bash
# The environment of every stage, sourced by launch/run.sh. A value that you have set yourself wins.

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
