# shellcheck shell=bash
# Starts a separate Docker daemon and makes a substitute for the base image, for tests/docker/run.sh. Run it as root on
# Debian or Ubuntu.

: "${home:?a folder for the daemon and the images}" "${python:?}"
children=()

install_docker() {
    [[ -x /usr/sbin/dockerd || -x /usr/bin/dockerd ]] && command -v debootstrap >/dev/null && return
    echo "installing docker.io and debootstrap"
    apt-get update -q >"$home/install.log" 2>&1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q docker.io debootstrap >>"$home/install.log" 2>&1
}

start_daemon() { # without a bridge and firewall rules; containers use the machine's network
    export DOCKER_HOST=unix://$home/docker.sock DOCKER_CONFIG=$home/config DOCKER_BUILDKIT=1
    PATH=/usr/bin:/usr/sbin:$PATH # use the client of the same package as the daemon
    dockerd --data-root "$home/data" --exec-root "$home/exec" --pidfile "$home/docker.pid" \
        --iptables=false --bridge=none -H "$DOCKER_HOST" >"$home/dockerd.log" 2>&1 &
    children+=($!)
    for _ in {1..60}; do
        if docker info >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    echo "dockerd did not start:" >&2
    tail -n 5 "$home/dockerd.log" >&2
    return 1
}

# Makes a Debian image with Python 3.11 from the mirror that apt uses here, since there may be no image registry.
make_base() { # $1: its name
    local mirror
    docker image inspect "$1" >/dev/null 2>&1 && return
    mirror=$(awk '$1 == "URIs:" { print $2; exit } $1 == "deb" && $2 ~ /^http/ { print $2; exit }' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null) || true
    [[ -d $home/rootfs/usr ]] ||
        debootstrap --variant=minbase \
            --include=python3,python3-venv,ca-certificates,libibverbs1,ibverbs-providers,librdmacm1 \
            bookworm "$home/rootfs" \
            ${mirror:+"$mirror"} >"$home/debootstrap.log" 2>&1
    tar -C "$home/rootfs" -c . | docker import - "$1" >/dev/null
}

# Downloads the wheels of constraints.txt with this machine's pip and serves them behind a password. The build of the
# image has no other package index.
serve_wheels() { # $1: the password; writes $home/pip.conf
    local port=""
    "$python" docker/needed.py pyproject.toml >"$home/needed.txt"
    "$python" -m pip download --quiet --disable-pip-version-check -c constraints.txt -d "$home/wheels" \
        -r "$home/needed.txt" setuptools wheel ninja >"$home/download.log" 2>&1
    "$python" tests/docker/serve_wheels.py "$home/wheels" "$1" >"$home/port" 2>"$home/serve.log" &
    children+=($!)
    until [[ -n $port ]]; do
        sleep 0.2
        kill -0 "${children[-1]}"
        port=$(<"$home/port")
    done
    printf '[global]\nno-index = true\nfind-links = http://me:%s@127.0.0.1:%s/\n' "$1" "$port" >"$home/pip.conf"
}

stop_daemon() { # ends the containers and the daemon
    local ids pid
    if [[ -n ${DOCKER_HOST:-} ]]; then
        ids=$(docker ps -q 2>/dev/null) || ids=""
        # shellcheck disable=SC2086 # one word per container
        [[ -z $ids ]] || docker kill $ids >/dev/null 2>&1 || true
    fi
    for ((pid = ${#children[@]} - 1; pid >= 0; pid--)); do
        kill "${children[pid]}" 2>/dev/null || true
    done
    wait "${children[@]}" 2>/dev/null || true
    # The daemon leaves its name space mounted, and the folder could not be removed.
    findmnt --raw --noheadings --output TARGET | { grep "^$home/" || true; } | sort -r | xargs --no-run-if-empty umount --lazy || true
}
