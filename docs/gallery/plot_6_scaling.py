"""
6. Fit a scaling law
====================

How much does a larger model help, and how much more data? A scaling law answers with a few small runs:
L(N, D) = E + A / N^alpha + B / D^beta, where L is the held-out error, N the number of parameters and D the number of
tokens seen.
"""

# %%
# A study is a file
# -----------------
# It names settings of all runs, and points: here three widths, each trained for three budgets. ``cohort`` describes the
# synthetic scans, which are made first: little noise and slow signals, so that the error has room to fall.

import shutil

from shell import WORK, show, swift

STUDY = """
name: scaling
cohort: {n_subjects: 5, grid: [12, 12, 12], spacing: 16.0, tr: 1.0, noise_white: 0.05, noise_smooth: 0.0, drift: 0.0,
         motion: 0.0, site_effect: 0.0}
base:
  - data=store
  - data.grid=[12,12,12]
  - data.spacing=16.0
  - data.frames=8
  - data.clip_stride=2
  - data.val_gap=8
  - data.batch_size=8
  - data.workers=0
  - model.depths=[2,2]
  - model.num_heads=[1,2]
  - model.patch_size=[3,3,3,2]
  - model.window=[2,2,2,2]
  - model.decoder_dim=32
  - task.mask_ratio=0.5
  - optimizer=adamw_mup      # one learning rate for all widths
  - optimizer.base_width=24
  - optimizer.lr=0.006
  - optimizer.warmup_steps=10
  - trainer.threads=1
  - trainer.log_every=5
  - trainer.val_every=1000
  - trainer.val_batches=8
  - trainer.keep_checkpoints=1
  - trainer.figures=false
points:
  - model.embed_dim: [6, 12, 24]
    trainer.max_steps: [30, 60, 120]
report:
  - [scaling_laws, "{runs}", --out, "{out}", --draws, "300"]
"""
for name in ("scaling_runs", "scaling"):
    shutil.rmtree(WORK / name, ignore_errors=True)
(WORK / "scaling").mkdir(parents=True)
(WORK / "scaling" / "study.yaml").write_text(STUDY)

# %%
# Run it
# ------
# Each point is a run of its own. If the command is stopped, the same command goes on where it was.

swift("study scaling/study.yaml --runs scaling_runs --out scaling", last=30)

# %%
# The fit
# -------
# Points are runs, lines the fitted law, the band its interval. Nine runs of a few seconds say how the method is used.
# They hardly determine the exponents: read the intervals before the numbers, and what the command calls "not
# determined". The same file with larger values, and ``+launcher=`` on the command line, is a real study.

show("scaling/scaling_laws.png")
