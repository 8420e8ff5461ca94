# shellcheck shell=bash
# Frontier (OLCF). Read in the job before anything is started. From the public user guide of July 2026; untested there.
# Why each line is here: the table in launch/README.md.

site_environment() {
    module load PrgEnv-gnu/8.7.0 cpe/26.03 miniforge3 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a || return 1
    # Modules other than the default ones are found only so.
    export LD_LIBRARY_PATH=${CRAY_LD_LIBRARY_PATH:-}:${LD_LIBRARY_PATH:-}

    # The first connections of RCCL and gloo, on one interface: above about 300 nodes nothing starts without it.
    export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0

    # RCCL over libfabric. The module sets these too; here so that they can be read and changed.
    export NCCL_NET_PLUGIN=${NCCL_NET_PLUGIN:-librccl-net.so}
    export NCCL_CROSS_NIC=1 NCCL_NET_GDR_LEVEL=PHB HSA_FORCE_FINE_GRAIN_PCIE=1
    # Never memhooks: it deadlocks.
    export FI_MR_CACHE_MONITOR=kdreg2
    export FI_CXI_DISABLE_HOST_REGISTER=1 FI_CXI_DEFAULT_CQ_SIZE=131072 FI_CXI_DEFAULT_TX_SIZE=2048
    # Goes with --network=disable_rdzv_get.
    export FI_CXI_RDZV_PROTO=alt_read
    export FI_CXI_RDZV_EAGER_SIZE=0 FI_CXI_RDZV_THRESHOLD=0 FI_CXI_RDZV_GET_MIN=0 FI_CXI_RX_MATCH_MODE=hybrid
    # On several nodes a missing plugin must end the job, not fall back to TCP.
    if [ "$SWIFT_NODES" -gt 1 ]; then
        export NCCL_NET=OFI
    fi
}

main_address() {
    if [ -n "${SWIFT_HOSTS:-}" ]; then
        srun --nodes=1 --ntasks=1 --overlap --nodelist="$(host_names | head -n 1)" hostname -i
    else
        hostname -i
    fi | awk '{print $1}'
}

main_port() {
    # The port OLCF names; points that share a job take the following ones.
    echo "$((3442 + ${SWIFT_SLOT:-0}))"
}
