"""Spatial maps: what a patch says of another one far away, read and drawn in closed form.

After z-scoring in time nothing tells where a patch is, and one embedding for all places cannot project on networks
whose loadings differ from place to place. So K maps on the voxel grid are fitted to the visible voxels of each frame by
a ridge regression, as in the first step of dual regression (Nickerson et al. 2017). With maps m_k scaled to the
standard deviation of their courses, and s2 the variance of what they leave,

    a = (M_v' M_v + s2 I)^-1 M_v' x_v

is the expected course of every map given the visible voxels v (probabilistic PCA), well-conditioned for any mask.

What the maps leave is alike in neighbouring voxels and frames: `fill` predicts a hidden voxel from the visible ones
beside it. The network learns what both leave.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid, K maps, P patches in space, v voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.init import NORMAL, ZERO, Init, draw
from swift.models.layers import token_grid
from swift.models.masking import mask_voxels


def patch_rows(volume: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, K, X, Y, Z) -> (B, P, K, v), padded at the end with 0; patches ordered x, y, z."""
    batch, maps = volume.shape[:2]
    pads = [-n % p for n, p in zip(volume.shape[2:], patch)]
    if any(pads):
        volume = F.pad(volume, (0, pads[2], 0, pads[1], 0, pads[0]))
    px, py, pz = patch[:3]
    x, y, z = (n // p for n, p in zip(volume.shape[2:], patch))
    cut = volume.reshape(batch, maps, x, px, y, py, z, pz).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(batch, x * y * z, maps, px * py * pz)


def read_courses(x: Tensor, mask: Tensor, brain: Tensor, maps: Tensor, noise: Tensor, patch: Sequence[int]) -> Tensor:
    """The course of each map by a ridge regression on the visible brain voxels of each frame.

    The Gram matrix of the visible voxels of a frame is the sum of those of its visible patches, K^2 numbers each: they
    are made once a clip, not once a frame.

    Args:
        x: (B, X, Y, Z, T) voxels.
        mask: bool (B, x, y, z, t), True = the patch is hidden.
        brain: bool (B, X, Y, Z).
        maps: (B, K, X, Y, Z), or (1, K, X, Y, Z) for all.
        noise: (B,) or (1,): s2.
        patch: Voxels x, y, z and frames.

    Returns:
        (B, T, K).
    """
    batch, frames = len(x), x.shape[-1]
    shown = ~mask.flatten(1, 3).transpose(1, 2)  # (B, t, P)
    inside = maps * brain.unsqueeze(1).to(maps.dtype)
    rows = patch_rows(inside, patch)
    used = patch_rows(brain.unsqueeze(1), patch).flatten(2).any(2).any(0).nonzero()[:, 0]
    rows, seen = rows[:, used], shown[:, :, used].to(maps.dtype)
    gram = seen @ (rows @ rows.transpose(2, 3)).flatten(2)  # (B, t, K * K)
    frame_rows = patch_rows(x.permute(0, 4, 1, 2, 3), patch)[:, used]  # (B, P', T, v)
    seen = seen.repeat_interleave(patch[3], 1)[:, :frames]
    # where, not a product: what is hidden may be anything, NaN too.
    frame_rows = torch.where(seen.transpose(1, 2).unsqueeze(3) > 0, frame_rows, 0.0)
    right = torch.einsum("bptv,bpkv->btk", frame_rows, rows)
    k = maps.shape[1]
    ridge = noise.view(-1, 1, 1, 1) * torch.eye(k, dtype=maps.dtype, device=maps.device)
    gram = gram.view(batch, -1, k, k).repeat_interleave(patch[3], 1)[:, :frames]
    return torch.linalg.solve(gram + ridge, right.unsqueeze(-1)).squeeze(-1)


def draw_maps(courses: Tensor, maps: Tensor) -> Tensor:
    """Courses (B, T, K) times maps (B or 1, K, X, Y, Z) -> (B, X, Y, Z, T)."""
    flat = maps.flatten(2).expand(len(courses), -1, -1)
    return torch.bmm(flat.transpose(1, 2), courses.transpose(1, 2)).unflatten(1, maps.shape[2:])


NEIGHBOURS = (
    (1, 0, 0, 0),
    (-1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, -1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, -1, 0),
    (0, 0, 0, 1),
    (0, 0, 0, -1),
)
"""Offsets x, y, z, t of the voxels that a hidden one is filled from."""


class _Padded:
    """Clips with a border that is never seen: in flat memory a neighbour is then a fixed step away."""

    def __init__(self, rest: Tensor, seen: Tensor) -> None:
        # Frames outermost, as clips lie in memory.
        known = F.pad(seen.permute(0, 4, 1, 2, 3), [1] * 8).contiguous()
        self.shape, strides = known.shape, known.stride()
        self.clip = strides[0]
        self.known = known.flatten()
        self.values = F.pad(torch.where(seen, rest, 0.0).permute(0, 4, 1, 2, 3), [1] * 8).flatten()
        self.steps = [x * strides[2] + y * strides[3] + z * strides[4] + t * strides[1] for x, y, z, t in NEIGHBOURS]

    def places(self, chosen: Tensor) -> Tensor:
        """Flat places of the True voxels of (B, X, Y, Z, T)."""
        return F.pad(chosen.permute(0, 4, 1, 2, 3), [1] * 8).flatten().nonzero()[:, 0]

    def per_clip(self, numbers: Tensor, places: Tensor) -> Tensor:
        """Sums over the clips that the places lie in: (B,)."""
        return numbers.new_zeros(self.shape[0]).index_add_(0, places // self.clip, numbers)


def _correlations(padded: _Padded) -> Tensor:
    """Correlation of visible neighbours along x, y, z and t in each clip: (B, 4), in [0, 0.95]."""
    places = padded.known.nonzero()[:, 0]
    here = padded.values[places]
    found = []
    for step in padded.steps[::2]:
        both = padded.known[places + step]
        there = padded.values[places + step]
        together = padded.per_clip(here * there, places)
        alone = padded.per_clip((here.square() + there.square()) * both / 2, places)
        found.append((together / alone.clamp(min=1e-12)).clamp(0.0, 0.95))
    return torch.stack(found, 1)


def fill_weights(correlation: Tensor) -> Tensor:
    """Weights of the eight neighbours for each set of visible ones.

    Simple kriging with the covariance of four crossed AR(1) processes, rho_x^|dx| rho_y^|dy| rho_z^|dz| rho_t^|dt|.

    Args:
        correlation: (B, 4).

    Returns:
        (B, 256, 8); bit i of the row's number says whether NEIGHBOURS[i] is visible. Of the others the weight is 0.
    """
    offsets = torch.tensor(NEIGHBOURS, device=correlation.device)

    def covariance(distance: Tensor) -> Tensor:
        return (correlation.view(-1, *[1] * (distance.ndim - 1), 4) ** distance.abs()).prod(-1)

    own = covariance(offsets)  # (B, 8)
    between = covariance(offsets[:, None] - offsets[None])  # (B, 8, 8)
    bits = torch.tensor(list(product((False, True), repeat=8)), device=correlation.device).flip(1)  # (256, 8)
    both = bits[:, :, None] & bits[:, None]
    matrix = torch.where(both, between.unsqueeze(1), torch.eye(8, dtype=own.dtype, device=own.device))
    right = own.unsqueeze(1) * bits
    return torch.linalg.solve(matrix, right.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def fill(rest: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """Expected value of hidden voxels given the visible ones beside them in space and time.

    How alike neighbours are is measured in each clip, on its visible voxels: nothing is learned here, and no gradient
    goes through.

    Args:
        rest: (B, X, Y, Z, T), anything where it is not seen.
        seen: bool, the same shape.
        wanted: bool, the same shape: the voxels to fill.

    Returns:
        The same shape; 0 where nothing beside is visible, and where it is not wanted.
    """
    padded = _Padded(rest, seen)
    table = fill_weights(_correlations(padded)).flatten(0, 1)
    places = padded.places(wanted)
    code = torch.zeros(len(places), dtype=torch.long, device=rest.device)
    for bit, step in enumerate(padded.steps):
        code += padded.known[places + step].long() << bit
    reached = code > 0
    places, code = places[reached], code[reached]
    weights = table[code + 256 * (places // padded.clip)]
    total = torch.zeros(len(places), dtype=rest.dtype, device=rest.device)
    for bit, step in enumerate(padded.steps):
        total += weights[:, bit] * padded.values[places + step]
    found = torch.zeros_like(padded.values)
    found[places] = total
    return found.view(padded.shape)[:, 1:-1, 1:-1, 1:-1, 1:-1].permute(0, 2, 3, 4, 1)


Maps = tuple[Tensor, Tensor]
"""(B, K, X, Y, Z) maps and (B,) s2."""


class LinearPart(nn.Module):
    """Maps and fill as a part of the model: what a hidden voxel is expected to be, before the network adds to it.

    Shared maps are parameters: made from training frames first, then trained. A scan's own come with the batch.
    """

    def __init__(self, cfg: ModelConfig, grid: Sequence[int]):
        super().__init__()
        self.patch = tuple(cfg.patch_size)
        self.count = cfg.maps
        self.shared = cfg.maps_of == "shared"
        if self.shared:
            self.maps = nn.Parameter(torch.zeros(cfg.maps, *grid))
            self.log_noise = nn.Parameter(torch.zeros(1))
            draw(self)

    def own_initial_values(self) -> dict[str, Init]:
        """How shared maps begin where no training frames give them."""
        return {"maps": NORMAL, "log_noise": ZERO} if self.shared else {}

    def set_of(self, own: Maps | None) -> Maps:
        """The maps to use.

        Raises:
            ValueError: maps belong to each scan, and none were given.
        """
        if self.shared:
            # No solver works in bf16.
            maps, noise = (one if one.dtype.itemsize >= 4 else one.float() for one in (self.maps, self.log_noise))
            return maps.unsqueeze(0), noise.exp()
        if own is None:
            raise ValueError("model.maps_of=scan: maps belong to each scan, and this one has none")
        return own

    def courses(self, x: Tensor, mask: Tensor, brain: Tensor, own: Maps | None = None) -> Tensor:
        """Expected course of every map (B, T, K); arguments as of `forward`."""
        maps, noise = self.set_of(own)
        return read_courses(x[:, 0].to(maps.dtype), mask, brain, maps, noise, self.patch)

    def courses_of_all(self, x: Tensor, brain: Tensor, own: Maps | None = None) -> Tensor:
        """Course of every map (B, T, K) in clips of which nothing is hidden; arguments as of `forward`."""
        tokens = token_grid(x.shape[2:], self.patch)
        with torch.autocast(x.device.type, enabled=False):
            return self.courses(x, torch.zeros(len(x), *tokens, dtype=torch.bool, device=x.device), brain, own)

    def forward(self, x: Tensor, mask: Tensor, brain: Tensor, own: Maps | None = None) -> Tensor:
        """The linear prediction.

        Args:
            x: (B, 1, X, Y, Z, T) voxels.
            mask: bool (B, x, y, z, t), True = the patch is hidden.
            brain: bool (B, X, Y, Z).
            own: Maps of each clip's scan; None: shared ones.

        Returns:
            (B, 1, X, Y, Z, T): of a hidden voxel maps and fill, of a visible one the maps alone; 0 outside the brain.
        """
        with torch.autocast(x.device.type, enabled=False):
            maps, _ = self.set_of(own)
            drawn = draw_maps(self.courses(x, mask, brain, own), maps)
            hidden = mask_voxels(mask, self.patch, x.shape[2:]) & brain.unsqueeze(-1)
            seen = brain.unsqueeze(-1) & ~hidden
            filled = fill((x[:, 0].to(drawn.dtype) - drawn).detach(), seen, hidden)
            return torch.where(brain.unsqueeze(-1), drawn + filled, 0.0).unsqueeze(1)
