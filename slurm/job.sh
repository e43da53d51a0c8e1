# shellcheck shell=bash
# What the three batch scripts do, sourced by them: one srun task a node, the signals, the requeue, the status.
#
# USR1 (the time limit comes near) and TERM (scancel) both make RUN/STOP; the ranks agree, commit a checkpoint and
# end. After USR1 the job puts itself back into the queue under its own id, at most MAX_RESTARTS times.
# Exit status: 0 done, 75 stopped on request, 2 the user's mistake, 1 a crash.

fail() { # $1: status, $2: what is wrong
    echo "slurm: $2" >&2
    exit "$1"
}

port_is_free() { # $1: port; on this node, the head of the job
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# A port by the job's id, so that jobs on one node do not meet; below the range that Linux gives to connections.
choose_port() { # $1: a number of this start
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

# Where the other nodes reach the first one.
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

# Fills `start`, the one command that begins a step of this job: srun, and the container where there is one.
build_start() { # $@: further options of srun
    start=(srun --kill-on-bad-exit=1 --export=ALL "$@" "${PREFOPT_SRUN[@]}")
    # Since 22.05 srun does not take this from the job.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || start+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    local -a mounts=("$WORK_DIR:$WORK_DIR" "${submission%/*/*}:${submission%/*/*}")
    [[ -z ${PREFOPT_CACHE:-} ]] || mounts+=("$PREFOPT_CACHE:$PREFOPT_CACHE")
    mounts+=("${PREFOPT_MOUNTS[@]}")
    local joined
    joined=$(IFS=,; echo "${mounts[*]}")
    case $PREFOPT_RUNTIME in
        bare) ;;
        pyxis)
            [[ -n ${PREFOPT_IMAGE:-} ]] || fail 2 "PREFOPT_IMAGE is not set; site.env must name an image for pyxis"
            start+=("--container-image=$PREFOPT_IMAGE" "--container-mounts=$joined" "--container-workdir=$WORK_DIR")
            ;;
        apptainer)
            [[ -n ${PREFOPT_IMAGE:-} ]] || fail 2 "PREFOPT_IMAGE is not set; site.env must name an image for apptainer"
            start+=(apptainer exec "${PREFOPT_APPTAINER[@]}" --bind "$joined" --pwd "$WORK_DIR" "$PREFOPT_IMAGE")
            ;;
        *) fail 2 "PREFOPT_RUNTIME is '$PREFOPT_RUNTIME', must be bare, pyxis or apptainer; mend site.env" ;;
    esac
}

# The machines before the ranks: what they lack, where they differ, how fast they reduce; less than 90 s.
check_nodes() { # $1: the head, $2: a number for the port, the others: the nodes' names
    local head=$1 names port status=0 job
    port=$(choose_port "$2") || fail 1 "no free port on $head among 20 of 20000-31999"
    shift 2
    names=$(IFS=, && echo "$*")
    build_start "--nodes=$SLURM_NNODES" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1
    "${start[@]}" "$submission/code/launch/check_node.sh" --hosts "$names" --ranks "$RANKS" --head "$head:$port" \
        --folder "$run_dir" &
    job=$!
    while kill -0 "$job" 2>/dev/null; do # a signal ends a wait, not the step
        status=0
        wait "$job" || status=$?
    done
    [[ $status != 2 || -n $asked ]] || fail 2 "the nodes could not be checked, see above; mend site.env"
    ((status == 0)) || [[ -n $asked ]] || comes_back || fail 1 "the nodes are not fit for the job; exclude what is named (--exclude in PREFOPT_SBATCH), or PREFOPT_CHECK_NODES=no"
}

on_signal() { # $1: USR1 or TERM
    echo "slurm: $1 at $(date +%T)" >&2
    # TERM is the stronger: who cancels while the time runs out does not want the job back.
    [[ $asked == TERM ]] || asked=$1
}

stopped() { # since this start
    ls -A -- "$run_dir" >/dev/null 2>&1 || return 1 # a network file system then looks again
    [[ -e $run_dir/STOPPED && $run_dir/STOPPED -nt $status_file ]]
}

run_job() { # $1: stage, $2: the folder that slurm/submit wrote
    asked="" # first of all: from here on no signal is lost
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
    export PYTHONSAFEPATH=1 # or a clone in the working directory would come before the copy of the code

    local restart=${SLURM_RESTART_COUNT:-0} point=${SLURM_ARRAY_TASK_ID:-0}
    run_dir=${RUN_DIRS[point]}
    local logs="$submission/logs/$stage-$SLURM_JOB_ID.$restart"
    cd "$WORK_DIR" || fail 2 "$WORK_DIR, where it was submitted, is not there on $(hostname)"
    if declare -F site_setup >/dev/null; then
        set +u # modules and environments of sites read variables that may be unset
        site_setup
        set -u
    fi

    status_file=$logs.status
    : >"$status_file"
    export PREFOPT_STATUS_FILE=$status_file
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$logs-collectives-rank-}
    local code="$submission/code" config="$submission/run-$point.yaml"
    local -a start command
    if [[ $stage == export ]]; then
        build_start --nodes=1 --ntasks=1 "--output=$logs.txt"
        command=("$code/launch/run.sh" export "$config")
    else
        local head port
        local -a names
        [[ $GPUS == 0 ]] || export PREFOPT_WANT_GPUS=1 # no node may compute on its CPU instead
        mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        head=$(head_address "${names[@]}") || fail 1 "scontrol names no node in '$SLURM_JOB_NODELIST'"
        port=$(choose_port "$((SLURM_JOB_ID + 37 * restart))") || fail 1 "no free port on $head among 20 of 20000-31999"
        if [[ ${PREFOPT_CHECK_NODES:-yes} == yes && -z $asked ]]; then
            check_nodes "$head" "$((SLURM_JOB_ID + 37 * restart + 7))" "${names[@]}"
        fi
        build_start "--nodes=$SLURM_NNODES" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1 "--output=$logs-node%n.txt"
        # The rank of a node is read inside the task; here it would be that of the batch shell on every node.
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
        # As in launch/run.sh: traps run between commands only, and ranks that still start remove a stale STOP.
        while kill -0 "$job" 2>/dev/null; do
            if [[ -n $asked && $stage != export && -d $run_dir && ! -e $run_dir/STOP ]]; then
                touch "$run_dir/STOP" && made_stop=yes
            fi
            sleep 0.5 || true # a signal to the whole job ends the sleep too
        done
        wait "$job" || status=$?
        [[ $made_stop == no ]] || rm -f "$run_dir/STOP"
    fi
    conclude "$stage" "$status" "$restart" "$began"
}

# For scontrol: the id of an array's last task is the whole array's as well.
job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

shown() { # $1: what scontrol shows of this job
    env -u SLURM_TIME_FORMAT scontrol show job "$(job_name)" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | head -n 1
}

# In this start, for a job of more priority. Slurm sends TERM to the ranks and would put the job back at the end of the
# partition's GraceTime; but they stop earlier, and a job that has ended is not put back. So it does that itself.
preempted() {
    local at since
    at=$(shown PreemptTime) && since=$(shown StartTime) || return 1
    [[ $at == [0-9]* && ! $at < $since ]]
}

# By Slurm itself, which does not wait for the end of the job: a preemption without GraceTime, an operator's requeue.
is_back() {
    local restarts
    restarts=$(shown Restarts) || return 1
    [[ $restarts =~ ^[0-9]+$ ]] && ((restarts > ${SLURM_RESTART_COUNT:-0}))
}

put_back() { # into the queue, under its own id
    echo "slurm: back into the queue"
    trap - TERM USR1 # the requeue ends this shell by TERM
    if ! scontrol requeue "$(job_name)"; then
        is_back || fail 75 "the requeue failed; submit again to go on"
    fi
    sleep 60 # to end by itself could look like the job's end
    exit 75
}

# Fails where somebody has cancelled the job, or nobody but the job itself has ended it.
comes_back() {
    if is_back; then
        echo "slurm: Slurm has put the job back into the queue"
        exit 75
    fi
    [[ $asked != TERM ]] && preempted || return 1
    put_back # as often as that happens: it is not this job's doing
}

# The ranks' word counts, not srun's status: that is 143 for a crash here and a signal there.
conclude() { # $1: stage, $2: srun's status, $3: restarts so far, $4: whether there were ranks at all
    local said=""
    read -r said <"$status_file" || true
    if [[ $said == 2 ]]; then
        tail -n +2 "$status_file" >&2
        exit 2
    fi
    if [[ $1 == export ]]; then
        [[ $4 == yes ]] || comes_back || exit 75
        (($2 == 0 || $2 == 2)) || comes_back || fail 1 "export failed with $2; see the logs"
        exit "$2"
    fi
    if [[ $4 == no ]] || stopped; then
        [[ $4 == no ]] || echo "slurm: $(<"$run_dir/STOPPED")"
        comes_back || true
        if [[ $asked != USR1 ]]; then
            echo "slurm: stopped on request; submit again to go on"
            exit 75
        fi
        # A time limit (the partition's, where submit was given none) that is hardly longer than the grace: every start
        # would end so.
        [[ $4 == yes ]] || fail 2 "USR1 came ${SECONDS} s after the start, before there were any ranks; give more --time, or less --grace, and submit again"
        if (($3 >= MAX_RESTARTS)); then
            echo "slurm: restarted $3 times already, which is the most; submit again to go on" >&2
            exit 75
        fi
        put_back
    fi
    (($2 == 0)) || comes_back || fail 1 "$1 failed (srun: $2); see the logs of the nodes"
    exit 0
}
