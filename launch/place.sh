# shellcheck shell=bash
# Where a node keeps its copies of environment and code.

# use_node NAME: sets SWIFT_SCRATCH, SWIFT_PYTHON and PYTHONPATH for the node of that name.
use_node() {
    local code
    if [ -n "$SWIFT_NODE_LOCAL" ]; then
        # Job and node in the name: nodes may share the disk (simulated ones do), jobs may share a node.
        SWIFT_SCRATCH=$SWIFT_NODE_LOCAL/swift-$SWIFT_ATTEMPT-${SWIFT_SLOT:-0}/$1
        code=$SWIFT_SCRATCH/code
    else
        SWIFT_SCRATCH=${TMPDIR:-/tmp}/swift-$SWIFT_ATTEMPT-${SWIFT_SLOT:-0}/$1
        code=$SWIFT_RUN/launch/code
    fi
    SWIFT_PYTHON=$SWIFT_SUBMIT_PYTHON
    if [ -n "$SWIFT_ENVIRONMENT" ]; then
        SWIFT_PYTHON=$SWIFT_SCRATCH/environment/bin/python
        PATH=$SWIFT_SCRATCH/environment/bin:$PATH
    fi
    export PATH SWIFT_SCRATCH SWIFT_PYTHON PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
}
