#!/usr/bin/env bash
# Entry point of the image: runs a stage through launch/run.sh, `demo`, or any other command unchanged.
#
#   docker run ... prefopt [-n N] STAGE RUN.yaml [section.key=value ...]
#
# launch/run.sh replaces this script as process 1, so that it receives the container's TERM (docker stop) and reaps
# orphaned processes.
set -euo pipefail
{
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch=${TMPDIR:-/tmp}
if [[ ! -w $scratch ]]; then
    echo "docker/entrypoint.sh: $scratch is not writable; with --read-only, give --tmpfs $scratch too" >&2
    exit 2
fi
case ${1:-} in
    "" | -* | inspect | plan | reference | train | evaluate | generate | rounds | report | export)
        exec "$root/launch/run.sh" "$@"
        ;;
    demo) PYTHONPATH=$root exec "$PREFOPT_PYTHON" -m prefopt_dist.demo "${@:2}" ;;
    *) PYTHONPATH=$root exec "$@" ;;
esac
}
