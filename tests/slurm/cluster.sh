# shellcheck shell=bash
# Starts a Slurm cluster of two nodes on this machine, for tests/slurm/run.sh. Run it as root on Debian or Ubuntu.

: "${home:?a folder for the cluster}" "${python:?}"
children=()

install_slurm() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    echo "installing slurm-wlm and munge"
    apt-get update -q >"$home/install.log" 2>&1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge >>"$home/install.log" 2>&1
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_cluster() { # in $home
    local node
    mkdir -p "$home/state" "$home/munge"
    dd if=/dev/urandom of="$home/munge/key" bs=1024 count=1 status=none
    chmod 700 "$home/munge"
    chmod 400 "$home/munge/key"
    chown -R munge:munge "$home/munge"
    # All users must be able to enter the socket's folder; the other files are private to munge.
    install -d -o munge -g munge -m 755 "$home/munge-socket"
    runuser -u munge -- /usr/sbin/munged --foreground --force --key-file="$home/munge/key" \
        --socket="$home/munge-socket/socket" --pid-file="$home/munge/pid" --log-file="$home/munge/log" \
        --seed-file="$home/munge/seed" >"$home/munged.out" 2>&1 &
    children+=($!)
    cat >"$home/slurm.conf" <<CONF
ClusterName=two
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge-socket/socket
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool-%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
KillWait=60
MinJobAge=3600
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
CONF
    export SLURM_CONF=$home/slurm.conf
    sleep 1
    slurmctld -D >"$home/slurmctld.out" 2>&1 &
    children+=($!)
    sleep 1
    for node in n1 n2; do
        slurmd -D -N "$node" >"$home/slurmd-$node.out" 2>&1 &
        children+=($!)
    done
    for _ in {1..60}; do
        [[ $(sinfo -h -t idle -o %D 2>/dev/null) != 2 ]] || return 0
        sleep 0.5
    done
    echo "the two nodes did not start:" >&2
    tail -n 5 "$home"/*.log "$home"/*.out >&2
    return 1
}

stop_cluster() { # ends the jobs, and what start_cluster started
    local ids pid
    if [[ -n ${SLURM_CONF:-} ]]; then
        ids=$(squeue -h -o %i 2>/dev/null | tr '\n' ' ') || ids=""
        # shellcheck disable=SC2086 # one word a job
        [[ -z $ids ]] || scancel $ids 2>/dev/null || true
        # shellcheck disable=SC2086
        [[ -z $ids ]] || scancel --full --signal=KILL $ids 2>/dev/null || true
        for _ in {1..40}; do # else their last processes would outlive the daemons
            [[ -n $(squeue -h 2>/dev/null) ]] || break
            sleep 0.5
        done
    fi
    for ((pid = ${#children[@]} - 1; pid >= 0; pid--)); do
        kill "${children[pid]}" 2>/dev/null || true
    done
    # A slurmd may wait for a slurmctld that has ended.
    (sleep 15 && kill -KILL "${children[@]}") >/dev/null 2>&1 &
    wait "${children[@]}" 2>/dev/null || true
    kill "$!" 2>/dev/null || true
}
