# shellcheck shell=bash disable=SC2034
# What job.sh needs of Slurm. Each function says what the batch system does here; pbs.sh has the same ones.

# The last task of an array has the number of the whole array: `scontrol requeue` of that would restart every task.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
CHAIN=$JOB # a job that is queued again keeps its number
ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
HOSTS=${SWIFT_HOSTS:-$SLURM_JOB_NODELIST}

# Where a site submits with --export=NONE, this is set and would start the ranks with an empty environment.
unset SLURM_EXPORT_ENV

SHAPE=(--nodes="$SWIFT_NODES" --nodelist="$HOSTS")
NODE_STEP=(srun "${SHAPE[@]}" --ntasks="$SWIFT_NODES" --ntasks-per-node=1 --cpus-per-task="$SWIFT_CORES_PER_NODE")
RANK_STEP=(
    srun "${SHAPE[@]}" --ntasks="$((SWIFT_NODES * SWIFT_RANKS_PER_NODE))"
    --ntasks-per-node="$SWIFT_RANKS_PER_NODE" --cpus-per-task="$SWIFT_CORES_PER_RANK"
    --unbuffered --label "${STEP_OPTIONS[@]}"
)
# The first rank that fails ends the others, who would wait for it; one that is done does not end them.
RUN_OPTIONS=(--kill-on-bad-exit=1 --wait=0)
MONITOR_STEP=(srun "${SHAPE[@]}" --ntasks="$SWIFT_NODES" --ntasks-per-node=1 --cpus-per-task=1 --overlap)

# Address of the first node, where rank 0 runs. A site file may know better.
main_address() {
    local first
    first=$(host_names | head -n 1)
    scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# Names of the nodes, one a line, as SLURMD_NODENAME says them.
host_names() {
    scontrol show hostnames "$HOSTS"
}

# Other jobs on a shared node have other numbers, points that share a job other slots.
main_port() {
    echo "$((10240 + (SLURM_JOB_ID * 16 + ${SWIFT_SLOT:-0}) % 20000))"
}

# broadcast FILE DESTINATION: to every node of the job. A failed sbcast can leave a part of the file behind.
broadcast() {
    sbcast --force --preserve "$1" "$2"
}

# kill_step SIGNAL: to all processes of the step that trains, and to nothing else.
kill_step() {
    scancel --quiet --signal="$1" "$JOB.$(cat "$SWIFT_RUN/launch/step")"
}

job_state() {
    scontrol --oneliner show job "$JOB" | sed -n 's/.* JobState=\([^ ]*\).*/\1/p'
}

# job_runs NUMBER: whether that job is there and has begun.
job_runs() {
    squeue --noheader --jobs="$1" --format=%T 2>/dev/null | grep -Eq '^(RUNNING|SUSPENDED|STOPPED)$'
}

# Whether nobody has ended the job from outside: who cancels a job does not want it back. While this script runs on, Slurm
# calls such a job COMPLETING, and one at its time limit too.
still_wanted() {
    case $(job_state) in
    CANCELLED) return 1 ;;
    COMPLETING) [ "$SECONDS" -ge "$((SWIFT_TIME_SECONDS - 30))" ] ;;
    esac
}

# queue_again [BAD_NODE ...]: the same job, later. It ends this script, so what is to follow must be shielded.
queue_again() {
    local bad
    trap '' TERM USR1
    # After a node was lost Slurm may have queued the job again before this script could.
    scontrol requeue "$JOB" || [ "$(job_state)" = PENDING ] || return 1
    # Slurm takes this only while the job is waiting, which it is from here on.
    if [ "$#" -gt 0 ]; then
        bad=$(scontrol show hostlist "$(printf '%s\n' "$@" | paste -sd,)")
        scontrol update JobId="$JOB" ExcNodeList="$bad" || say "could not exclude $bad"
    fi
}
