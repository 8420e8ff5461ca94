"""What a linear model makes of a hidden voxel: a low-rank Gaussian, conditioned on the visible voxels of each frame.

Probabilistic PCA (Tipping & Bishop 1999): a frame is x = U diag(l)^1/2 z + e, with U (V, K) orthonormal, z ~ N(0, I)
and e ~ N(0, s2 I). Its mean is 0, as normalization has taken the mean off; where it has not, a component carries it.
Given some visible voxels v, the expected frame is U a with

    a = (U_v' U_v + s2 diag(1 / l))^-1 U_v' x_v,

a ridge regression of K unknowns a frame, which equals the conditional mean of the full V x V Gaussian.

Frames come in blocks, and of all frames seen only the strongest directions are kept (incremental SVD by merge and
truncate, Ross et al. 2008): memory is that of a few hundred frames, whatever the number of scans. Exact as long as
nothing had to be truncated.

Legend: V voxels, n frames, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swift.utils.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """A fitted model.

    Attributes:
        basis: (V, K) float32, orthonormal columns, strongest first.
        variance: (K,) float64, l: of the components, without the noise.
        noise: s2, of every voxel.
    """

    basis: Tensor
    variance: Tensor
    noise: float

    @property
    def rank(self) -> int:
        """K."""
        return self.basis.shape[1]

    def courses(self, values: Tensor, visible: Tensor) -> Tensor:
        """Expected strength of each component.

        Args:
            values: (V, n) frames; what is hidden is not looked at.
            visible: bool (V, n).

        Returns:
            (n, K) float32.
        """
        shown = torch.where(visible, values.float(), 0.0)
        right = (shown.T @ self.basis).double()
        penalty = torch.diag(self.noise / self.variance)
        found = []
        for frame in range(values.shape[1]):
            seen = self.basis[visible[:, frame]]
            found.append(torch.linalg.solve((seen.T @ seen).double() + penalty, right[frame]))
        return torch.stack(found).float()

    def predict(self, values: Tensor, visible: Tensor) -> Tensor:
        """Expected value of every voxel given the visible ones: (V, n) float32. Arguments as of `courses`."""
        return self.basis @ self.courses(values, visible).T

    def project(self, values: Tensor) -> Tensor:
        """(V, n) frames of which all is visible, as the model sees them: the same shape."""
        return self.predict(values, torch.ones_like(values, dtype=torch.bool))


class Sketch:
    """The strongest directions of all frames that were added, and their total variance.

    Args:
        keep: Directions to keep.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.frames = 0
        self.total = 0.0
        self.rows: Tensor | None = None

    def add(self, frames: Tensor) -> None:
        """Add (n, V) frames of any type of float."""
        frames = frames.float()
        self.frames += len(frames)
        self.total += float(frames.double().square().sum())
        both = frames if self.rows is None else torch.cat([self.rows, frames])
        if len(both) > self.keep:
            # By the small side: (n + keep)^2 numbers, in double precision.
            squares, left = torch.linalg.eigh((both @ both.T).double())
            strong = left[:, squares.argsort(descending=True)[: self.keep]]
            both = strong.T.float() @ both
        self.rows = both

    def fit(self, rank: int) -> LowRank:
        """The model of maximum likelihood with so many components (Tipping & Bishop 1999, eq. 7 and 8).

        Raises:
            UserError: more components than the frames, or the kept directions, have.
        """
        rows = self.rows
        assert rows is not None, "no frame was added"
        most = min(len(rows), self.frames - 1, rows.shape[1] - 1)
        if not 1 <= rank <= most:
            raise UserError(
                f"a low-rank model with {rank} components: {self.frames} training frames of {rows.shape[1]} voxels "
                f"carry at most {most}"
            )
        squares, left = torch.linalg.eigh((rows @ rows.T).double())
        order = squares.argsort(descending=True)[:rank]
        values = squares[order].clamp(min=1e-12)
        basis = (rows.T @ left[:, order].float()) / values.sqrt().float()
        each = values / self.frames
        noise = max(self.total / self.frames - float(each.sum()), 0.0) / (rows.shape[1] - rank)
        noise = max(noise, 1e-6 * float(each.max()))
        return LowRank(basis, (each - noise).clamp(min=1e-6 * float(each.max())), noise)
