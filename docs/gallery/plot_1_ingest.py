"""
1. Ingest scans and look at them
================================

A store holds many scans on one grid, with a checksum for every frame. This example makes a small cohort as fMRIPrep
would leave it, brings it into a store, and looks at what came in.
"""

# %%
# A cohort to try things on
# -------------------------
# Twenty people with one resting run each, as BIDS derivatives. One network of each brain is driven by a known course
# (``valence``), which later examples try to predict. With your own scans you would skip this step.

import shutil

from shell import WORK, swift

for name in ("cohort", "store"):  # begin anew
    shutil.rmtree(WORK / name, ignore_errors=True)
(WORK / "split.json").unlink(missing_ok=True)
swift(
    "data synthetic --out cohort --format bids --subjects 20 --frames 80 --grid 16 16 16 --spacing 12 --sites 1 "
    "--seed 5 --frame-r 1 --signal 3 --noise-white 0.5 --noise-smooth 0.3 --drift 0.2 --motion 0.2 --quiet"
)

# %%
# Into a store
# ------------
# ``ingest`` finds the preprocessed runs with their masks, confounds and events. It brings each scan to one orientation,
# grid and voxel size, and writes it with its statistics. Real scans take the default grid of 96 x 96 x 96 voxels of
# 2 mm; leave out ``--grid`` and ``--spacing`` then.

swift("data ingest cohort --out store --grid 16 16 16 --spacing 12 --quiet")
swift("data info store")

# %%
# Who is trained on, and who is kept for the test
# -----------------------------------------------
# All scans of a person go into the same part.

swift("data split store --out split.json --val 0.2 --test 0.2")

# %%
# Look at a scan
# --------------
# A store opens in Python. Voxels outside the brain are not kept, so a frame is one row of brain voxels. The temporal
# signal-to-noise ratio (tSNR) is the mean of a voxel over its standard deviation in time: low at the edge of the brain,
# and low everywhere in a bad scan. The carpet plot shows every brain voxel (rows) in every frame (columns). Vertical
# stripes in it are motion. ``swift-fmri data report store --out qc.html`` makes a page with such pictures of all scans.

import matplotlib.pyplot as plt
import numpy as np

from swift.data.store.reader import Store

store = Store(WORK / "store")
scan = 0
mask = store.mask(scan)  # (X, Y, Z), RAS+
bold = store.values(scan)  # (T, voxels), in the scan's own units
tsnr = np.full(mask.shape, np.nan)
tsnr[mask] = bold.mean(0) / bold.std(0)
mean = np.zeros(mask.shape)
mean[mask] = bold.mean(0)

fig, axes = plt.subplots(2, 4, figsize=(9, 4.4), width_ratios=[1, 1, 1, 2.2], layout="constrained")
centre = [round(axis.mean()) for axis in mask.nonzero()]
for column, (plane, axis) in enumerate({"sagittal": 0, "coronal": 1, "axial": 2}.items()):
    for row, (values, colours) in enumerate([(mean, "gray"), (tsnr, "viridis")]):
        image = axes[row, column].imshow(np.take(values, centre[axis], axis).T, origin="lower", cmap=colours)
        axes[row, column].set(xticks=[], yticks=[])
    axes[0, column].set_title(plane)
axes[0, 0].set_ylabel("mean")
axes[1, 0].set_ylabel("tSNR")
fig.colorbar(image, ax=axes[1, :3].tolist(), shrink=0.8)
axes[0, 3].remove()
axes[1, 3].remove()
carpet = fig.add_subplot(axes[0, 3].get_gridspec()[:, 3])
carpet.imshow(((bold - bold.mean(0)) / bold.std(0)).T, aspect="auto", cmap="gray", vmin=-2, vmax=2)
carpet.set(xlabel=f"frame (TR {store.scans[scan].tr:g} s)", ylabel="brain voxels", yticks=[], title="carpet plot")
fig.suptitle(f"{store.scans[scan].scan_id}: median tSNR {np.nanmedian(tsnr):.0f}")
plt.show()
