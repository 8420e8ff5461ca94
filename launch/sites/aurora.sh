# shellcheck shell=bash
# Aurora (ALCF). Read in the job before anything is started. From the public user guide of August 2026; untested there.
# Why each line is here: the table in launch/README.md.

site_environment() {
    module load frameworks || return 1
    export DS_ACCELERATOR=xpu
    # A tile is a device: 12 a node.
    export ZE_FLAT_DEVICE_HIERARCHY=FLAT
    # The set ALCF calls essential for training on several nodes.
    export CCL_PROCESS_LAUNCHER=pmix CCL_ATL_TRANSPORT=mpi CCL_KVS_MODE=mpi FI_MR_CACHE_MONITOR=userfaultfd
    # Its choices for large jobs.
    export CCL_KVS_CONNECTION_TIMEOUT=600 CCL_KVS_USE_MPI_RANKS=1 CCL_ZE_CACHE_OPEN_IPC_HANDLES_THRESHOLD=1024
    export CCL_BCAST=double_tree CCL_ALLREDUCE_SCALEOUT="direct:0-1048576;rabenseifner:1048577-max"
    export FI_CXI_DEFAULT_CQ_SIZE=1048576 FI_CXI_RX_MATCH_MODE=hybrid
    export PALS_PING_PERIOD=240 PALS_RPC_TIMEOUT=240
}

main_address() {
    # The name of the first node on the high-speed network.
    echo "$(head -n 1 "$PBS_NODEFILE" | cut -d . -f 1).hsn.cm.aurora.alcf.anl.gov"
}

main_port() {
    echo 2345
}
