#!/bin/bash
# One task a node: unpack what was sent to this node. unpack.sh CODE_ARCHIVE [ENVIRONMENT_ARCHIVE]
set -eu -o pipefail

node=${SLURMD_NODENAME:-$(hostname -s)}
# shellcheck source=/dev/null
. "$SWIFT_RUN/launch/place.sh"
use_node "$node"

unzip=gzip
if command -v pigz >/dev/null; then
    unzip=pigz
fi

mkdir -p "$SWIFT_SCRATCH/code"
tar --use-compress-program="$unzip" -xf "$1" -C "$SWIFT_SCRATCH/code"
[ "$#" -gt 1 ] || exit 0

home=$SWIFT_SCRATCH/environment
mkdir -p "$home"
tar --use-compress-program="$unzip" -xf "$2" -C "$home"
if [ -x "$home/bin/conda-unpack" ]; then
    "$home/bin/python" "$home/bin/conda-unpack"
    exit 0
fi

# A virtual environment packed by launch/pack_env.sh: it names its own folder in the first line of its commands, and the
# folder of the Python it was made from.
packed=$(cat "$home/.packed-prefix")
{ grep -lI "^#!$packed/" "$home"/bin/* || true; } | while IFS= read -r file; do
    sed -i "1s|^#!$packed/|#!$home/|" "$file"
done
if [ -d "$home/base" ]; then
    sed -i "s|^home *=.*|home = $home/base/bin|" "$home/pyvenv.cfg"
fi
