# shellcheck shell=bash
# Common part of the batch scripts, which source it: one srun task per node, signals, requeue, exit status.
#
# After USR1 (the time limit is near) and TERM (scancel) it creates RUN/STOP; the ranks agree to stop, commit a
# checkpoint and end. After USR1 the job requeues itself under its own id, at most MAX_RESTARTS times.
# Exit status: 0 done, 75 stopped on request, 2 the user's mistake, 1 a crash.

fail() { # $1: status, $2: what is wrong
    echo "slurm: $2" >&2
    exit "$1"
}

port_is_free() { # $1: port on this node, which is the head of the job
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Prints a free port. It depends on the job's id, so that jobs on one node get different ports, and it is below the
# range of ports that Linux assigns to outgoing connections.
choose_port() { # $1: a number that identifies this start of the job
    local try port
    for try in {0..19}; do
        port=$((20000 + ($1 + 601 * try) % 12000))
        if port_is_free "$port"; then
            echo "$port"
            return
        fi
    done
    return 1
}

# Prints the address at which the other nodes reach the first one.
head_address() { # $@: the nodes' names
    local -a names=("$@")
    ((${#names[@]} > 0)) || return 1
    if [[ -n ${PREFOPT_HEAD_SUFFIX:-} ]]; then
        echo "${names[0]}$PREFOPT_HEAD_SUFFIX"
        return
    fi
    local address
    address=$(scontrol show node "${names[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-${names[0]}}"
}

# Sets `start`, the beginning of the command of a job step: srun, and the container if there is one.
build_start() { # $@: more options of srun
    start=(srun --kill-on-bad-exit=1 --export=ALL "$@" "${PREFOPT_SRUN[@]}")
    # Since Slurm 22.05 srun does not inherit this from the job.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || start+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    local -a mounts=("$WORK_DIR:$WORK_DIR" "${submission%/*/*}:${submission%/*/*}")
    [[ -z ${PREFOPT_CACHE:-} ]] || mounts+=("$PREFOPT_CACHE:$PREFOPT_CACHE")
    mounts+=("${PREFOPT_MOUNTS[@]}")
    local joined
    joined=$(IFS=,; echo "${mounts[*]}")
    case $PREFOPT_RUNTIME in
        bare) ;;
        pyxis)
            [[ -n ${PREFOPT_IMAGE:-} ]] || fail 2 "PREFOPT_IMAGE is not set; PREFOPT_RUNTIME=pyxis needs an image; set it in site.env"
            start+=("--container-image=$PREFOPT_IMAGE" "--container-mounts=$joined" "--container-workdir=$WORK_DIR")
            ;;
        apptainer)
            [[ -n ${PREFOPT_IMAGE:-} ]] || fail 2 "PREFOPT_IMAGE is not set; PREFOPT_RUNTIME=apptainer needs an image; set it in site.env"
            start+=(apptainer exec "${PREFOPT_APPTAINER[@]}" --bind "$joined" --pwd "$WORK_DIR" "$PREFOPT_IMAGE")
            ;;
        *) fail 2 "PREFOPT_RUNTIME: got '$PREFOPT_RUNTIME', must be bare, pyxis or apptainer; correct site.env" ;;
    esac
}

# Checks the nodes before the ranks start: what they lack, where they differ, how fast their all-reduce is. It takes less
# than 90 s.
check_nodes() { # $1: the head, $2: a number from which the port is chosen, the others: the nodes' names
    local head=$1 names port status=0 job
    local -a plan=()
    [[ ! -e $submission/plan.json ]] || plan=(--plan "$submission/plan.json")
    port=$(choose_port "$2") || fail 1 "no free port on $head: all of 20 ports between 20000 and 31999 are in use"
    shift 2
    names=$(IFS=, && echo "$*")
    build_start "--nodes=$SLURM_NNODES" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1
    "${start[@]}" "$submission/code/launch/check_node.sh" --hosts "$names" --ranks "$RANKS" --head "$head:$port" \
        --folder "$run_dir" "${plan[@]}" &
    job=$!
    while kill -0 "$job" 2>/dev/null; do # the wait may have been ended by a signal, not by the end of the step
        status=0
        wait "$job" || status=$?
    done
    [[ $status != 2 || -n $asked ]] || fail 2 "the nodes could not be checked, for the reason above; correct site.env"
    ((status == 0)) || [[ -n $asked ]] || requeue_if_preempted || fail 1 "the check of the nodes failed, see the lines above; exclude the nodes that are named (--exclude in PREFOPT_SBATCH), or set PREFOPT_CHECK_NODES=no"
}

on_signal() { # $1: USR1 or TERM
    echo "slurm: $1 at $(date +%T)" >&2
    # TERM overrides USR1: a user who cancels the job near its time limit does not want it to be requeued.
    [[ $asked == TERM ]] || asked=$1
}

stopped() { # succeeds if the ranks have stopped on request since this start
    ls -A -- "$run_dir" >/dev/null 2>&1 || return 1 # makes a network file system refresh its cache
    [[ -e $run_dir/STOPPED && $run_dir/STOPPED -nt $status_file ]]
}

run_job() { # $1: stage, $2: the folder that slurm/submit wrote
    asked="" # the signal received, if any; set before anything else, so that no signal is lost
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    stage=$1 submission=$2
    PREFOPT_SRUN=() PREFOPT_MOUNTS=() PREFOPT_APPTAINER=() PREFOPT_RUNTIME=bare
    # shellcheck disable=SC1091
    source "$submission/job.env"
    set -a
    # shellcheck disable=SC1091
    source "$submission/site.env"
    set +a
    local name
    for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NNODES; do
        [[ -n ${!name:-} ]] || fail 2 "$name is not set; start this with slurm/submit, not by hand"
    done
    export PREFOPT_PYTHON=$JOB_PYTHON
    export PYTHONSAFEPATH=1 # else a clone in the working directory would take precedence over the copy of the code

    local restart=${SLURM_RESTART_COUNT:-0} point=${SLURM_ARRAY_TASK_ID:-0}
    run_dir=${RUN_DIRS[point]}
    local logs="$submission/logs/$stage-$SLURM_JOB_ID.$restart"
    cd "$WORK_DIR" || fail 2 "the folder $WORK_DIR, in which the job was submitted, does not exist on $(hostname)"
    if declare -F site_setup >/dev/null; then
        set +u # scripts of modules and environments often read unset variables
        site_setup
        set -u
    fi

    status_file=$logs.status
    : >"$status_file"
    export PREFOPT_STATUS_FILE=$status_file
    local code="$submission/code" config="$submission/run-$point.yaml"
    local -a start command
    if [[ $stage == export ]]; then
        build_start --nodes=1 --ntasks=1 "--output=$logs.txt"
        command=("$code/launch/run.sh" export "$config")
    else
        local head port
        local -a names
        [[ $GPUS == 0 ]] || export PREFOPT_WANT_GPUS=1 # a node without GPUs must fail instead of using its CPU
        mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        head=$(head_address "${names[@]}") || fail 1 "scontrol found no node in SLURM_JOB_NODELIST='$SLURM_JOB_NODELIST'"
        port=$(choose_port "$((SLURM_JOB_ID + 37 * restart))") ||
            fail 1 "no free port on $head: all of 20 ports between 20000 and 31999 are in use"
        if [[ ${PREFOPT_CHECK_NODES:-yes} == yes && -z $asked ]]; then
            check_nodes "$head" "$((SLURM_JOB_ID + 37 * restart + 7))" "${names[@]}"
        fi
        build_start "--nodes=$SLURM_NNODES" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1 "--output=$logs-node%n.txt"
        # launch/node.sh reads SLURM_NODEID inside the task; here it would be that of the batch shell for every node.
        command=("$code/launch/node.sh" --nodes "$SLURM_NNODES" --ranks "$RANKS" --head "$head:$port"
            --job "prefopt-$SLURM_JOB_ID.$restart" "$stage" "$config")
    fi
    echo "slurm: $stage, job $SLURM_JOB_ID, start $restart on $SLURM_JOB_NODELIST, run folder $run_dir"
    echo "slurm: output of the nodes in $logs*"

    local job status=0 made_stop=no began=no
    if [[ -z $asked ]]; then
        "${start[@]}" "${command[@]}" &
        job=$!
        began=yes
        # As in launch/run.sh: traps run only between commands, and ranks that are starting remove a stale STOP.
        while kill -0 "$job" 2>/dev/null; do
            if [[ -n $asked && $stage != export && -d $run_dir && ! -e $run_dir/STOP ]]; then
                touch "$run_dir/STOP" && made_stop=yes
            fi
            sleep 0.5 || true # a signal to the whole job also ends the sleep
        done
        wait "$job" || status=$?
        [[ $made_stop == no ]] || rm -f "$run_dir/STOP"
    fi
    conclude "$stage" "$status" "$restart" "$began"
}

# Prints the job's name for scontrol. A task of an array is named by array and index, since the id of the last task is
# also that of the whole array.
job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

job_field() { # $1: name of a field that scontrol shows for this job
    env -u SLURM_TIME_FORMAT scontrol show job "$(job_name)" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | head -n 1
}

# Succeeds if this start was preempted by a job of higher priority. Slurm sends TERM to the ranks and would requeue the
# job after the partition's GraceTime. But the ranks stop earlier, and Slurm does not requeue a job that has ended, so
# the job requeues itself.
preempted() {
    local at since
    at=$(job_field PreemptTime) && since=$(job_field StartTime) || return 1
    [[ $at == [0-9]* && ! $at < $since ]]
}

# Succeeds if Slurm has requeued the job itself. It does not wait for the end of the job after a preemption without
# GraceTime or after an operator's requeue.
requeued_by_slurm() {
    local restarts
    restarts=$(job_field Restarts) || return 1
    [[ $restarts =~ ^[0-9]+$ ]] && ((restarts > ${SLURM_RESTART_COUNT:-0}))
}

requeue() { # under the job's own id
    echo "slurm: requeues the job"
    trap - TERM USR1 # the requeue ends this shell by TERM
    if ! scontrol requeue "$(job_name)"; then
        requeued_by_slurm || fail 75 "the requeue failed; submit again to resume"
    fi
    sleep 60 # if this shell ended by itself, Slurm could take the job as finished
    exit 75
}

# Ends this start if the job is requeued after a preemption. Returns 1 if the job was cancelled or ended by itself.
requeue_if_preempted() {
    if requeued_by_slurm; then
        echo "slurm: Slurm has requeued the job"
        exit 75
    fi
    [[ $asked != TERM ]] && preempted || return 1
    requeue # preemptions do not count against MAX_RESTARTS, since the job does not cause them
}

# Ends the job with its exit status. The status that the ranks wrote counts, not srun's, which is 143 after some crashes
# and after some signals.
conclude() { # $1: stage, $2: srun's status, $3: restarts so far, $4: whether ranks were started
    local ranks_status=""
    read -r ranks_status <"$status_file" || true
    if [[ $ranks_status == 2 ]]; then
        tail -n +2 "$status_file" >&2
        exit 2
    fi
    if [[ $1 == export ]]; then
        [[ $4 == yes ]] || requeue_if_preempted || exit 75
        (($2 == 0 || $2 == 2)) || requeue_if_preempted || fail 1 "the export failed (status $2); see the logs"
        exit "$2"
    fi
    if [[ $4 == no ]] || stopped; then
        [[ $4 == no ]] || echo "slurm: $(<"$run_dir/STOPPED")"
        requeue_if_preempted || true
        if [[ $asked != USR1 ]]; then
            echo "slurm: stopped on request; submit again to resume"
            exit 75
        fi
        # The time limit (the partition's if submit got none) is hardly longer than the grace period, so every start
        # would end like this.
        [[ $4 == yes ]] || fail 2 "USR1 came ${SECONDS} s after the start, before there were any ranks; give more --time, or less --grace, and submit again"
        if (($3 >= MAX_RESTARTS)); then
            echo "slurm: restarted $3 times, and --max-restarts is $MAX_RESTARTS; submit again to resume" >&2
            exit 75
        fi
        requeue
    fi
    (($2 == 0)) || requeue_if_preempted || fail 1 "$1 failed (status of srun: $2); see the logs of the nodes"
    exit 0
}
