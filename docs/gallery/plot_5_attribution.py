"""
5. Which voxels a prediction rests on
=====================================

Attribution asks of every voxel how much it changed the prediction. In a synthetic cohort the answer is known: the
label comes from one region.
"""

# %%
# Maps of one scan of the test set
# --------------------------------
# Integrated gradients, and the same for the model with its weights shuffled (``--randomise``). A map that looks like
# that of shuffled weights says nothing about what was learned.

import json
import shutil

from shell import WORK, needs, show, swift

from swift.data.labels.splits import load_split

needs("cohort", "split.json", "finetuned", example="plot_4_finetune.py")
shutil.rmtree(WORK / "maps", ignore_errors=True)
subject = load_split(str(WORK / "split.json")).parts["test"][0]
name = f"{subject}_task-rest"
bold = f"cohort/{subject}/func/{name}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
swift(f"attribute finetuned {bold} --out maps --clips 8 --window 4 --randomise --quiet")

# %%
# The figure that the command leaves, on the mean image of the scan.

said = json.loads(next((WORK / "maps").glob("*.json")).read_text())
show("maps/" + next((WORK / "maps").glob("*.png")).name)

# %%
# Does it find the region?
# ------------------------
# The cohort keeps its truth. We take as many voxels as the region has, those with the largest attribution, and ask
# which part of them lies in the region. The dashed line is what voxels chosen at random would reach.

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np

from swift.data.synthetic import load_truth
from swift.inference.attribution import overlap

space = load_truth(WORK / "cohort")["space"]
region, mask = space["region_frame"], space["mask"].astype(bool)
titles = {"ig_share": "integrated\ngradients", "occlusion": "occlusion", "ig_share_random": "shuffled\nweights"}
maps = {key: np.asarray(nib.load(WORK / said["maps"][key]).dataobj) for key in titles}
found = {key: overlap(values, region & mask, mask) for key, values in maps.items()}

fig, axes = plt.subplots(1, 4, figsize=(9, 3), width_ratios=[1, 1, 1, 1.1], layout="constrained")
z = int(region.sum((0, 1)).argmax())
for axis, (key, values) in zip(axes, maps.items()):
    size = np.where(mask, np.abs(values), np.nan)[:, :, z].T
    axis.imshow(size, origin="lower", cmap="magma")
    axis.contour(region[:, :, z].T, [0.5], colors="cyan", linewidths=1)
    axis.set(title=titles[key], xticks=[], yticks=[])
axes[3].bar(range(3), [found[key]["dice"] for key in titles], color=["#0072B2", "#009E73", "#D55E00"])
axes[3].axhline(found["ig_share"]["chance"], color="0.3", ls="--", lw=0.8)
axes[3].set(ylim=(0, 1), ylabel="part in the region", xticks=range(3))
axes[3].set_xticklabels(titles.values(), fontsize=7)
fig.suptitle(f"{name}: size of the attribution; line: planted region; left is left", fontsize=9)
plt.show()
