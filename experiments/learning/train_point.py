"""One point of the study: trained for a budget of CPU time, then judged on the fixed clips under ten masks each.

The same modules, data and first weights as in `python -m swift.train`, without its Trainer: what counts is CPU time in
the steps, and the rate falls along that time. The judgement is the same for all points, whatever they train with:
clips of 20 frames, z-scored voxels, random patches of 6 voxels hidden at 0.8.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.learning.points import BASES, SECONDS, Point
from swift.config.compose import composed
from swift.config.schema import Config
from swift.data.labels.splits import Split, save_splits
from swift.data.module import ClipDataModule
from swift.data.synthetic import CohortSpec, write_store
from swift.evaluate.linear_baselines import LinearBaselines, fit_linear
from swift.evaluate.reconstruction_baselines import brain_mean, masked_l1_sum
from swift.models.autoencoder import clip_sums, reconstruction_loss
from swift.models.masking import mask_voxels
from swift.models.mup import matrices
from swift.parallel.setup import resolve
from swift.train.optim import build_optimizer, lr_factor, parameter_groups
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_data, build_module, tell

Row = dict[str, Any]
LOOKS = {0.0: 0, 60.0: 5}
"""Least CPU seconds of training -> judgements under one mask on the way, for the curve."""
COHORT_SPEC = CohortSpec(n_subjects=60, grid=(16, 16, 16), spacing=8.0, frames=100, seed=0)
DEMO_STEPS = 200
"""The warm-up takes the share of a budget that it takes of so many steps: short points see their peak rate too."""


def prepare_cohort(work: Path) -> list[str]:
    """Options of the synthetic cohort with its subjects held out; made first where it is not there."""
    store, split = work / "cohort", work / "cohort-split.json"
    if not split.exists():
        write_store(COHORT_SPEC, store)
        cfg = composed([*BASES["cohort"], f"data.path={store}"])[0]
        subjects = sorted({scan.subject for scan in build_data(cfg).store.scans})
        save_splits(split, [Split({"train": tuple(subjects[:48]), "val": tuple(subjects[48:]), "test": ()})])
    return [f"data.path={store}", f"data.split={split}"]


def settings(point: Point, places: list[str], judged: bool = False) -> Config:
    """Settings of a point; `judged`: with the clips and masks that all are judged on.

    Args:
        point: The point.
        places: Options that say where the store of its suite is.
        judged: Leave out what the point says of data and task.
    """
    options = [one for one in point.options if not (judged and one.startswith(("data.", "task.")))]
    return composed([*BASES[point.suite], *places, *options, f"seed={0 if judged else point.seed}"])[0]


def make(cfg: Config) -> tuple[PretrainModule, ClipDataModule]:
    """Model with its first weights, and data."""
    module, data = build_module(resolve(cfg)), build_data(cfg)
    assert isinstance(module, PretrainModule)
    tell(module, data)
    if module.first_weights is not None:
        for name, parameter in module.named_parameters():
            if name in module.first_weights.shapes:
                parameter.data.copy_(module.first_weights.tensors[name])
    return module, data


def reconstruct(module: PretrainModule, batch: dict[str, Tensor], seen: str = "voxels") -> tuple[Tensor, Tensor]:
    """Prediction and token mask.

    Args:
        module: The model.
        batch: Dense.
        seen: What the encoder is shown. voxels: visible voxels, as it is | rest: what maps leave of them | filled:
            visible voxels, and what the linear part predicts in place of hidden ones, with the mask token added.
    """
    if seen == "voxels":
        return module.reconstruct(batch)
    model, x, brain = module.model, batch["bold"], batch["brain"]
    mask = module.draw_mask(batch)
    maps = module.scan_maps(batch, module.training) if module.scan_maps is not None else None
    linear = model.linear(x, mask, brain, maps)
    hidden = mask_voxels(mask, module.cfg.model.patch_size, x.shape[2:]).unsqueeze(1)
    token = torch.where(mask.unsqueeze(-1), model.mask_token, 0.0)
    if seen == "rest":
        tokens = model.encoder.embed(torch.where(hidden, 0.0, x - linear.detach()))
        tokens = torch.where(mask.unsqueeze(-1), model.mask_token, tokens)
    else:
        tokens = model.encoder.embed(torch.where(hidden, linear.detach(), x)) + token
    return model.decoder(model.encoder.encode(tokens)) + linear, mask


class Judge:
    """The fixed clips of a suite, under one mask a seed."""

    def __init__(self, point: Point, places: list[str]) -> None:
        self.point = point
        self.cfg = settings(point, places, judged=True)
        self.module, self.data = make(self.cfg)
        self.module.eval()
        self.kind = settings(point, places).data.normalization
        if self.module.scan_maps is None and self.module.first_weights is None and self.kind != "zscore_voxel":
            self.shown = build_data(replace(self.cfg, data=replace(self.cfg.data, normalization=self.kind)))
        else:
            self.shown = self.data

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor], seeds: int, watch: LinearBaselines | None = None) -> list[Row]:
        """Sum of |error| and hidden voxels of each clip and mask.

        Args:
            weights: Of the trained model.
            seeds: Masks of each clip.
            watch: Linear predictions to compare with beside the truth; None: only the error.
        """
        self.module.model.load_state_dict(weights)
        rows = []
        for seed in range(seeds):
            self.module.cfg = replace(self.cfg, seed=seed)
            for packed, shown in zip(self.data.val_dataloader(), self.shown.val_dataloader()):
                batch, given = self.data.dense(packed), self.shown.dense(shown)
                prediction, mask = reconstruct(self.module, given, str(self.point.extra.get("seen", "voxels")))
                hidden = mask_voxels(mask, self.cfg.model.patch_size, batch["bold"].shape[2:])
                if self.shown is not self.data:
                    prediction = self._back(prediction, batch)
                known = None
                if watch is not None and seed == 0:
                    found = watch.predict(batch["bold"], hidden, batch["brain"], batch["scan"], batch["valid"])
                    known = found[watch.names[0]]
                rows += clip_rows(self.data, batch, hidden, prediction, seed, known)
        return rows

    def _back(self, prediction: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """From the normalization that a point has trained with to z-scored voxels."""
        out = torch.zeros_like(prediction)
        for clip in batch["valid"].nonzero()[:, 0].tolist():
            where, scan = batch["brain"][clip], int(batch["scan"][clip])
            a, b, mine_a, mine_b = (
                torch.from_numpy(part)[:, None]
                for kind in ("zscore_voxel", self.kind)
                for part in self.data.store.normalizer(scan, kind)
            )
            out[clip, 0][where] = (prediction[clip, 0][where] - mine_b) / mine_a * a + b
        return out


def clip_rows(
    data: ClipDataModule, batch: dict[str, Tensor], hidden: Tensor, prediction: Tensor, seed: int, known: Tensor | None
) -> list[Row]:
    """One row a real clip; with `known` also what is seen of the prediction beside it."""
    rows = []
    for clip in batch["valid"].nonzero()[:, 0].tolist():
        one = slice(clip, clip + 1)
        place = (batch["bold"][one], hidden[one], batch["brain"][one])
        total, count = masked_l1_sum(prediction[one], *place)
        scan = data.store.scans[int(batch["scan"][clip])]
        row = {"seed": seed, "subject": scan.subject, "start": int(batch["start"][clip])}
        row |= {"sum": round(float(total), 2), "voxels": int(count)}
        if known is not None:
            row["watch"] = watched(prediction[clip, 0], known[clip, 0], *(part[0] for part in place), data)
        rows.append(row)
    return rows


def watched(prediction: Tensor, known: Tensor, bold: Tensor, hidden: Tensor, brain: Tensor, data: Any) -> Row:
    """Cosine to a linear prediction, and the share of variance explained by spatial frequency: of the means of cubes
    of 6 voxels, and within them.

    Args:
        prediction, known: (X, Y, Z, T).
        bold: (1, X, Y, Z, T).
        hidden: bool (X, Y, Z, T).
        brain: bool (X, Y, Z).
        data: Of the run.
    """
    counted = hidden & brain.unsqueeze(-1)
    p, k, x = prediction[counted], known[counted], bold[0][counted]
    found = {"cosine": float(nn.functional.cosine_similarity(p, k, 0))}
    cubes = [torch.arange(size) // 6 for size in brain.shape]
    across = [int(cube[-1]) + 1 for cube in cubes]
    cell = (cubes[0][:, None, None] * across[1] + cubes[1][:, None]) * across[2] + cubes[2]
    frames = bold.shape[-1]
    group = (cell[..., None] * frames + torch.arange(frames))[counted]
    size = across[0] * across[1] * across[2] * frames
    number = torch.zeros(size).index_add_(0, group, torch.ones_like(x))

    def means(values: Tensor) -> Tensor:
        return (torch.zeros(size).index_add_(0, group, values) / number.clamp(min=1))[group]

    for name, part in (("means of cubes", means), ("within cubes", lambda values: values - means(values))):
        truth, error = part(x), part(x - p)
        found[name] = 1 - float(error.square().sum() / truth.square().sum())
    # Frames by their share of visible voxels, in thirds.
    visible = (~hidden & brain.unsqueeze(-1)).flatten(0, 2).sum(0) / brain.sum()
    each = torch.where(counted, (prediction - bold[0]).abs(), 0.0).flatten(0, 2).sum(0) / counted.flatten(0, 2).sum(0)
    order = visible.argsort()
    third = max(frames // 3, 1)
    found |= {"fewest visible": float(each[order[:third]].mean()), "most visible": float(each[order[-third:]].mean())}
    return found


def optimizers(module: PretrainModule, point: Point) -> list[torch.optim.Optimizer]:
    """AdamW as in training; with extra["muon"] Muon for the matrices of the blocks, AdamW for the rest."""
    cfg = module.cfg.optimizer
    if point.extra.get("frozen_maps"):
        module.model.linear.requires_grad_(False)
    if "muon" not in point.extra:
        return [build_optimizer(module.model, cfg)]
    inside = matrices(module.model.encoder.stages)
    muon = [parameter for name, parameter in module.model.encoder.stages.named_parameters() if name in inside]
    taken = {id(parameter) for parameter in muon}
    groups = parameter_groups(module.model, cfg.weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    beta1, beta2 = cfg.betas
    rate = float(point.extra["muon"])
    return [
        torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps),
        torch.optim.Muon(muon, lr=rate, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


def train(point: Point, places: list[str], seconds: float | None = None, seeds: int = 10) -> Row:
    """Train and judge a point.

    Args:
        point: The point.
        places: Where the store of its suite is.
        seconds: Of the budget; None: that of the point, or of its suite.
        seeds: Masks of each held-out clip.
    """
    budget = float(point.extra.get("seconds", SECONDS[point.suite])) if seconds is None else seconds
    steps = int(point.extra.get("steps", 0))
    seen = str(point.extra.get("seen", "voxels"))
    looks = LOOKS[max(least for least in LOOKS if least <= budget)]
    judge = Judge(point, places)
    cfg = settings(point, places)
    warmup = round(1e6 * cfg.optimizer.warmup_steps / DEMO_STEPS)
    spent, began = 0.0, time.process_time()
    module, data = make(cfg)
    module.train()
    made = optimizers(module, point)
    peaks = [[group["lr"] for group in one.param_groups] for one in made]
    average = {name: value.detach().clone() for name, value in module.model.state_dict().items()}
    decay = float(point.extra.get("ema", 0.0))
    curve, losses, skipped, step = [], [], 0, 0

    def look() -> None:
        nonlocal began, spent
        spent += time.process_time() - began
        rows = judge(module.model.state_dict(), 1)
        curve.append([round(spent, 2), step, l1_of(rows)])
        began = time.process_time()

    if looks:
        look()
    for packed in data.train_dataloader():
        used = spent + time.process_time() - began
        share = used / budget if budget else 1.0
        progress = step / steps if steps else share
        if progress >= 1:
            break
        if looks and progress >= len(curve) / looks:
            look()
        factor = lr_factor(round(1e6 * progress) + 1, warmup, 10**6, cfg.optimizer.min_lr_ratio)
        for one, peak in zip(made, peaks):
            for group, rate in zip(one.param_groups, peak):
                group["lr"] = rate * factor
        batch = data.dense(packed)
        prediction, mask = reconstruct(module, batch, seen)
        counted = module.counted_voxels(batch, mask)
        loss = reconstruction_loss(prediction, batch["bold"], counted, cfg.task.loss)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.model.parameters(), cfg.trainer.clip_norm)
        if bool(torch.isfinite(norm)):
            for one in made:
                one.step()
        skipped += int(not torch.isfinite(norm))
        module.model.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            sums, voxels = clip_sums(prediction, batch["bold"], counted, "l1")
            losses.append(float(sums.sum() / voxels.sum().clamp(min=1)))
            if decay:
                for name, value in module.model.state_dict().items():
                    average[name].lerp_(value, 1 - min(decay, step / (step + 10)))
    spent += time.process_time() - began
    module.eval()
    linear = linear_of(point.suite, tuple(places))[0]
    linear = replace(linear, names=linear.names[:1])
    rows = judge(average if decay else module.model.state_dict(), seeds, linear)
    curve.append([round(spent, 2), step, l1_of([row for row in rows if row["seed"] == 0])])
    told = {"point": point.name, "suite": point.suite, "seed": point.seed, "cpu_seconds": spent, "steps": step}
    last = losses[-24:]
    told |= {"skipped": skipped, "train_l1": sum(last) / max(len(last), 1), "l1": l1_of(rows)}
    return told | {"parameters": module.parameter_count, "curve": curve, "rows": rows}


def l1_of(rows: list[Row]) -> float:
    """Over all voxels of some rows."""
    return sum(row["sum"] for row in rows) / max(sum(row["voxels"] for row in rows), 1)


@lru_cache(maxsize=2)
def linear_of(suite: str, places: tuple[str, ...]) -> tuple[LinearBaselines, Config, ClipDataModule]:
    """The fitted linear predictions of a suite."""
    cfg = settings(Point("linear", suite, ()), list(places), judged=True)
    data = build_data(cfg)
    return fit_linear(data, cfg, len(data.val_index)), cfg, data


@torch.no_grad()
def closed_forms(suite: str, places: list[str], seeds: int = 10) -> list[Row]:
    """The predictions that need no training, on the clips and masks of the points: a result each."""
    linear, cfg, data = linear_of(suite, tuple(places))
    module = make(cfg)[0]
    rows: dict[str, list[Row]] = {}
    for seed in range(seeds):
        module.cfg = replace(cfg, seed=seed)
        for packed in data.val_dataloader():
            batch = data.dense(packed)
            hidden = mask_voxels(module.draw_mask(batch), cfg.model.patch_size, batch["bold"].shape[2:])
            place = (batch["bold"], hidden, batch["brain"])
            found = {"brain mean": brain_mean(*place), **linear.predict(*place, batch["scan"], batch["valid"])}
            for name, values in found.items():
                rows.setdefault(name, []).extend(clip_rows(data, batch, hidden, values, seed, None))
    return [
        {"point": f"{suite}: {name}", "suite": suite, "l1": l1_of(part), "rows": part} for name, part in rows.items()
    ]
