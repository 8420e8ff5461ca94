#!/bin/bash
# What srun or mpiexec starts once a rank: finds this node's copies, then runs "$@".
set -u

# mpiexec of PALS numbers the ranks; Slurm's numbers swift reads itself.
if [ -n "${PALS_RANKID:-}" ]; then
    export RANK=$PALS_RANKID LOCAL_RANK=$PALS_LOCAL_RANKID
    export WORLD_SIZE=$((SWIFT_NODES * SWIFT_RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$SWIFT_RANKS_PER_NODE
fi
number=${PALS_RANKID:-$SLURM_PROCID}
node=${SLURMD_NODENAME:-$(hostname -s)}

# shellcheck source=/dev/null
. "$SWIFT_RUN/launch/place.sh"
use_node "$node"

# One MIOpen cache a node: the ranks of several nodes on one shared file would wait for its lock.
export MIOPEN_USER_DB_PATH=$SWIFT_SCRATCH/miopen MIOPEN_CUSTOM_CACHE_DIR=$SWIFT_SCRATCH/miopen
mkdir -p "$MIOPEN_USER_DB_PATH"
export OMP_NUM_THREADS=$SWIFT_CORES_PER_RANK
export PYTHONUNBUFFERED=1
# A run that hangs is ended by ABRT: each rank then says where it stood.
export PYTHONFAULTHANDLER=1
ulimit -c 0

if [ "$number" = 0 ] && [ "${1:-}" = train ]; then
    echo "${SLURM_STEP_ID:-0}" >"$SWIFT_RUN/launch/step"
fi

case "$1" in
train)
    command=(
        "$SWIFT_PYTHON" -m swift.train --config-path "$SWIFT_RUN" --config-name config
        hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=none hydra/hydra_logging=none
    )
    ;;
health) command=("$SWIFT_PYTHON" -m swift.health check "${@:2}") ;;
*) command=("$@") ;;
esac

# Slurm signals every process of a step: this shell must outlive the signal to hand on the exit status. mpiexec may know
# this shell only.
# shellcheck disable=SC2329
hand_on() {
    [ -z "${PALS_RANKID:-}" ] || kill -"$1" "$rank" 2>/dev/null
}
rank=
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM
"${command[@]}" &
rank=$!
while :; do
    wait "$rank"
    status=$?
    kill -0 "$rank" 2>/dev/null || break
done
if [ "$1" = train ]; then
    # srun reports the highest status of all ranks, and those it ends itself count as killed.
    [ "$status" -ne 2 ] || : >"$SWIFT_RUN/launch/mistake"
    if [ "$status" -eq 75 ]; then
        # Saved and stopped: no failure, for which the others would be killed where they still tidy up.
        : >"$SWIFT_RUN/launch/stopped"
        exit 0
    fi
    [ "$status" -eq 0 ] || : >"$SWIFT_RUN/launch/failed"
fi
exit "$status"
