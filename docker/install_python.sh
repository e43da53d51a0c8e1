#!/usr/bin/env bash
# Installs Python with venv if the image does not have it, and the packages named: install_python.sh [PACKAGE ...].
set -euo pipefail
packages=()
for name in "$@"; do
    dpkg -s "$name" >/dev/null 2>&1 || packages+=("$name")
done
python3 -c 'import ensurepip, ssl, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
    packages+=(python3 python3-venv ca-certificates)
((${#packages[@]} > 0)) || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends "${packages[@]}"
rm -rf /var/lib/apt/lists/*
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
    echo "BASE: the image has $(python3 -V); take one with 3.11 or 3.12" >&2
    exit 1
}
