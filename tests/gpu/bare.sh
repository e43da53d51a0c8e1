#!/usr/bin/env bash
# Runs `make test-gpu` on a machine that has nothing installed but Python 3.12 and torch, and no network.
#
#   tests/gpu/bare.sh pack [--python 3.12] [FOLDER]   here: makes a folder of wheels (default runs/gpu-wheels) with a venv
#                                                     that has this package (.venv, or $PREFOPT_PYTHON)
#   tests/gpu/bare.sh run [FOLDER]                    there, in a copy of the checkout with the folder: installs the
#                                                     wheels beside the machine's torch and runs the parts
#
# Results: $OUT, or runs/gpu. PREFOPT_TEST_DEVICE=cpu runs the parts on the CPU at tiny sizes. The wheels are those that
# the parts import: without torch and CUDA, which the machine has, and without wandb, datasets, pandas, pyarrow and
# matplotlib, which no part uses.
set -euo pipefail
{
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=launch/env.sh
source launch/env.sh

LARGEST_MIB=60
# All that the packages in the first line import; versions are those of constraints.txt.
PACKAGES=(transformers accelerate pytest psutil
    annotated-doc annotated-types anyio click einops filelock fsspec h11 hf-xet hjson httpcore2 httpx2
    huggingface-hub idna iniconfig jinja2 markdown-it-py markupsafe mdurl msgpack ninja numpy packaging pluggy
    py-cpuinfo pydantic pydantic-core pygments pyyaml regex rich safetensors shellingham tokenizers tqdm truststore
    typer typing-extensions typing-inspection xxhash)

usage() {
    sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

pack() { # $1: the folder, $2: Python's version such as 3.12
    local python
    local -a platforms=()
    python=$(choose_python "$PWD")
    for platform in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 any; do
        platforms+=(--platform "$platform")
    done
    mkdir -p "$1"
    rm -f "$1"/*.whl
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$2" --implementation cp --abi "cp${2/./}" --abi abi3 --abi none "${platforms[@]}" \
        -c constraints.txt -d "$1" "${PACKAGES[@]}" pip
    # It has no wheel to download. This one compiles nothing: its operators are compiled on first use, and none is used.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        -c constraints.txt -w "$1" deepspeed
    local bytes
    bytes=$(cat "$1"/*.whl | wc -c)
    echo "$1: $(find "$1" -name '*.whl' | wc -l) wheels for Python $2, $((bytes / 1048576)) MiB"
    if ((bytes > LARGEST_MIB * 1048576)); then
        echo "tests/gpu/bare.sh: more than the $LARGEST_MIB MiB that may be carried" >&2
        exit 1
    fi
}

run() { # $1: the folder
    local machine=${PREFOPT_PYTHON:-python3} venv=runs/gpu-venv
    local -a wheels=("$1"/*.whl)
    [[ -e ${wheels[0]} ]] || { echo "tests/gpu/bare.sh: $1 has no wheels; make them with: $0 pack $1" >&2 && exit 2; }
    "$machine" -c 'import torch' || { echo "tests/gpu/bare.sh: $machine has no torch" >&2 && exit 2; }
    if [[ ! -e $venv/.installed ]]; then
        # Neither ensurepip nor pip need be there: pip runs from its own wheel.
        "$machine" -m venv --clear --system-site-packages --without-pip "$venv"
        # If that Python is in an environment itself, its torch is not among the system's packages.
        "$machine" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
            >"$(echo "$venv"/lib/python3*/site-packages)/machine.pth"
        local -a pip=("$1"/pip-*.whl)
        "$venv/bin/python" "${pip[0]}/pip" install --quiet --no-index --no-deps --ignore-installed "${wheels[@]}"
        touch "$venv/.installed"
    fi
    exec "$venv/bin/python" -m pytest -q -m gpu tests/gpu
}

command=${1:-}
shift || true
python_version=3.12
if [[ $command == pack && ${1:-} == --python ]]; then
    python_version=${2:?--python needs a version}
    shift 2
fi
folder=${1:-runs/gpu-wheels}
case $command in
    pack) pack "$folder" "$python_version" ;;
    run) run "$folder" ;;
    *) usage ;;
esac
exit
}
