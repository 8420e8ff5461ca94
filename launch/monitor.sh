#!/bin/bash
# One task a node: load, memory, free space and devices of the node every so many seconds, a line of CSV each, until the
# job ends. monitor.sh FOLDER SECONDS
set -u

node=${SLURMD_NODENAME:-$(hostname -s)}
file=$1/$node.csv
# shellcheck source=/dev/null
. "$SWIFT_RUN/launch/place.sh"
use_node "$node"

devices() {
    # One field: each device as busy%/memory%, separated by spaces.
    if command -v rocm-smi >/dev/null; then
        rocm-smi --showuse --showmemuse --csv 2>/dev/null | awk -F, 'NR > 1 && NF >= 3 {printf "%s%s/%s", s, $2, $3; s = " "}'
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=utilization.gpu,memory.used,memory.total --format=csv,noheader,nounits 2>/dev/null |
            awk -F', ' '{printf "%s%s/%d", s, $1, 100 * $2 / $3; s = " "}'
    fi
}

mkdir -p "$1"
[ -s "$file" ] || echo "time,load1,memory_used_gb,memory_total_gb,scratch_free_gb,devices_busy_memory_percent" >"$file"
while :; do
    read -r load _ </proc/loadavg
    memory=$(awk '/^MemTotal/ {t = $2} /^MemAvailable/ {a = $2} END {printf "%.1f,%.1f", (t - a) / 1e6, t / 1e6}' /proc/meminfo)
    free=$(df -Pk "$SWIFT_SCRATCH" 2>/dev/null | awk 'NR == 2 {printf "%.1f", $4 / 1e6}')
    echo "$(date +%s),$load,$memory,$free,$(devices)" >>"$file"
    sleep "$2"
done
