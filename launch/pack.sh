# shellcheck shell=bash disable=SC2154,SC2329
# Several points of a sweep side by side in one job, read by pack.sbatch after `points`: each runs its own job.sbatch on its
# part of the nodes, and the job is queued again while one of them is to be continued.

set -u -o pipefail

export SWIFT_BAD_NODES
SWIFT_BAD_NODES=$(dirname "${points[0]}")/bad_nodes.$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
share=$((${#nodes[@]} / ${#points[@]}))
children=()
rm -f "$SWIFT_BAD_NODES"

hand_on() {
    kill -USR1 "${children[@]}" 2>/dev/null
}
trap hand_on USR1 TERM

for slot in "${!points[@]}"; do
    part=$(printf '%s\n' "${nodes[@]:slot * share:share}" | paste -sd,)
    mkdir -p "${points[slot]}/log"
    SWIFT_SLOT=$slot SWIFT_HOSTS=$part bash "${points[slot]}/job.sbatch" >>"${points[slot]}/log/$SLURM_JOB_ID.out" 2>&1 &
    children+=("$!")
done

worst=0
for slot in "${!points[@]}"; do
    while :; do
        wait "${children[slot]}"
        status=$?
        kill -0 "${children[slot]}" 2>/dev/null || break
    done
    echo "${points[slot]}: ended with $status"
    if [ "$status" -eq 75 ]; then
        continued=1
    elif [ "$status" -gt "$worst" ]; then
        worst=$status
    fi
done
if [ -n "${continued:-}" ]; then
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID"
    if [ -s "$SWIFT_BAD_NODES" ]; then
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(sort -u "$SWIFT_BAD_NODES" | paste -sd,)"
    fi
fi
exit "$worst"
