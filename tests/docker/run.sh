#!/usr/bin/env bash
# Tests docker/ on a real Docker daemon: builds the image and trains the demo in it on two CPU ranks.
#
#   tests/docker/run.sh [--home FOLDER]
#
# Run it as root on Debian or Ubuntu, after make install (it uses .venv with Python 3.11). It installs docker.io and
# debootstrap if they are missing, starts a separate daemon with its own socket and data folder, builds a base image
# from Debian's packages and the image on top of it, and ends the daemon afterwards. It needs 5 GB in a temporary folder;
# --home FOLDER keeps them, and the next run takes half as long.
# shellcheck disable=SC2317,SC2329 # check, wait_for and a trap call the functions
set -euo pipefail
{
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$repository"
kept=""
case ${1:-} in
    --home) kept=${2:?--home needs a folder} ;;
    "") ;;
    *) echo "tests/docker/run.sh: unknown argument '$1'" >&2 && exit 2 ;;
esac
[[ $EUID == 0 ]] || { echo "tests/docker/run.sh: run this as root" >&2 && exit 2; }
# shellcheck source=launch/env.sh
source launch/env.sh
python=$(choose_python "$repository")
python=$(command -v "$python")
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "tests/docker/run.sh: $python must be a Python 3.11, as in the base image" >&2 && exit 2; }
if [[ -n $kept ]]; then
    mkdir -p "$kept"
    home=$(cd "$kept" && pwd -P)
else
    home=$(mktemp -d)
fi
chmod 755 "$home"

# shellcheck source=tests/docker/daemon.sh
source tests/docker/daemon.sh
jobs=$(mktemp -d) # folder of the runs
chmod 755 "$jobs"
finish() {
    local status=$?
    if ((status != 0)); then
        tail -n 15 "$jobs"/*.log >&2 2>/dev/null || true
        echo "tests/docker/run.sh: FAILED" >&2
    fi
    stop_daemon
    rm -rf "$jobs"
    [[ -n $kept ]] || rm -rf "$home"
}
trap finish EXIT

check() { # $1: what is checked, the others: a command that must succeed
    local what=$1
    shift
    "$@" || { echo "FAILED: $what ($*)" >&2 && exit 1; }
    echo "$what"
}
is() { [[ $1 == "$2" ]]; }
missing() { [[ ! -e $1 ]]; }
committed() { compgen -G "$1/checkpoints/step-*" >/dev/null; }
at_step() { [[ -e $1/metrics.jsonl ]] && grep -q "\"step\": $2," "$1/metrics.jsonl"; }
wait_for() { # $1: seconds, the others: a command that must succeed within that time
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || { echo "timed out while waiting for: $*" >&2 && exit 1; }
        sleep 0.5
    done
}
status_of() { # $1: container; waits for its end and prints its exit status
    docker wait "$1" 2>/dev/null
}
start() { # $1: name, the others: arguments of docker run; without --rm, so that logs and status can be read later
    local name=$1
    shift
    docker rm --force "$name" >/dev/null 2>&1 || true # left by an earlier test in the same --home
    docker run -d --name "$name" --network=host --ipc=host --stop-timeout 600 -e WANDB_API_KEY -e HF_TOKEN \
        -e OMP_NUM_THREADS=1 "$@" >/dev/null
}
refused() { # $1: words of the message, the others: arguments of docker run; succeeds if it ends with status 2
    local words=$1 output status=0
    shift
    output=$(docker run --rm --network=host "$@" 2>&1) || status=$?
    [[ $status == 2 && $output == *"$words"* ]] || { echo "$output (status $status)" >&2 && return 1; }
}
found() { # $1: text, the others: a command; succeeds if the command prints the text
    local text=$1
    shift
    [[ $("$@" 2>&1 | grep -acF -- "$text") != 0 ]]
}
not_found() { ! found "$@"; }

secret=planted-$RANDOM-$RANDOM-$RANDOM
export WANDB_API_KEY=wandb-$secret HF_TOKEN=hf_$secret
began=$SECONDS
install_docker
start_daemon
make_base prefopt-test-base
serve_wheels "pip-$secret"
echo "a daemon, a base and wheels after $((SECONDS - began)) s"

# The image. The build context is a copy of the repository, with secrets in files that a clone may contain.

rm -rf "$jobs/context"
mkdir "$jobs/context"
git ls-files -z | tar --null -T - -cf - | tar -C "$jobs/context" -xf -
echo "TOKEN=$secret" | tee "$jobs/context/.env" "$jobs/context/launch/.env" "$jobs/context/slurm/site.env" >/dev/null
build() { # $1: the log
    docker build --progress=plain --network=host --build-arg BASE=prefopt-test-base --build-arg REVISION=tested \
        --secret "id=pip.conf,src=$home/pip.conf" -f "$jobs/context/docker/Dockerfile" -t prefopt "$jobs/context" \
        >"$1" 2>&1
}
began=$SECONDS
check "the image builds" build "$jobs/build.log"
echo "in $((SECONDS - began)) s"
echo "# another line" >>"$jobs/context/prefopt_dist/__init__.py"
check "and again after a change of the code" build "$jobs/rebuild.log"
check "without installing anything" grep -qzP '(?s)#(\d+) [^\n]*install_packages\.sh [^\n]*\n(#[^\n]*\n)*?#\1 CACHED' \
    "$jobs/rebuild.log"
inspect() { docker image inspect --format "$1" prefopt; }
check "not as root" is "$(inspect '{{.Config.User}}')" 10001:10001
check "with its revision as a label" \
    is "$(inspect '{{index .Config.Labels "org.opencontainers.image.revision"}}')" tested
check "and its base" is "$(inspect '{{index .Config.Labels "org.opencontainers.image.base.name"}}')" prefopt-test-base

# Mistakes

check "no arguments: refused" refused "STAGE and RUN.yaml are missing" prefopt
check "no such run: refused" refused "nowhere.yaml" prefopt train nowhere.yaml
check "nothing to write to: refused" refused "give --tmpfs /tmp" --read-only prefopt train run.yaml
check "a wrong machine: refused" refused "PREFOPT_NODE: got '2'" -e PREFOPT_NODES=2 -e PREFOPT_NODE=2 prefopt train r.yaml
check "another command runs unchanged" docker run --rm --network=host prefopt python -c 'import prefopt_dist'

# The demo: stopped during its second training, completed by another user on a read-only root

mkdir "$jobs/runs"
chown 10001:10001 "$jobs/runs"
demo=(-v "$jobs/runs:/job/runs")
start first "${demo[@]}" prefopt demo
wait_for 400 at_step "$jobs/runs/demo/dpo" 10
began=$SECONDS
docker stop first >/dev/null
docker logs first >"$jobs/first.log" 2>&1
check "docker stop: status 75" is "$(status_of first)" 75
check "docker stop: STOPPED" test -e "$jobs/runs/demo/dpo/STOPPED"
check "docker stop: a committed checkpoint" committed "$jobs/runs/demo/dpo"
check "docker stop: STOP is gone" missing "$jobs/runs/demo/dpo/STOP"
echo "$(<"$jobs/runs/demo/dpo/STOPPED"), in $((SECONDS - began)) s"
chown -R 4242:4343 "$jobs/runs"
start second "${demo[@]}" --user 4242:4343 --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    prefopt demo
ended=$(status_of second)
docker logs second >"$jobs/second.log" 2>&1
check "a second docker run completes the run, as another user, on a read-only root" is "$ended" 0
check "DONE" test -e "$jobs/runs/demo/dpo/DONE"
check "on two ranks" grep -q '"world_size": 2' "$jobs/runs/demo/dpo/run.json"
check "it resumed" grep -q "resuming from step-" "$jobs/second.log"
sed -n '/ Answers to /,/reward margin/p' "$jobs/second.log"

# Two nodes on one machine: each container is a node with one rank

# They have equal host names and, often, equal process ids, and launch/node.sh must prevent that torchrun takes them for
# one node.
for node in 0 1; do
    start "node$node" -v "$jobs/runs:/job/runs" --user 4242:4343 --workdir /job -e PREFOPT_NODES=2 \
        -e "PREFOPT_NODE=$node" -e PREFOPT_HEAD=127.0.0.1:29411 prefopt \
        -n 1 train /opt/prefopt/launch/recipes/demo.yaml run.dir=runs/nodes train.epochs=50
done
wait_for 200 at_step "$jobs/runs/nodes" 5
docker stop node1 >/dev/null
for node in 0 1; do
    ended=$(status_of "node$node")
    docker logs "node$node" >"$jobs/node$node.log" 2>&1
    check "two nodes: docker stop of one ends both, node $node with 75" is "$ended" 75
done
check "two nodes: a committed checkpoint" committed "$jobs/runs/nodes"
check "two nodes: two ranks" grep -q '"world_size": 2' "$jobs/runs/nodes/run.json"

# Secrets. The first check shows that the search finds text that is there.

check "a line of the code is in the layers" found "so that the build of an image with incompatible parts fails" docker save prefopt
check "no secret in the layers" not_found "$secret" docker save prefopt
check "no secret in the image's configuration" not_found "$secret" docker image inspect prefopt
check "no secret in its history" not_found "$secret" docker history --no-trunc prefopt
check "no secret in the logs" not_found "$secret" cat "$jobs"/*.log
check "no secret in the run folders" not_found "$secret" \
    find "$jobs/runs" -type f -exec cat {} +
echo "tests/docker/run.sh: passed"
exit
}
