"""
4. Fine-tune on a task, beside baselines
========================================

Does the model predict something that you care about, and does it do so better than simple methods? Here it predicts a
number for every frame: the course that drives one network of the synthetic brains.
"""

# %%
# Fine-tune
# ---------
# ``init=`` takes the weights of the pre-trained run, ``task.adapt=full`` trains all of them. A task is a YAML file.
# ``task=valence`` comes with swift: it reads the column ``valence`` of the events that were ingested with each scan and
# convolves it with the haemodynamic response. The task guide shows how to write your own.

import shutil

from shell import WORK, needs, show, swift

needs("store", "split.json", "pretrained", example="plot_2_pretrain.py")
for name in ("finetuned", "scratch", "baselines", "table"):
    shutil.rmtree(WORK / name, ignore_errors=True)
DATA = "data=store data.path=store data.split=split.json data.frames=16 data.clip_stride=4 data.workers=0 "
TRAIN = "data.batch_size=8 optimizer.lr=3e-3 trainer.max_steps=60 trainer.val_every=30 trainer.threads=1 "
swift(f"train task=valence init=pretrained task.adapt=full {DATA} {TRAIN} run_dir=finetuned")

# %%
# From scratch
# ------------
# The same model from random weights. Only beside this run can you say what pre-training was good for.

MODEL = "model.embed_dim=24 model.depths=[2,2] model.num_heads=[2,4] model.patch_size=[4,4,4,1] model.window=[2,2,2,8] "
swift(f"train task=valence {DATA} {MODEL} {TRAIN} run_dir=scratch")

# %%
# Baselines
# ---------
# The same question, people and test frames, answered by simple methods.

swift(f"baselines task=valence {DATA} run_dir=baselines")

# %%
# The table
# ---------
# Scores of the test people, read once, with 95 % intervals over people. On this cohort the driven network is so plain
# that a linear method does very well. A result like that is worth knowing before you train anything large.

swift("report table1 finetuned scratch baselines --out table")
show("table/table1.png")
