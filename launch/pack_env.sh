#!/usr/bin/env bash
# Pack a Python environment into one archive, to be sent to the disk of every node:
#
#   launch/pack_env.sh ENVIRONMENT ARCHIVE.tar.gz
#
# ENVIRONMENT is a conda environment (packed by conda-pack, which must be there) or a virtual environment. Then submit with
# SWIFT_ENVIRONMENT=ARCHIVE.tar.gz, or launcher.environment=ARCHIVE.tar.gz. swift's own code needs not be in it: every
# job brings the code it was submitted with.
set -euo pipefail

die() {
    echo "pack_env: $*" >&2
    exit 2
}

[ "$#" = 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2; }
[ -x "$1/bin/python" ] || die "$1: no bin/python in it; name a conda or virtual environment"
home=$(realpath "$1")
case "$2" in *.tar.gz) ;; *) die "$2: must end in .tar.gz" ;; esac
mkdir -p "$(dirname "$2")"
archive=$(realpath "$2")

if [ -d "$home/conda-meta" ]; then
    command -v conda-pack >/dev/null || die "conda-pack is missing: conda install conda-pack -c conda-forge"
    exec conda-pack --format tar.gz --n-threads -1 --prefix "$home" --output "$archive" --force
fi

zip=gzip
if command -v pigz >/dev/null; then
    zip=pigz
fi
extra=$(mktemp -d)
trap 'rm -rf "$extra" "$archive.partial"' EXIT
printf '%s\n' "$home" >"$extra/.packed-prefix"
base=$("$home/bin/python" -c 'import sys; print(sys.base_prefix)')
version=$("$home/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
parts=(-C "$home" . -C "$extra" .packed-prefix)
# A Python of the operating system lies on every node. Any other is brought along, with its standard library.
if [ "$base" != /usr ]; then
    mkdir -p "$extra/base/bin" "$extra/base/lib"
    cp -L "$base/bin/$version" "$extra/base/bin/$version"
    ln -s "$version" "$extra/base/bin/python3"
    ln -s "$base/lib/$version" "$extra/base/lib/$version"
    find "$base/lib" -maxdepth 1 -name 'libpython*.so*' -exec cp -P {} "$extra/base/lib/" \;
    mkdir -p "$extra/bin"
    for name in python python3 "$version"; do
        ln -s "../base/bin/$version" "$extra/bin/$name"
    done
    library=(
        --transform="s,^$version,base/lib/$version," --exclude="$version/site-packages" --exclude="$version/test"
        --exclude="$version/config-*" -C "$base/lib" "$version"
    )
    rm "$extra/base/lib/$version"
    tar -cf "$extra/all.tar" --exclude='./bin/python' --exclude='./bin/python3' --exclude="./bin/$version" "${parts[@]}"
    tar -rf "$extra/all.tar" -C "$extra" base bin
    tar -rf "$extra/all.tar" "${library[@]}"
else
    tar -cf "$extra/all.tar" "${parts[@]}"
fi
"$zip" <"$extra/all.tar" >"$archive.partial"
mv "$archive.partial" "$archive"
echo "$archive: $(du -h "$archive" | cut -f 1)"
