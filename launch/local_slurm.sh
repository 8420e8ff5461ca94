#!/usr/bin/env bash
# A real Slurm of two or more nodes on this machine, for trying and testing jobs without a cluster.
#
#   launch/local_slurm.sh install              Debian packages slurm-wlm and munge, when missing (root)
#   launch/local_slurm.sh start DIR [NODES]    controller and nodes n1, n2, ...; state, logs and slurm.conf in DIR
#   launch/local_slurm.sh stop DIR             end them
#   launch/local_slurm.sh stop-node DIR NODE   kill one node's daemon and processes: a lost node
#   launch/local_slurm.sh start-node DIR NODE  bring it back
#
# After start: export SLURM_CONF=DIR/slurm.conf. Nothing outside DIR is written and no other Slurm is touched: own munge
# socket and key, own ports. Runs as root or as any user (then only that user can submit).
set -euo pipefail

# Debian puts the daemons outside a user's PATH.
PATH="$PATH:/usr/sbin:/sbin"
PORT="${SWIFT_LOCAL_SLURM_PORT:-17817}"
# Seconds a killed step may take to end, and a silent node counts as alive: short, this is for tests.
KILL_WAIT="${SWIFT_LOCAL_SLURM_KILL_WAIT:-10}"

die() {
    echo "local_slurm: $*" >&2
    exit 2
}

need() {
    local command
    for command in slurmctld slurmd sbatch munged; do
        command -v "$command" >/dev/null || die "$command is missing: run launch/local_slurm.sh install (Debian, root)"
    done
}

install_packages() {
    if command -v slurmctld >/dev/null && command -v munged >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || die "no apt-get here: install Slurm and munge in your system's way"
    [ "$(id -u)" = 0 ] || die "installing slurm-wlm and munge needs root"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

write_conf() {
    local dir=$1 nodes=$2 user cores memory index
    user=$(id -un)
    cores=$(nproc)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=swiftlocal
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort=$PORT
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=$KILL_WAIT
SlurmdTimeout=15
SlurmctldTimeout=15
InactiveLimit=0
MessageTimeout=30
MinJobAge=3600
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=1000000
CONF
    for index in $(seq "$nodes"); do
        echo "NodeName=n$index NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((PORT + index))" \
            "CPUs=$cores RealMemory=$memory State=UNKNOWN" >>"$dir/slurm.conf"
    done
    echo "PartitionName=local Nodes=n[1-$nodes] Default=YES MaxTime=01:00:00 State=UP OverSubscribe=NO" >>"$dir/slurm.conf"
}

node_names() {
    sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$1/slurm.conf"
}

start_munge() {
    local dir=$1
    mkdir -p "$dir/munge"
    chmod 711 "$dir/munge"
    [ -f "$dir/munge/key" ] || head -c 128 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    # --force: munged dislikes folders under /tmp that others may write to; this one is for tests.
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>>"$dir/munge/log"
}

start_node() {
    local dir=$1 node=$2
    mkdir -p "$dir/spool/$node"
    # An absolute path: steps are started from other folders.
    slurmd -f "$dir/slurm.conf" -N "$node"
}

pid_in() {
    [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null && cat "$1"
}

stop_pid() {
    local pid signal=${2:-TERM}
    pid=$(pid_in "$1") || return 0
    kill -"$signal" "$pid"
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

# A lost node takes its processes along: here they would go on without their daemon.
stop_node() {
    local dir=$1 node=$2 place pid words
    stop_pid "$dir/slurmd.$node.pid" KILL
    for place in /proc/[0-9]*; do
        { words=$(tr '\0' '\n' <"$place/environ"); } 2>/dev/null || continue
        if grep -qx "SLURMD_NODENAME=$node" <<<"$words" && grep -qx "SLURM_CLUSTER_NAME=swiftlocal" <<<"$words"; then
            pid=$(awk '{print $4}' "$place/stat" 2>/dev/null) || continue
            case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmstepd*) kill -KILL "$pid" 2>/dev/null || true ;; esac
            kill -KILL "${place#/proc/}" 2>/dev/null || true
        fi
    done
}

start() {
    local dir node nodes=${2:-2}
    need
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || die "$nodes: the number of nodes must be 1 to 99"
    mkdir -p "$1"
    dir=$(realpath "$1")
    mkdir -p "$dir/state"
    pid_in "$dir/slurmctld.pid" >/dev/null && die "$dir: already started"
    write_conf "$dir" "$nodes"
    start_munge "$dir"
    export SLURM_CONF="$dir/slurm.conf"
    slurmctld -f "$SLURM_CONF" -c
    for node in $(node_names "$dir"); do
        start_node "$dir" "$node"
    done
    for _ in $(seq 150); do
        if [ "$(sinfo -h -N -o '%T' 2>/dev/null | grep -c idle)" = "$nodes" ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    sinfo -N >&2 || true
    die "the nodes did not come up; see $dir/*.log"
}

stop() {
    local dir node
    dir=$(realpath "$1")
    export SLURM_CONF="$dir/slurm.conf"
    if pid_in "$dir/slurmctld.pid" >/dev/null; then
        scancel -u "$(id -un)" 2>/dev/null || true
        sleep 1
    fi
    for node in $(node_names "$dir"); do
        stop_pid "$dir/slurmd.$node.pid"
    done
    stop_pid "$dir/slurmctld.pid"
    stop_pid "$dir/munge/pid"
}

case "${1:-} $#" in
"install 1") install_packages ;;
"start 2" | "start 3") start "$2" "${3:-}" ;;
"stop 2") stop "$2" ;;
"stop-node 3") stop_node "$(realpath "$2")" "$3" ;;
"start-node 3") start_node "$(realpath "$2")" "$3" ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
