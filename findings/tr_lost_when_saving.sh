#!/usr/bin/env bash
# Which common steps keep the repetition time of an fMRI series, and which lose it.
#
# A NIfTI file keeps its TR in pixdim[4] and the unit in xyzt_units. Several tools that take a 4D series with TR 2 s and give
# one back write pixdim[4] = 1 without a unit, and say nothing. Whoever reads the file then takes 1 s for the TR.
#
# Seen with nilearn 0.14.1, dipy 1.12.1, nibabel 5.4.2, numpy 2.3.5 (Python 3.11, Linux):
#   before                                  TR 2.0 sec
#   nilearn.image.index_img                 TR 2.0 sec
#   nilearn.image.smooth_img                TR 2.0 sec
#   nilearn.image.math_img                  TR 1.0 unknown
#   NiftiMasker.inverse_transform           TR 1.0 unknown
#   dipy.io.image.save_nifti                TR 1.0 unknown
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet nilearn==0.14.1 dipy==1.12.1 nibabel==5.4.2 numpy==2.3.5
cd "$work"
"$work/venv/bin/python" -W ignore - >seen.txt <<'PY'
import nibabel
import numpy as np
from dipy.io.image import load_nifti, save_nifti
from nilearn.image import index_img, math_img, smooth_img
from nilearn.maskers import NiftiMasker


def show(name, image):
    image.to_filename("out.nii")
    header = nibabel.load("out.nii").header
    print(f"{name:<39} TR {float(header['pixdim'][4])} {header.get_xyzt_units()[1]}")


affine = np.diag([3.0, 3.0, 3.0, 1.0])
data = np.random.default_rng(0).normal(100, 1, (8, 8, 8, 20)).astype(np.float32)
series = nibabel.Nifti1Image(data, affine)
series.header.set_zooms((3, 3, 3, 2))
series.header.set_xyzt_units("mm", "sec")
show("before", series)
show("nilearn.image.index_img", index_img(series, slice(2, 12)))
show("nilearn.image.smooth_img", smooth_img(series, 6))
show("nilearn.image.math_img", math_img("a - 1", a=series))
masker = NiftiMasker(mask_img=nibabel.Nifti1Image(np.ones((8, 8, 8), np.uint8), affine)).fit()
show("NiftiMasker.inverse_transform", masker.inverse_transform(masker.transform(series)))
series.to_filename("in.nii")
values, where = load_nifti("in.nii")
save_nifti("dipy.nii", values, where)
show("dipy.io.image.save_nifti", nibabel.load("dipy.nii"))
PY
cat seen.txt
sed -n 's/^#   \(.* TR .*\)$/\1/p' "$OLDPWD/$(basename "$0")" | diff - seen.txt
