# shellcheck shell=bash
# What every job of swift does, read by job.sbatch and job.pbs after their settings:
#
#   site environment -> copies on every node -> health of every node -> the ranks -> queue again, or the end
#
# A run ends with 0 (trained), 2 (a mistake only a user can mend) or anything else: then the job is queued again, unless
# it was cancelled, or too many starts in a row have brought no new checkpoint. Files in RUN: log/ (output of the job),
# attempts.jsonl (starts and ends), startup.jsonl (seconds by phase), health/, monitor/, launch/ (what the job runs).

set -u -o pipefail

LAUNCH=$SWIFT_RUN/launch
STEP=       # process that started the ranks
STOP_ASKED= # signal that asked for the end
PHASE=
SENT= # folder of this attempt on every node

say() {
    printf '%s swift: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"
}

# shellcheck source=/dev/null
. "$LAUNCH/scheduler.sh"
# shellcheck source=/dev/null
. "$LAUNCH/site.sh"
# shellcheck source=/dev/null
. "$LAUNCH/place.sh"
export SWIFT_ATTEMPT=$ATTEMPT

# phase [NAME]: end the phase that runs, and begin the next.
phase() {
    local now
    now=$(date +%s.%N)
    if [ -n "$PHASE" ]; then
        awk -v attempt="$ATTEMPT" -v phase="$PHASE" -v from="$PHASE_BEGAN" -v to="$now" 'BEGIN {
            printf "{\"attempt\": \"%s\", \"phase\": \"%s\", \"seconds\": %.3f}\n", attempt, phase, to - from
        }' >>"$SWIFT_RUN/startup.jsonl"
    fi
    PHASE=${1:-}
    PHASE_BEGAN=$now
    # The ranks go on counting from here.
    export SWIFT_PHASE_BEGAN=$now
}

# The newest checkpoint, by a name that changes with it.
checkpoint() {
    cat "$SWIFT_RUN/checkpoints/latest" 2>/dev/null || stat -c %y "$SWIFT_RUN/checkpoints/last.ckpt" 2>/dev/null || echo none
}

# attempt EVENT [KEY VALUE ...]: a line of attempts.jsonl.
attempt() {
    local line
    line="{\"attempt\": \"$ATTEMPT\", \"chain\": \"$CHAIN\", \"event\": \"$1\", \"time\": $(date +%s)"
    shift
    while [ "$#" -gt 1 ]; do
        line="$line, \"$1\": \"${2//[\"\\]/ }\""
        shift 2
    done
    echo "$line}" >>"$SWIFT_RUN/attempts.jsonl"
}

# Remove what was sent to the nodes. Not worth more than a moment: batch systems may empty the disks themselves.
clean_up() {
    [ -n "$SENT" ] || return 0
    # A job that was ended from outside can start nothing more on its other nodes.
    timeout 30 "${NODE_STEP[@]}" rm -rf "$SENT" 2>/dev/null || rm -rf "$SENT"
}

# Ends the script. finish STATUS WORDS
finish() {
    attempt end status "$1" checkpoint "$(checkpoint)" reason "$2"
    say "$2"
    clean_up
    exit "$1"
}

# How many starts in a row, the last ones of this job, have begun at the checkpoint there is now.
starts_without_progress() {
    grep '"event": "start"' "$SWIFT_RUN/attempts.jsonl" 2>/dev/null | grep -F "\"chain\": \"$CHAIN\"" |
        sed 's/.*"checkpoint": "\([^"]*\)".*/\1/' | tac |
        awk -v now="$(checkpoint)" '$0 != now {exit} {n++} END {print n + 0}'
}

# again STATUS WORDS [BAD_NODE ...]: the run goes on later, or is left alone.
again() {
    local status=$1 reason=$2
    shift 2
    if ! still_wanted; then
        finish "$status" "$reason; the job was ended from outside and is not queued again"
    fi
    if [ "$(starts_without_progress)" -gt "$SWIFT_FRUITLESS_RESTARTS" ]; then
        finish "$status" "$reason; $SWIFT_FRUITLESS_RESTARTS restarts without a new checkpoint: left alone"
    fi
    if [ -n "${SWIFT_SLOT:-}" ]; then
        # One of several points in a job: that one is queued again when all of them have ended.
        [ "$#" -eq 0 ] || printf '%s\n' "$@" >>"$SWIFT_BAD_NODES"
        finish 75 "$reason; to be continued"
    fi
    attempt end status "$status" checkpoint "$(checkpoint)" reason "$reason; queued again"
    say "$reason; queued again"
    clean_up
    queue_again "$@" || say "it could not be queued again: do it with $SWIFT_RUN/job.$SWIFT_SUFFIX"
    exit "$status"
}

# shellcheck disable=SC2329
on_signal() {
    STOP_ASKED=$1
    say "$1: the run is asked to save and stop"
    [ -z "$STEP" ] || kill -USR1 "$STEP" 2>/dev/null
}

# Send environment and code to every node and unpack them, one task a node.
stage() {
    if [ -z "$SWIFT_NODE_LOCAL" ]; then
        mkdir -p "$LAUNCH/code" && tar -xzf "$LAUNCH/code.tar.gz" -C "$LAUNCH/code" || return 1
        return
    fi
    SENT=$SWIFT_NODE_LOCAL/swift-$ATTEMPT-${SWIFT_SLOT:-0}
    "${NODE_STEP[@]}" mkdir -p "$SENT" || return 1
    # The exit code matters: a broken copy would end in errors that say something else.
    broadcast "$LAUNCH/code.tar.gz" "$SENT/code.tar.gz" || return 1
    if [ -n "$SWIFT_ENVIRONMENT" ]; then
        broadcast "$SWIFT_ENVIRONMENT" "$SENT/environment.tar.gz" || return 1
        "${NODE_STEP[@]}" "$LAUNCH/unpack.sh" "$SENT/code.tar.gz" "$SENT/environment.tar.gz"
    else
        "${NODE_STEP[@]}" "$LAUNCH/unpack.sh" "$SENT/code.tar.gz"
    fi
}

# Look at every node before the run. Sets BAD_NODES; 0: all well.
health() {
    local reports=$SWIFT_RUN/health/$ATTEMPT
    BAD_NODES=()
    mkdir -p "$reports"
    timeout --kill-after=10 "$SWIFT_HEALTH_SECONDS" "${RANK_STEP[@]}" "$LAUNCH/rank.sh" health --reports "$reports" \
        >"$reports/output" 2>&1
    mapfile -t BAD_NODES < <(host_names | xargs "$SWIFT_PYTHON" -m swift.health judge --reports "$reports" \
        --ranks "$SWIFT_RANKS_PER_NODE" --hosts 2>"$reports/verdict")
    cat "$reports/verdict"
    # The verdict's last line says whether all ranks have passed.
    tail -n 1 "$reports/verdict" | grep -q '^healthy'
}

# End ranks that cannot end by themselves. A run without a step hangs: first each rank says where it stands. After a rank
# has failed the batch system ends the others, but waits for a lost node for as long as nobody calls it lost.
watch() {
    local now last
    while sleep "$((SWIFT_HANG_SECONDS < 60 ? 2 : 15))"; do
        now=$(date +%s)
        last=$(stat -c %Y "$SWIFT_RUN/heartbeats/$ATTEMPT.json" 2>/dev/null || echo 0)
        [ "$last" -gt "$1" ] || last=$1
        if [ "$((now - $(stat -c %Y "$LAUNCH/failed" 2>/dev/null || echo "$now")))" -gt 60 ]; then
            say "a rank has failed, and the others do not end"
        elif [ "$((now - last))" -gt "$SWIFT_HANG_SECONDS" ]; then
            say "no step for $((now - last)) s: the run hangs and is ended"
            : >"$LAUNCH/hung"
            kill_step ABRT
            sleep 10
        else
            continue
        fi
        kill_step KILL
        sleep 5
        kill -KILL "$STEP" 2>/dev/null
        return
    done
}

# Start the ranks and wait. Returns their status.
train() {
    local status watcher
    rm -f "$LAUNCH/mistake" "$LAUNCH/failed" "$LAUNCH/hung" "$LAUNCH/stopped"
    "${RANK_STEP[@]}" "${RUN_OPTIONS[@]}" "$LAUNCH/rank.sh" train &
    STEP=$!
    watch "$(date +%s)" &
    watcher=$!
    [ -z "$STOP_ASKED" ] || kill -USR1 "$STEP"
    # A signal ends `wait`, not the ranks.
    while :; do
        wait "$STEP"
        status=$?
        kill -0 "$STEP" 2>/dev/null || break
    done
    STEP=
    kill "$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null
    return "$status"
}

main() {
    local status other monitor=
    mkdir -p "$SWIFT_RUN/log"
    cd "$SWIFT_RUN" || exit 1
    if [ -e "$LAUNCH/finished" ]; then
        say "the run is finished already"
        exit 0
    fi
    # Two jobs of one run would take each other's marks in launch/ for their own.
    other=$(cat "$LAUNCH/job" 2>/dev/null)
    if [ -n "$other" ] && [ "$other" != "$JOB" ] && job_runs "$other"; then
        say "job $other trains this run: job $JOB ends"
        exit 2
    fi
    echo "$JOB" >"$LAUNCH/job"
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    say "job $JOB, attempt $ATTEMPT on $HOSTS; run $SWIFT_RUN"
    attempt start checkpoint "$(checkpoint)" nodes "$HOSTS"

    phase modules
    site_environment || finish 1 "the site environment could not be set up (launch/site.sh)"
    MASTER_ADDR=$(main_address)
    MASTER_PORT=$(main_port)
    export MASTER_ADDR MASTER_PORT

    phase staging
    stage || again 1 "environment or code could not be brought to every node"
    use_node "${SLURMD_NODENAME:-$(hostname -s)}"

    if [ "$SWIFT_HEALTH" = true ]; then
        phase health
        health || again 1 "unhealthy: ${BAD_NODES[*]:-no node stands out}" "${BAD_NODES[@]}"
    fi
    if [ "$SWIFT_MONITOR_SECONDS" -gt 0 ]; then
        "${MONITOR_STEP[@]}" "$LAUNCH/monitor.sh" "$SWIFT_RUN/monitor" "$SWIFT_MONITOR_SECONDS" 2>/dev/null &
        monitor=$!
    fi

    phase ranks
    PHASE= # the first rank goes on with it
    train
    status=$?
    [ -z "$monitor" ] || kill "$monitor" 2>/dev/null
    if [ "$status" -eq 0 ] && [ -e "$LAUNCH/stopped" ]; then
        again 75 "the run was asked to stop"
    elif [ "$status" -eq 0 ]; then
        : >"$LAUNCH/finished"
        finish 0 "the run is finished"
    elif [ -e "$LAUNCH/mistake" ]; then
        finish 2 "the run cannot go on as it is: see the message above"
    elif [ -e "$LAUNCH/hung" ]; then
        again "$status" "the run hung"
    elif [ -n "$STOP_ASKED" ]; then
        again "$status" "the run was asked to stop and a rank failed with status $status"
    else
        again "$status" "a rank failed with status $status"
    fi
}

main
