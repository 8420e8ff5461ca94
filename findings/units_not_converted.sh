#!/usr/bin/env bash
# What a reader makes of the units of a NIfTI file.
#
# xyzt_units says in which unit voxel sizes and the TR are written. SimpleITK gives millimetres and seconds whatever the
# file's units are. nibabel's get_zooms() and affine give the file's own numbers, so that a TR of 2 s in a file that counts
# milliseconds is 2000 for everything that is built on nibabel, and a voxel of 2 mm in a file of micrometres is 2000 wide.
#
# Seen with nibabel 5.4.2, SimpleITK 2.5.7, numpy 2.3.5 (Python 3.11, Linux), 2 mm and 2 s in every file:
#   mm and sec        nibabel 2 2       SimpleITK 2 2
#   mm and msec       nibabel 2 2000    SimpleITK 2 2
#   mm and usec       nibabel 2 2e+06   SimpleITK 2 2
#   micron and sec    nibabel 2000 2    SimpleITK 2 2
#   meter and sec     nibabel 0.002 2   SimpleITK 2 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.3.5
cd "$work"
"$work/venv/bin/python" -W ignore - >seen.txt <<'PY'
import nibabel
import numpy as np
import SimpleITK

MM = {"mm": 1.0, "micron": 1e-3, "meter": 1e3}
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}

for space, time in (("mm", "sec"), ("mm", "msec"), ("mm", "usec"), ("micron", "sec"), ("meter", "sec")):
    size = 2 / MM[space]
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6, 7), np.float32), np.diag([size, size, size, 1]))
    image.header.set_zooms((size, size, size, 2 / SECONDS[time]))
    image.header.set_xyzt_units(space, time)
    image.to_filename("scan.nii")
    zooms = nibabel.load("scan.nii").header.get_zooms()
    spacing = SimpleITK.ReadImage("scan.nii").GetSpacing()
    seen = f"nibabel {zooms[0]:.4g} {zooms[3]:.4g}"
    print(f"{f'{space} and {time}':<18}{seen:<18}SimpleITK {spacing[0]:.4g} {spacing[3]:.4g}")
PY
cat seen.txt
sed -n 's/^#   \(.* nibabel .*\)$/\1/p' "$OLDPWD/$(basename "$0")" | diff - seen.txt
