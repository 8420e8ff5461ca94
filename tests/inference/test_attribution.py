"""Attributions against closed forms, loops and the completeness axiom; maps in the file's own space."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swift.data.ingest.folder import one_file
from swift.inference.attribution import (
    Share,
    attribute,
    baseline_of,
    choose_target,
    integrated_gradients,
    occlusion,
    on_own_grid,
    overlap,
    rank_correlation,
    shuffle_weights,
)
from swift.inference.contract import Contract
from swift.inference.fit_scan import FittedScan, Fitting, fit
from swift.inference.model import Trained
from swift.models.encoder import SwinEncoder
from swift.models.pooling import brain_tokens, pool
from swift.utils.errors import UserError
from tests.data import scans
from tests.small import settings

CONTRACT = Contract((12, 12, 12), 4.0, 8, 1, "zscore_voxel", 0.0)
CPU = torch.device("cpu")


class Readout(nn.Module):
    """An encoder and a line: enough of a model to be explained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = SwinEncoder(settings().model, (12, 12, 12), 8)
        self.line = nn.Linear(24, 1)

    def forward(self, bold: Tensor, brain: Tensor) -> Tensor:
        feature = self.encoder(bold)[-1]
        out: Tensor = self.line(pool(feature, brain_tokens(brain, (4, 4, 4), 1)).mean(1))[:, 0]
        return out


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> FittedScan:
    """20 frames at 3 mm, stored as PIR, with a mask beside it."""
    folder = tmp_path_factory.mktemp("scan")
    scans.save(folder / "a.nii.gz", scans.bold(20), codes="PIR")
    scans.save(folder / "a_mask.nii.gz", scans.ellipsoid(), codes="PIR", dtype=np.uint8)
    return fit(one_file(folder / "a.nii.gz"), CONTRACT, Fitting())


def one_clip(scan: FittedScan) -> tuple[Tensor, Tensor]:
    clip = scan.clips([0], CPU)
    return clip["bold"].contiguous(), clip["brain"]


def test_integrated_gradients_of_a_square_are_exact(scan: FittedScan) -> None:
    bold, brain = one_clip(scan)
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=tuple(bold.shape))).float()

    def score(x: Tensor, _: Tensor) -> Tensor:
        return (weight * x**2).flatten(1).sum(1)

    still = baseline_of(bold, brain, "mean")
    found, gap = integrated_gradients(score, bold, brain, still, 100, 2)
    torch.testing.assert_close(found, weight * (bold**2 - still**2), atol=1e-4, rtol=1e-4)
    assert abs(gap) < 1e-3


def test_gradients_sum_to_the_difference_of_the_outputs(scan: FittedScan) -> None:
    model = Readout().eval()
    starts = scan.starts()
    maps = attribute(model, scan, starts, CPU, batch=6)
    change = maps.outputs - maps.baselines
    assert np.abs(change).min() > 1e-3  # there is something to share out
    np.testing.assert_allclose(maps.gradients.sum(), change.mean(), rtol=0.01)
    assert (np.abs(maps.gaps) < 0.01 * np.abs(change)).all()
    assert (maps.gradients[~scan.mask] == 0).all()
    with torch.no_grad():
        bold = torch.cat([scan.clips([start], CPU)["bold"] for start in starts])
        brain = torch.from_numpy(scan.mask).expand(len(starts), -1, -1, -1)
        np.testing.assert_allclose(maps.outputs, model(bold, brain).numpy(), atol=1e-5)


@pytest.mark.parametrize("window", [4, 5])
def test_occlusion_equals_cube_after_cube_by_hand(scan: FittedScan, window: int) -> None:
    model = Readout().eval()
    bold, brain = one_clip(scan)
    still = baseline_of(bold, brain, "zero")
    found = occlusion(model, bold, brain, still, window, 7)
    expected = torch.zeros(12, 12, 12)
    with torch.no_grad():
        whole = model(bold, brain)
        for corner in np.ndindex(*[-(-12 // window)] * 3):
            cube = tuple(slice(i * window, (i + 1) * window) for i in corner)
            changed = bold.clone()
            changed[(0, 0, *cube)] = still[(0, 0, *cube)]
            expected[cube] = (whole - model(changed, brain)).item()
    torch.testing.assert_close(found, torch.where(brain[0], expected, 0.0), atol=1e-6, rtol=1e-4)
    assert found.abs().max() > 1e-4


def test_a_baseline_stands_still_in_the_brain_alone(scan: FittedScan) -> None:
    bold, brain = one_clip(scan)
    bold = torch.where(brain[:, None, ..., None], bold, -3.0)
    for kind, level in (("zero", torch.zeros(())), ("mean", bold.mean(-1, keepdim=True))):
        still = baseline_of(bold, brain, kind)
        assert (still[0, 0, ~brain[0]] == -3).all()
        inside = torch.broadcast_to(level, bold.shape)[0, 0, brain[0]]
        torch.testing.assert_close(still[0, 0, brain[0]], inside)


def test_a_map_keeps_its_places_in_the_files_own_space(scan: FittedScan) -> None:
    # A map that is linear in world coordinates is interpolated without error.
    places = np.indices((12, 12, 12)).reshape(3, -1).T
    world = places @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    values = (world @ [1.0, 2.0, -0.5] + 7).reshape(12, 12, 12)
    image = on_own_grid(values, scan)
    assert scan.origin is not None
    own = nib.load(scan.origin.path)
    assert image.shape == own.shape[:3] == (scans.SHAPE[1], scans.SHAPE[2], scans.SHAPE[0])
    np.testing.assert_allclose(image.affine, own.affine, atol=1e-5)
    voxels = np.indices(image.shape).reshape(3, -1).T
    there = voxels @ own.affine[:3, :3].T + own.affine[:3, 3]
    on_grid = (there - scan.affine[:3, 3]) / 4.0
    inside = ((on_grid >= 0) & (on_grid <= 11)).all(1)
    expected = there @ [1.0, 2.0, -0.5] + 7
    np.testing.assert_allclose(np.asarray(image.dataobj).reshape(-1)[inside], expected[inside], atol=1e-3)
    assert inside.mean() > 0.35


def test_a_planted_line_is_found_and_lost_with_its_weights(scan: FittedScan) -> None:
    region = np.zeros((12, 12, 12), bool)
    region[3:6, 4:8, 5:8] = True
    region &= scan.mask
    line = nn.Linear(12**3, 1)
    noise = np.random.default_rng(0).normal(size=region.shape)
    with torch.no_grad():
        line.weight.copy_(torch.from_numpy(np.where(region, 1.0, 0.05 * noise)).float().reshape(1, -1))

    def score(bold: Tensor, brain: Tensor) -> Tensor:
        # squares: the mean over a clip is all that a line could see of z-scores, and that is next to nothing
        out: Tensor = line((bold[:, 0] ** 2).mean(-1).flatten(1))[:, 0]
        return out

    maps = attribute(score, scan, scan.starts(), CPU, window=2)
    assert maps.occlusion is not None
    assert overlap(maps.gradients, region, scan.mask)["auroc"] == 1.0
    assert overlap(maps.gradients, region, scan.mask)["dice"] == 1.0
    assert overlap(maps.occlusion, region, scan.mask)["auroc"] > 0.8
    shuffle_weights(line, 1)
    lost = attribute(score, scan, scan.starts(), CPU)
    assert abs(overlap(lost.gradients, region, scan.mask)["auroc"] - 0.5) < 0.2
    assert rank_correlation(maps.gradients, lost.gradients, scan.mask) < 0.5


def test_shuffled_weights_keep_their_distribution() -> None:
    model = Readout()
    before = {name: value.clone() for name, value in model.named_parameters()}
    shuffle_weights(model, 0)
    for name, value in model.named_parameters():
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
    assert not torch.equal(model.line.weight, before["line.weight"])


def test_overlap_by_hand() -> None:
    values = np.array([[[-4.0, 1.0, 3.0, 2.0, 99.0]]])
    region = np.array([[[True, False, False, True, True]]])
    mask = np.array([[[True, True, True, True, False]]])
    found = overlap(values, region, mask)  # sizes 4 1 3 2: the region's are 4 and 2; with signs -2 of 2 in all
    assert found == {"auroc": 0.75, "dice": 0.5, "chance": 0.5, "inside": -1.0}


def share_of(maps: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Of all clips one after the other."""
    share = Share(maps.shape[1:])
    for values, by in zip(maps, change, strict=True):
        share.add(values, by)
    return share.value()


def test_shares_are_slopes_on_the_change() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(size=30) + 0.5
    parts = rng.dirichlet(np.ones(8)).reshape(2, 2, 2)
    maps = change[:, None, None, None] * parts
    np.testing.assert_allclose(share_of(maps, change), parts, rtol=1e-12)
    noise = rng.normal(size=maps.shape)
    by_voxel = [
        np.linalg.lstsq(change[:, None], (maps + noise)[:, i, j, k], rcond=None)[0][0]
        for i, j, k in np.ndindex(2, 2, 2)
    ]
    np.testing.assert_allclose(share_of(maps + noise, change).ravel(), by_voxel, rtol=1e-9)
    assert (share_of(np.ones((3, 2, 2, 2)), np.zeros(3)) == 0).all()


def test_noise_of_clips_cancels_in_shares_and_not_in_sizes(scan: FittedScan) -> None:
    # What moves together is the region, up in some clips and down in others. Elsewhere each voxel moves by itself, and
    # half as much again: it is larger in every single clip, and comes to nothing over clips.
    rng = np.random.default_rng(0)
    region = np.zeros((12, 12, 12), bool)
    region[3:6, 4:8, 5:8] = True
    region &= scan.mask
    weight = torch.from_numpy(np.where(region, 1.0, rng.choice([-1.0, 1.0], region.shape)) * scan.mask).float()

    class Planted:
        """The scan's brain: the region's voxels have one value, all others each their own."""

        mask = scan.mask

        def clips(self, starts: list[int], device: torch.device) -> dict[str, Tensor]:
            draw = np.random.default_rng(starts[0])
            bold = 1.5 * draw.normal(size=(1, 1, 12, 12, 12, 8))
            bold[0, 0, region] = draw.normal()
            return {"bold": torch.from_numpy(bold).float(), "brain": torch.from_numpy(scan.mask)[None]}

    def score(bold: Tensor, brain: Tensor) -> Tensor:
        return (bold[:, 0, ..., 4] * weight).flatten(1).sum(1)

    maps = attribute(score, Planted(), list(range(80)), CPU, window=4)  # type: ignore[arg-type]
    change = maps.outputs - maps.baselines
    assert change.min() < -1 < 1 < change.max()
    np.testing.assert_allclose(maps.share.sum(), 1, rtol=1e-3)
    found = overlap(maps.share, region, scan.mask)
    assert found["auroc"] > 0.95
    assert found["inside"] > 5 * found["chance"]
    assert overlap(maps.size, region, scan.mask)["auroc"] < 0.2
    assert maps.occlusion is not None
    assert overlap(maps.occlusion, region, scan.mask)["inside"] > 3 * found["chance"]


def test_every_end_of_a_piece_is_put_through_the_model_once(scan: FittedScan) -> None:
    bold, brain = one_clip(scan)
    single = []

    def score(x: Tensor, _: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            single.append(float(x.abs().sum()))
        return x.flatten(1).sum(1).tanh()

    integrated_gradients(score, bold, brain, baseline_of(bold, brain, "zero"), 100, 8)
    assert len(single) >= 4
    assert len(set(single)) == len(single)


def test_maps_of_a_scan_cannot_be_made_for_another() -> None:
    """Their courses are what the head has learned from; a new scan's maps would come in another order."""
    trained = {}
    for kind, more in (("scan", "data.split=null"), ("shared", "data.split=unused.json")):
        cfg = settings("task=task_rest", "task.courses=true", "model.maps=3", f"model.maps_of={kind}", more)
        trained[kind] = Trained("run", nn.Identity(), cfg, CONTRACT, 1, {})
    with pytest.raises(UserError, match=r"^run reads courses of maps that belong to each scan"):
        choose_target(trained["scan"], None)
    assert choose_target(trained["shared"], None) == 1


@pytest.mark.parametrize("wanted", [None, "yes"])
def test_a_model_of_maps_is_refused(wanted: str | None) -> None:
    cfg = settings("task=task_map", "task.target.maps=maps", "data.split=unused.json")
    trained = Trained("run", nn.Identity(), cfg, CONTRACT, 1, {})
    with pytest.raises(
        UserError, match=r"^run predicts maps \(task=task_map\): attribution takes a class or a number$"
    ):
        choose_target(trained, wanted)
