"""
2. Pre-train a model and see what it reconstructs
=================================================

Pre-training hides most patches of a clip and lets the model fill them in. No labels are needed. This example trains a
model of 125,000 parameters for 120 steps.
"""

# %%
# Train
# -----
# ``data.frames`` is the length of a clip, ``model.patch_size`` the voxels (x, y, z) and frames that become one token.
# ``task.mask_ratio`` is 0.8 unless you say otherwise: 80 % of the patches are hidden. The model settings here make it
# small enough for an example. With real scans, ``model=7m`` is a good beginning.

import shutil

from shell import WORK, needs, show, swift

needs("store", "split.json", example="plot_1_ingest.py")
shutil.rmtree(WORK / "pretrained", ignore_errors=True)
MODEL = "model.embed_dim=24 model.depths=[2,2] model.num_heads=[2,4] model.patch_size=[4,4,4,1] model.window=[2,2,2,8] "
DATA = "data=store data.path=store data.split=split.json data.frames=16 data.clip_stride=8 data.workers=0 "
swift(
    f"train {DATA} {MODEL} data.batch_size=4 trainer.max_steps=120 trainer.val_every=40 trainer.log_every=5 "
    "trainer.threads=1 run_dir=pretrained"
)

# %%
# How to read this
# ----------------
# The loss is the mean absolute error of hidden brain voxels. Voxels are z-scored in time, so a model that always says
# "the mean" has an error of about 0.8. The table compares the model with simple ways of filling in, on people whom
# neither has seen. A short run like this one beats the averages and loses to the linear predictions, which know how
# voxels of a brain go together. A longer one closes the gap; ``model.maps=16`` gives the network such a linear
# prediction to begin with.

show("pretrained/figures/loss.png")

# %%
# One clip
# --------
# What the model saw of a clip of a held-out person, what it made of it, and the difference. The curve is the course of
# the voxel whose error is the median, neither the best nor the worst.

show("pretrained/figures/reconstruction.png")
