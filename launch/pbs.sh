# shellcheck shell=bash disable=SC2034
# What job.sh needs of PBS Pro with mpiexec of Cray PALS (Aurora). The same functions as slurm.sh. Untested there.

JOB=${PBS_JOBID%%.*}
CHAIN=${SWIFT_CHAIN:-$JOB} # a run goes on in a job with another number
ATTEMPT=$JOB
HOSTS=$(sort -u "$PBS_NODEFILE" | paste -sd,)

NODE_STEP=(mpiexec -n "$SWIFT_NODES" -ppn 1)
RANK_STEP=(mpiexec -n "$((SWIFT_NODES * SWIFT_RANKS_PER_NODE))" -ppn "$SWIFT_RANKS_PER_NODE" "${STEP_OPTIONS[@]}")
# PALS ends all ranks when one fails.
RUN_OPTIONS=()
MONITOR_STEP=("${NODE_STEP[@]}")

# PBS sends no early signal: a clock of our own, which ends with this script.
if [ "$SWIFT_SAVE_SECONDS" -gt 0 ]; then
    (while sleep 5 && kill -0 "$$"; do
        [ "$SECONDS" -lt "$((SWIFT_TIME_SECONDS - SWIFT_SAVE_SECONDS))" ] || exec kill -USR1 "$$"
    done) >/dev/null 2>&1 &
fi

# Address of the first node, where rank 0 runs. A site file may know better.
main_address() {
    head -n 1 "$PBS_NODEFILE"
}

# Names of the nodes, one a line, as `hostname -s` says them.
host_names() {
    cut -d . -f 1 "$PBS_NODEFILE" | sort -u
}

main_port() {
    echo "$((10240 + (${JOB//[^0-9]/} * 16 + ${SWIFT_SLOT:-0}) % 20000))"
}

# broadcast FILE DESTINATION: every node copies it from the shared file system.
broadcast() {
    "${NODE_STEP[@]}" cp -f "$1" "$2"
}

# kill_step SIGNAL: mpiexec hands it on to the ranks.
kill_step() {
    kill -"$1" "$STEP"
}

# job_runs NUMBER: whether that job is there and has begun.
job_runs() {
    qstat -f "$1" 2>/dev/null | grep -q 'job_state = [RS]'
}

still_wanted() {
    # State E is a job that ends, by qdel or at its limit; only our own signal tells the limit.
    [ -n "$STOP_ASKED" ] || ! qstat -f "$PBS_JOBID" | grep -q 'job_state = E'
}

# queue_again [BAD_NODE ...]: a following job; users cannot rerun their own. PBS has no list of nodes to leave out.
queue_again() {
    [ "$#" -eq 0 ] || say "PBS cannot leave out $*: tell the operators"
    qsub -W depend=afterany:"$PBS_JOBID" -v SWIFT_CHAIN="$CHAIN" "$SWIFT_RUN/job.pbs"
}
