#!/usr/bin/env bash
# Which of a NIfTI file's two affines a reader takes when they differ.
#
# A NIfTI file may hold two affines, each with a code that says into which space it leads. A scan that was registered often
# keeps the scanner's in the qform (code 1) and gets the template's in the sform (code 4). nibabel, and with it nilearn and
# most of the field, takes the sform. SimpleITK, and with it what is built on ITK, takes the qform as soon as both codes
# differ from 0, but for an sform of code 1. Neither says anything. The same file then lies in two places.
#
# Seen with nibabel 5.4.2, SimpleITK 2.5.7, numpy 2.3.5 (Python 3.11, Linux):
#   qform 1 (scanner)  sform 0 (unknown)   nibabel qform  SimpleITK qform
#   qform 0 (unknown)  sform 4 (MNI)       nibabel sform  SimpleITK sform
#   qform 1 (scanner)  sform 1 (scanner)   nibabel sform  SimpleITK sform
#   qform 1 (scanner)  sform 2 (aligned)   nibabel sform  SimpleITK qform
#   qform 1 (scanner)  sform 4 (MNI)       nibabel sform  SimpleITK qform
#   qform 4 (MNI)      sform 4 (MNI)       nibabel sform  SimpleITK qform
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

NAMES = {0: "unknown", 1: "scanner", 2: "aligned", 4: "MNI"}
FORMS = {"qform": (-10.0, -20.0, -30.0), "sform": (-90.0, -126.0, -72.0)}  # where the first voxel is, in mm


def affine(form):
    found = np.diag([2.0, 2.0, 2.0, 1.0])
    found[:3, 3] = FORMS[form]
    return found


def taken(origin):
    return next(form for form, place in FORMS.items() if np.allclose(origin, place))


for q, s in ((1, 0), (0, 4), (1, 1), (1, 2), (1, 4), (4, 4)):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), None)
    image.set_qform(affine("qform"), q)
    image.set_sform(affine("sform"), s)
    image.to_filename("scan.nii")
    by_nibabel = taken(nibabel.load("scan.nii").affine[:3, 3])
    x, y, z = SimpleITK.ReadImage("scan.nii").GetOrigin()
    by_itk = taken((-x, -y, z))  # ITK's x and y point the other way
    codes = f"{f'qform {q} ({NAMES[q]})':<19}{f'sform {s} ({NAMES[s]})':<20}"
    print(f"{codes}nibabel {by_nibabel}  SimpleITK {by_itk}")
PY
cat seen.txt
sed -n 's/^#   \(qform [0-9].*\)$/\1/p' "$OLDPWD/$(basename "$0")" | diff - seen.txt
