#!/usr/bin/env bash
# Installs the packages of pyproject.toml in the versions of constraints.txt: install_packages.sh VENV [OPERATOR ...].
#
# DeepSpeed comes last, since its operators are compiled against the installed torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${1:?the folder of the environment is missing}
shift
for operator in "$@"; do
    [[ $operator =~ ^[A-Z_]+$ ]] || { echo "OPERATORS: got '$operator', must be the part of a name DS_BUILD_... after DS_BUILD_" >&2 && exit 2; }
    export "DS_BUILD_$operator=1"
done
python3 -m venv "$venv"
install=("$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt)
"$venv/bin/python" needed.py pyproject.toml >needed.txt
"${install[@]}" setuptools wheel ninja
grep -v '^deepspeed' needed.txt >others.txt
"${install[@]}" -r others.txt
# With an accelerator named, an operator that cannot be compiled ends the build instead of being left out.
if command -v nvcc >/dev/null; then
    export DS_ACCELERATOR=cuda
else
    export DS_ACCELERATOR=cpu
fi
"${install[@]}" --no-build-isolation -r needed.txt
