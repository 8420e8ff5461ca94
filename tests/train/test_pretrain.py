"""The pre-training module: what is counted, what is logged, and that a step does not depend on how it is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from swift.config.compose import typed
from swift.config.schema import Config
from swift.models.autoencoder import LOSSES, reconstruction_loss
from swift.models.masking import mask_voxels
from swift.models.pooling import brain_tokens
from swift.models.visible import Units
from swift.parallel.checkpoint.files import Manifest, candidates
from swift.parallel.setup import resolve
from swift.train.callbacks.progress import ClipProgress
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_data, build_module, build_trainer
from swift.utils.bits import to_text
from tests.small import GRID, command, composed, metrics, settings

FRAMES = 8
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_batch(samples: list[int], seed: int = 0) -> Batch:
    """A dense batch; a negative sample is a padding row. Each sample has its own brain, clip and values."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(seed * 1000 + max(sample, 0))
        brain = torch.rand(GRID, generator=generator) < 0.2 + 0.1 * (sample % 5)
        rows.append((torch.randn(1, *GRID, FRAMES, generator=generator), brain & (sample >= 0)))
    identity = torch.tensor([sample if sample >= 0 else 900 - sample for sample in samples])
    return {
        "bold": torch.stack([bold for bold, _ in rows]),
        "brain": torch.stack([brain for _, brain in rows]),
        "sample_id": identity,
        "scan": identity,
        "start": identity,
        "valid": torch.tensor([sample >= 0 for sample in samples]),
    }


def validate(cfg: Config, batches: list[Batch]) -> tuple[PretrainModule, dict[str, float]]:
    module = build_module(resolve(cfg))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=len(batches),
    )
    found = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return module, dict(found[0])


def error(kind: str, difference: np.ndarray) -> np.ndarray:
    size = np.abs(difference)
    return {"l1": size, "l2": size**2, "smooth_l1": np.where(size < 1, size**2 / 2, size - 0.5)}[kind]


def brute_force(module: PretrainModule, samples: list[int], kind: str, background: bool) -> tuple[float, float]:
    """val/loss and val/l1 sample by sample, in float64, from the module's predictions."""
    patch = module.cfg.model.patch_size
    clip_means, sizes = [], []
    for sample in samples:
        batch = make_batch([sample])
        with torch.no_grad():
            prediction, mask = module.eval().reconstruct(batch)
        hidden = mask[0].numpy()
        for axis, size in enumerate(patch):
            hidden = hidden.repeat(size, axis)
        difference = (prediction - batch["bold"])[0, 0].double().numpy()
        brain = np.broadcast_to(batch["brain"][0].numpy()[..., None], hidden.shape)
        clip_means.append(error(kind, difference)[hidden if background else hidden & brain].mean())
        sizes.append(np.abs(difference)[hidden & brain])
    return float(np.mean(clip_means)), float(np.concatenate(sizes).mean())


# --- validation ---------------------------------------------------------------------------------------------------
SAMPLES = [3, 11, 4, 7, 8]
CUTS = {
    "one by one": [[3], [11], [4], [7], [8]],
    "ragged": [[3, 11], [4, 7], [8, -1]],
    "padded": [[3, 11, 4], [7, -1, 8], [-2, -3, -4]],
    "at once": [SAMPLES],
}


BRAIN = ["model.tokens=brain", "model.patch_size=[2,2,2,2]"]


@pytest.mark.parametrize(
    ("kind", "background", "own"), [("l1", False, []), ("smooth_l1", False, []), ("l2", True, []), ("l1", False, BRAIN)]
)
def test_validation_equals_brute_force_however_the_clips_are_batched(
    kind: str, background: bool, own: list[str]
) -> None:
    cfg = settings(f"task.loss={kind}", f"task.loss_background={str(background).lower()}", *own)
    for name, cut in CUTS.items():
        module, found = validate(cfg, [make_batch(samples) for samples in cut])
        loss, l1 = brute_force(module, SAMPLES, kind, background)
        assert found["val/loss"] == pytest.approx(loss, rel=1e-5), name
        assert found["val/l1"] == pytest.approx(l1, rel=1e-5), name
        if kind == "l1":
            # Clips weigh the same in the loss, voxels in the L1.
            assert abs(found["val/loss"] - found["val/l1"]) > 1e-5


def test_a_nan_in_one_clip_is_not_left_out_of_the_mean() -> None:
    batches = [make_batch([1]), make_batch([2])]
    batches[0]["bold"][:] = math.nan
    _, found = validate(settings(), batches)
    assert math.isnan(found["val/loss"])
    assert math.isnan(found["val/l1"])


def test_padding_alone_gives_nan_not_zero() -> None:
    _, found = validate(settings(), [make_batch([-1, -2])])
    assert math.isnan(found["val/l1"])


def test_a_clip_without_brain_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """With tokens=brain it would have no token."""
    batch = make_batch([3, 11, 4])
    batch["brain"][1] = False
    _, found = validate(settings(*BRAIN), [batch])
    assert [record.getMessage() for record in caplog.records if "no brain voxel" in record.getMessage()] == [
        "step 0: clip 11 (scan 11, from frame 11) has no brain voxel and so no token: left out (1 such clips so far)"
    ]
    _, others = validate(settings(*BRAIN), [make_batch([3, 4])])
    assert found["val/loss"] == pytest.approx(others["val/loss"], rel=1e-5)


# --- masks --------------------------------------------------------------------------------------------------------
def test_counted_voxels() -> None:
    for background in (False, True):
        module = build_module(resolve(settings(f"task.loss_background={str(background).lower()}")))
        batch = make_batch([3, -1, 8])
        mask = module.draw_mask(batch)
        counted = module.counted_voxels(batch, mask)
        hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(2, 4)
        assert not counted[1].any()
        for row in (0, 2):
            brain = torch.ones(GRID, dtype=torch.bool) if background else batch["brain"][row]
            assert torch.equal(counted[row], hidden[row] & brain[..., None])


def test_masks_follow_the_settings() -> None:
    batch = make_batch([5, 6])
    module = build_module(resolve(settings("task.mask_ratio=0.5")))
    mask = module.draw_mask(batch)
    assert mask.shape == (2, 3, 3, 3, 4)
    assert mask.flatten(1).sum(1).tolist() == [54, 54]
    assert torch.equal(module.draw_mask(make_batch([6]))[0], mask[1])
    assert not torch.equal(build_module(resolve(settings("task.mask_ratio=0.5", "seed=1"))).draw_mask(batch), mask)
    tube = build_module(resolve(settings("task.mask_kind=tube", "task.mask_unit=[4,4,4,4]"))).draw_mask(batch)
    assert torch.equal(tube, tube[..., :1].expand_as(tube))
    last = build_module(resolve(settings("task.mask_kind=temporal", "task.mask_ratio=0.25"))).draw_mask(batch)
    assert last.flatten(1, 3).any(1).tolist() == [[False, False, False, True]] * 2


def check_loss(module: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """The module's loss of a batch and all its gradients are those of `expected`."""
    torch.testing.assert_close(module.loss(batch), expected)
    module.loss(batch).backward()
    ours = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    expected.backward()
    for (name, parameter), gradient in zip(module.named_parameters(), ours, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", [[], ["task.loss=l2"], ["task.loss=smooth_l1", "model.patch_size=[5,2,2,3]"]])
def test_the_loss_of_hidden_brain_patches_is_that_of_the_whole_prediction(options: list[str]) -> None:
    """A padding row, a brain of one voxel, patches that reach beyond the grid and the clip."""
    module = build_module(resolve(settings(*BRAIN, *options)))
    batch = make_batch([3, -1, 8, 5])
    batch["brain"][3] = False
    batch["brain"][3, 7, 7, 7] = True
    assert module.model.hidden_rows(batch["bold"], module.draw_mask(batch), batch["brain"]) is not None
    prediction, mask = module.reconstruct(batch)
    expected = reconstruction_loss(prediction, batch["bold"], module.counted_voxels(batch, mask), module.cfg.task.loss)
    check_loss(module, batch, expected)


def cohort_of(cfg: Config, cells: np.ndarray) -> Config:
    """The same with the tokens of a cohort."""
    return replace(cfg, data=replace(cfg.data, brain="cohort"), model=replace(cfg.model, cohort=to_text(cells)))


@pytest.mark.parametrize("options", [[], ["model.decoder=linear"]])
def test_of_a_cohorts_tokens_each_clip_counts_its_own_brain(options: list[str]) -> None:
    """With a brain that reaches beyond the cohort's, one that lies outside, and a padding row."""
    cells = np.zeros((6, 6, 6), bool)
    cells[:4, 1:, :5] = True
    cfg = cohort_of(settings(*BRAIN, *options), cells)
    module = build_module(resolve(cfg))
    batch = make_batch([3, -1, 8, 5, 4])
    batch["brain"][4] = False
    batch["brain"][4, 10:] = True
    batch["brain"][0, 8:, 4:, :6] = batch["brain"][2, :4] = False
    mask = module.draw_mask(batch)
    voxels = np.kron(cells, np.ones((2, 2, 2), bool)).astype(bool)
    hidden = mask_voxels(mask, cfg.model.patch_size, batch["bold"].shape[2:])
    prediction = module.reconstruct_under(batch, mask)[:, 0]
    means = []
    for row in (0, 2, 3):
        counted = hidden[row] & (batch["brain"][row] & torch.from_numpy(voxels))[..., None]
        means.append((prediction[row] - batch["bold"][row, 0])[counted].abs().mean())
        assert torch.equal(module.counted_voxels(batch, mask)[row], counted)
    rows = module.model.hidden_rows(batch["bold"], mask, batch["brain"])
    if options:
        assert rows is None
    else:
        own = brain_tokens(batch["brain"], (2, 2, 2, 2), 0) & torch.from_numpy(cells)
        assert len(rows) == int((mask & own[..., None]).sum()) < int((mask & torch.from_numpy(cells)[..., None]).sum())
    check_loss(module, batch, torch.stack(means).mean())
    assert module.brainless == {4}
    # Nothing that counts: a loss of 0 whose gradient exists, for ranks that wait for each other.
    module.zero_grad(set_to_none=True)
    nothing = module.loss({name: value[4:] for name, value in batch.items()})
    nothing.backward()
    assert nothing.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


# --- hidden units that the encoder never sees ---------------------------------------------------------------------
DROP = ["task.hidden=drop", "task.mask_kind=tube", "model.patch_size=[2,2,2,2]"]
"""27 units of 4x4x4 voxels."""
WHOLE_FRAMES = ["task.mask_kind=frames", "model.patch_size=[2,2,2,2]", "task.mask_ratio=0.7"]


@pytest.mark.parametrize("options", [[], ["task.loss=l2", "task.loss_background=true"], ["task.loss=smooth_l1"]])
def test_the_loss_of_hidden_cells_is_that_of_the_whole_prediction(options: list[str]) -> None:
    """Clips with brains of different size, a padding row, and a brain of which nothing can be shown."""
    module = build_module(resolve(settings(*DROP, *options)))
    batch = make_batch([3, -1, 8, 5])
    batch["brain"][3] = False
    batch["brain"][3, :2, :2, :2] = True
    prediction, mask = module.reconstruct(batch)
    assert mask.shape == (4, 6, 6, 6, 4)
    assert mask.flatten(1).sum(1).tolist() == [22 * 8 * 4] * 4
    counted = module.counted_voxels(batch, mask)
    assert counted.flatten(1).any(1).tolist() == [True, False, True, False]
    difference = (prediction - batch["bold"])[:, 0]
    each = LOSSES[module.cfg.task.loss](difference, torch.zeros_like(difference), reduction="none")
    expected = torch.stack([each[row][counted[row]].mean() for row in (0, 2)]).mean()
    check_loss(module, batch, expected)


def test_models_are_judged_under_one_mask() -> None:
    """A model that leaves hidden units out and one with mask tokens, under masks of single patches and their own."""
    batch = make_batch([3, 8])
    dropping, ordinary = (build_module(resolve(settings(*words))).eval() for words in (DROP, DROP[2:]))
    mask = ordinary.draw_mask(batch)
    assert torch.equal(ordinary.reconstruct_under(batch, mask), ordinary.reconstruct(batch)[0])
    assert dropping.reconstruct_under(batch, mask).shape == batch["bold"].shape
    prediction, own = dropping.reconstruct(batch)
    hidden = mask_voxels(own, dropping.cfg.model.patch_size, batch["bold"].shape[2:]).unsqueeze(1)
    torch.testing.assert_close(dropping.reconstruct_under(batch, own)[hidden], prediction[hidden], rtol=1e-4, atol=1e-5)


def test_visible_units_do_not_depend_on_the_batch() -> None:
    module = build_module(resolve(settings(*DROP)))
    mask = module.draw_mask(make_batch([5, 6]))
    assert torch.equal(module.draw_mask(make_batch([6]))[0], mask[1])
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(build_module(resolve(settings(*DROP, "seed=1"))).draw_mask(make_batch([5, 6])), mask)


@pytest.mark.parametrize("options", [[], ["task.loss=l2", "task.loss_background=true"], ["task.mask_unit=[2,2,2,4]"]])
def test_the_loss_of_hidden_frames_is_that_of_the_whole_prediction(options: list[str]) -> None:
    """A padding row, and a clip without a brain. Under its own mask the slow path says the same."""
    module = build_module(resolve(settings("task.hidden=drop", *WHOLE_FRAMES, *options))).eval()
    batch = make_batch([3, -1, 8, 5])
    batch["brain"][3] = False
    prediction, mask = module.reconstruct(batch)
    assert mask.flatten(1, 3).sum(1).unique().tolist() == [0, mask[0, ..., 0].numel()]
    counted = module.counted_voxels(batch, mask)
    assert counted.flatten(1).any(1).tolist() == [True, False, True, False]
    difference = (prediction - batch["bold"])[:, 0]
    each = LOSSES[module.cfg.task.loss](difference, torch.zeros_like(difference), reduction="none")
    expected = torch.stack([each[row][counted[row]].mean() for row in (0, 2)]).mean()
    check_loss(module, batch, expected)
    tokens = build_module(resolve(settings(*WHOLE_FRAMES, *options)))
    assert torch.equal(tokens.draw_mask(batch), mask)
    hidden = mask_voxels(mask, module.cfg.model.patch_size, batch["bold"].shape[2:]).unsqueeze(1)
    torch.testing.assert_close(module.reconstruct_under(batch, mask)[hidden], prediction[hidden], rtol=1e-4, atol=1e-5)


def test_a_scan_of_which_nothing_can_be_shown_is_named_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Units, "touched", lambda self, brain: torch.zeros(len(brain), 27, dtype=torch.bool))
    _, _, log = fit(store, tmp_path / "run", "trainer.max_steps=3", *DROP)
    assert [record["train/loss"] for record in log] == [0.0] * 3
    named = [record.getMessage() for record in caplog.records if "touch its brain" in record.getMessage()]
    assert len(named) == len(set(named)) > 0
    assert all(line.startswith("scan sub-") and line.endswith("left out of the loss") for line in named)


# --- training -----------------------------------------------------------------------------------------------------
def fit(store: Path, run_dir: Path, *overrides: str) -> tuple[pl.Trainer, PretrainModule, list[dict[str, Any]]]:
    cfg = typed(composed(*command(store, run_dir, "trainer.figures=false", "trainer.val_every=100", *overrides)))
    module, data = build_module(resolve(cfg)), build_data(cfg)
    trainer = build_trainer(resolve(cfg), [])
    trainer.fit(module, datamodule=data)
    return trainer, module, metrics(run_dir)


def test_micro_batches_make_the_same_step(store: Path, tmp_path: Path) -> None:
    """One batch of two clips, or two of one: the same clips, masks, losses, norms and weights, though brains differ."""
    # A large eps: with the usual one Adam's first steps divide noise by noise where a gradient is zero.
    same = ["optimizer.eps=1e-3", "trainer.max_steps=4", "trainer.clip_norm=0.05"]
    _, whole, whole_log = fit(store, tmp_path / "whole", "data.batch_size=2", *same)
    _, parts, parts_log = fit(store, tmp_path / "parts", "data.batch_size=1", "trainer.accumulate=2", *same)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert [record["step"] for record in parts_log] == [1, 2, 3, 4]
    for a, b in zip(whole_log, parts_log, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_the_logged_numbers_are_those_of_their_step(store: Path, tmp_path: Path) -> None:
    """Logged every second step: rates of steps 2, 4 and 6, the norm before clipping, the loss of that step's clips."""
    _, _, every = fit(store, tmp_path / "every", "trainer.clip_norm=0.01")
    _, _, second = fit(store, tmp_path / "second", "trainer.clip_norm=0.01", "trainer.log_every=2")
    assert [record["step"] for record in every] == [1, 2, 3, 4, 5, 6]
    assert second == every[1::2]
    # Warm-up of 2 steps to 1e-3, then a cosine of 4 steps to a twentieth.
    cosine = [1e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4)]
    assert [record["train/lr"] for record in every] == pytest.approx([0.5e-3, 1e-3, *cosine], rel=1e-6)
    assert min(record["train/grad_norm"] for record in every) > 0.01


def test_loss_and_norm_of_the_first_step_equal_plain_torch(store: Path, tmp_path: Path) -> None:
    _, _, log = fit(store, tmp_path / "run", "data.batch_size=2", "trainer.max_steps=1")
    cfg = typed(composed(*command(store, tmp_path / "run", "data.batch_size=2")))
    module, data = build_module(resolve(cfg)), build_data(cfg)
    batch = data.dense(next(iter(data.train_dataloader())))
    prediction, mask = module.reconstruct(batch)
    counted = module.counted_voxels(batch, mask)
    difference = (prediction - batch["bold"])[:, 0].abs()
    loss = torch.stack([difference[row][counted[row]].mean() for row in range(2)]).mean()
    loss.backward()
    squares = sum(
        float(parameter.grad.square().sum()) for parameter in module.parameters() if parameter.grad is not None
    )
    assert log[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log[0]["train/grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)


def test_no_clipping_still_logs_the_norm(store: Path, tmp_path: Path) -> None:
    _, free, log = fit(store, tmp_path / "free", "trainer.clip_norm=0", "trainer.max_steps=2")
    assert all(record["train/grad_norm"] > 0 for record in log)
    _, wide, _ = fit(store, tmp_path / "wide", "trainer.clip_norm=1e9", "trainer.max_steps=2")
    for (name, a), b in zip(free.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_dropout_is_drawn_from_the_step_alone(store: Path, tmp_path: Path) -> None:
    rates = ["model.dropout=0.1", "model.drop_path=0.2", "model.attention_dropout=0.1", "trainer.max_steps=3"]
    _, first, log = fit(store, tmp_path / "a", *rates)
    torch.manual_seed(12345)
    _, second, again = fit(store, tmp_path / "b", *rates)
    assert again == log
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_steps_and_micro_batches_drop_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = set()
    for seed in (0, 1):
        module = build_module(resolve(settings("model.dropout=0.1", "trainer.accumulate=2", f"seed={seed}")))
        for step in (0, 1):
            monkeypatch.setattr(PretrainModule, "global_step", step)
            for batch_idx in (2 * step, 2 * step + 1):
                module.seed_dropout(batch_idx)
                drawn.add(float(torch.rand(())))
    assert len(drawn) == 8
    # Without dropout nobody's generator is touched.
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    module = build_module(resolve(settings()))
    torch.set_rng_state(state)
    module.seed_dropout(0)
    assert torch.equal(torch.rand(3), expected)


def test_bf16_trains_on_a_cpu(store: Path, tmp_path: Path) -> None:
    _, module, log = fit(store, tmp_path / "bf16", "trainer.precision=bf16", "trainer.max_steps=2")
    _, _, exact = fit(store, tmp_path / "fp32", "trainer.precision=32", "trainer.max_steps=2")
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    for a, b in zip(log, exact, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=0.02)
        assert a["train/loss"] != b["train/loss"]


def test_a_checkpoint_carries_its_settings(store: Path, tmp_path: Path) -> None:
    _, module, _ = fit(store, tmp_path / "run", "trainer.max_steps=1")
    content = Manifest.read(candidates(tmp_path / "run" / "checkpoints")[0]).state
    assert content["config"]["model"]["patch_size"] == [4, 4, 4, 2]
    assert content["config"]["data"]["normalization"] == module.cfg.data.normalization
    assert content["config"]["task"]["mask_ratio"] == 0.8


def test_no_number_is_read_between_logged_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses lie on the meta device, where reading one is an error: on a GPU it would make the host wait."""
    module, bar = build_module(resolve(settings("trainer.log_every=3"))), ClipProgress(line_seconds=1e9)
    loss = torch.ones((), device="meta")
    with pytest.raises(RuntimeError, match=r"item\(\)|meta"):
        float(loss)
    logged: list[tuple[int, str]] = []
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=0, world_size=1, strategy=SimpleNamespace())
    trainer.strategy.gradient_norm = lambda: loss
    monkeypatch.setattr(PretrainModule, "trainer", trainer)
    monkeypatch.setattr(PretrainModule, "global_step", property(lambda _: trainer.global_step))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((trainer.global_step, name)))
    bar._shown = bar._mark = bar._clock()
    for number in range(12):
        trainer.global_step = (number + 1) // 2
        outputs, batch = {"loss": loss / 2}, {"sample_id": torch.zeros(4, device="meta")}
        module.on_train_batch_end(outputs, batch, number)
        bar.on_train_batch_end(trainer, module, outputs, batch, number)  # type: ignore[arg-type]
    names = ("train/loss", "train/lr", "train/grad_norm", "step")
    assert logged == [(step, name) for step in (3, 6) for name in names]
