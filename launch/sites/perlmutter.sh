# shellcheck shell=bash
# Perlmutter (NERSC). Read in the job before anything is started. From its public documentation; untested there.

site_environment() {
    module load cudatoolkit nccl || return 1
    # The nccl module brings the plugin for Slingshot and its settings.
    export GLOO_SOCKET_IFNAME=hsn0
}
