#!/usr/bin/env bash
# Installs Python with venv, and the packages named, if the image does not have them: install_python.sh [PACKAGE ...].
set -euo pipefail
(($# > 0)) || ! python3 -c 'import ensurepip, ssl, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
    exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends python3 python3-venv ca-certificates "$@"
rm -rf /var/lib/apt/lists/*
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
    echo "BASE: the image has $(python3 -V); take one with 3.11 or 3.12" >&2
    exit 1
}
