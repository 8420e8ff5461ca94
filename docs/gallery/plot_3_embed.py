"""
3. Embed scans and cluster them
===============================

An embedding is a short vector that describes a scan, a clip or a frame: the mean of the encoder's features over the
brain. Any method for tables takes it from there. Here we cluster frames into states of the brain.
"""

# %%
# From scans to rows
# ------------------
# ``--per frame`` gives a row for each frame. ``--per scan``, the default, gives one for each scan, and
# ``--per subject`` one for each person.

from shell import WORK, needs, swift

needs("store", "pretrained", example="plot_2_pretrain.py")
(WORK / "embeddings.npz").unlink(missing_ok=True)
swift("embed pretrained store --per frame --out embeddings.npz --quiet")

# %%
# The file opens with NumPy alone.

import numpy as np

with np.load(WORK / "embeddings.npz", allow_pickle=False) as content:
    rows, scan, frame = content["embedding"], content["scan"], content["frame"]
print(f"{rows.shape[0]} frames of {len(set(scan))} scans, {rows.shape[1]} features each")

# %%
# States
# ------
# We take each scan's own mean away, so that states are not just people, and cluster all frames into four states. No
# label was used so far, neither in pre-training nor here.

from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

for name in set(scan):
    rows[scan == name] -= rows[scan == name].mean(0)
state = KMeans(n_clusters=4, n_init=10, random_state=0).fit_predict(rows)
places = PCA(2, random_state=0).fit_transform(rows)

# %%
# Do the states mean anything?
# ----------------------------
# In these scans a known course, ``valence``, drives one network. If the states follow it, its mean differs between
# them. The share of its variance that lies between states says how much; shuffled frames say what chance gives.

import matplotlib.pyplot as plt

from swift.data.synthetic import load_truth

truth = load_truth(WORK / "cohort")["scans"]
valence = np.array([truth[str(name)]["valence_bold"][at] for name, at in zip(scan, frame)])


def between(groups: np.ndarray) -> float:
    """Share of the variance of valence between groups of frames."""
    means = np.array([valence[groups == group].mean() for group in range(4)])
    return means[groups].var() / valence.var()


draw = np.random.default_rng(0)
found, chance = between(state), max(between(draw.permutation(state)) for _ in range(20))

fig, axes = plt.subplots(1, 2, figsize=(9, 4), width_ratios=[1.2, 1], layout="constrained")
for number in range(4):
    axes[0].scatter(*places[state == number].T, s=6, label=f"state {number + 1}")
axes[0].set(xlabel="first principal component", ylabel="second principal component")
axes[0].legend(markerscale=2)
axes[1].boxplot([valence[state == number] for number in range(4)], showfliers=False)
axes[1].set(xlabel="state", ylabel="valence")
axes[1].set_title(f"between states: {100 * found:.0f} % of the variance (shuffled: {100 * chance:.1f} %)", fontsize=9)
plt.show()
