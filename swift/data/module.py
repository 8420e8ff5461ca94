"""ClipDataModule: from a store to dense batches on the device, in an order that continues exactly."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import asdict
from typing import Any

import lightning
import numpy as np
import torch

from swift.config.schema_data import DataConfig
from swift.data.clips.augment import Augment, is_on
from swift.data.clips.chosen import choose
from swift.data.clips.dataset import ClipDataset, ClipLoader, SameBatchLoader, identity
from swift.data.clips.index import ClipIndex, ClipSpec, time_split, whole_scans
from swift.data.clips.mixture import Stores
from swift.data.clips.order import MixedOrder, Order, TrainBatches, ValBatches
from swift.data.clips.ring import PREFETCH, check_fresh
from swift.data.clips.scatter import AS_KEPT, PACKED, Layout, to_dense
from swift.data.clips.subset import spend
from swift.data.labels.splits import load_split
from swift.data.store.spaces import MNI, V1, v1_box
from swift.data.store.staging import stage
from swift.data.store.stats import KINDS, MINIMUM, least
from swift.utils import device
from swift.utils.errors import UserError
from swift.utils.signals import leave_stopping_to_parent

log = logging.getLogger("swift.data")


class ClipDataModule(lightning.LightningDataModule):
    """Training and held-out clips of a store, or of a mixture of stores.

    The Trainer must be made with `use_distributed_sampler=False`, as ranks are dealt with here, and with an int
    `val_check_interval`, as the training loader is endless.

    Args:
        data: Settings.
        store_path: Folder of the store; with data.mixture it is not looked at.
        seed: Of the order of training samples.
        rank, world: This process and how many there are; None: from the Trainer (1 of 1 without one).
        dtype: Of the dense clips.

    Attributes:
        consumed: Training samples that all ranks together have taken; set it (or load the state) to go on from there.
            It counts a batch when it is moved to the device, not when a worker reads it ahead.
        store: All scans, see `swift.data.clips.mixture.Stores`.
        spec, train_index, val_index, order: What the batches are made of.
        used: Places of the scans that are used.
        left_out: scan_id of the others -> why.

    Raises:
        UserError: a setting that is not legal, all scans too short, a split that leaves nothing to train on.
    """

    def __init__(
        self,
        data: DataConfig,
        store_path: str | os.PathLike[str],
        seed: int,
        rank: int | None = None,
        world: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if data.normalization not in KINDS:
            raise UserError(f"data.normalization={data.normalization}: legal are {', '.join(KINDS)}")
        if data.workers < 0 or data.batch_size < 1:
            raise UserError(
                f"data.workers={data.workers} must be at least 0, data.batch_size={data.batch_size} at least 1"
            )
        self.data, self.seed, self.dtype = data, seed, dtype
        self._rank, self._world = rank, world
        self.store = Stores([cohort.path for cohort in data.mixture] or [store_path])
        if list(self.store.grid) != list(data.grid) or self.store.spacing != data.spacing:
            raise UserError(
                f"data.grid={list(data.grid)} and data.spacing={data.spacing}, but the store "
                f"{self.store.stores[0].path} has grid {list(self.store.grid)} at {self.store.spacing} mm"
            )
        self.spec = ClipSpec(data.frames, data.frame_stride, data.clip_stride)
        self.used, self.left_out = choose(self.store.scans, self.spec, data.exclude)
        self.split_hash: str | None = None
        self.train_index, self.val_index = self._clips()
        self.order = self._order()
        on = is_on(data.augment)
        self.augment = Augment(data.augment, seed, data.spacing, data.background) if on else None
        self._v1 = data.layout == "swift_v1"
        self._layout = self._v1_layout() if self._v1 else AS_KEPT
        self._least: dict[int, float] = {}
        self.consumed = 0
        self.seen_before: list[str] = []
        """Subjects that the weights of init= were trained on."""
        self._staged = False
        self._train_batches: TrainBatches | None = None
        self._copies = device.Copies()

    def _clips(self) -> tuple[ClipIndex, ClipIndex]:
        data, scans = self.data, self.store.scans
        frames, names = [scan.frames for scan in scans], [scan.scan_id for scan in scans]
        subjects = [scan.subject for scan in scans]
        if data.split is None:
            train, val = time_split(self.used, frames, names, self.spec, data.val_fraction, data.val_gap)
        else:
            split = load_split(data.split)
            self.split_hash = split.hash
            used = set(self.used)
            parts = {part: [i for i in places if i in used] for part, places in split.places(subjects).items()}
            train = whole_scans(parts["train"], frames, names, self.spec, self.spec.clip_stride)
            val = whole_scans(parts["val"], frames, names, self.spec, self.spec.span)
        kept = spend(train, subjects, data.max_subjects, data.max_frames, data.budget_seed)
        if kept is not train:
            taken, there = ({subjects[scan] for scan in index.scan} for index in (kept, train))
            log.info(
                "training on %d of %d subjects, %d of %d frames, %d of %d clips",
                *(len(taken), len(there), kept.length.sum(), train.length.sum(), len(kept), len(train)),
            )
        return kept, val

    def _order(self) -> Order | MixedOrder:
        """Of the training clips; weighted if the cohorts have weights."""
        weights = [cohort.weight for cohort in self.data.mixture if cohort.weight is not None]
        if not weights:
            return Order(len(self.train_index), self.seed)
        index = self.train_index
        ends = np.searchsorted(self.store.cohort[index.scan], np.arange(len(weights)), side="right")
        clips = np.diff([0, *(int(index.ends[end - 1]) if end else 0 for end in ends)]).tolist()
        for cohort, count in zip(self.data.mixture, clips, strict=True):
            if not count:
                raise UserError(f"data.mixture: {cohort.path} has no training clip; leave it out or change the split")
        return MixedOrder(clips, weights, self.seed)

    def _v1_layout(self) -> Layout:
        """Mirrored; and from a template's box to v1's, which is whole voxels of 2 mm away.

        Raises:
            UserError: stores of several spaces.
        """
        if len(self.store.placements) > 1:
            raise UserError(
                f"data.layout=swift_v1: stores of several spaces ({', '.join(self.store.placements)}) have no "
                "box of v1's in common; take those of one space, or data.layout=swift"
            )
        if self.store.placements[0] != MNI:
            log.warning("data.layout=swift_v1: scans are not known to lie in MNI space: they keep their own place")
            return Layout(mirrored=True)
        x, y, z = (v1_box(self.store.grid, self.store.spacing) - self.store.affine(0)[:3, 3]) / self.store.spacing
        return Layout(True, (round(x), round(y), round(z)))

    def _placement(self) -> str:
        where = ", ".join(self.store.placements)
        return V1 if self._v1 and where == MNI else where

    def contract(self) -> dict[str, Any]:
        """What a model trained on these batches must be given: plain values, to be kept with its weights."""
        data = self.data
        like_v1 = {"orientation": "LAS", "background": MINIMUM} if self._v1 else {}
        return {
            "grid": list(self.store.grid),
            "spacing": self.store.spacing,
            "orientation": "RAS",
            "frames": data.frames,
            "frame_stride": data.frame_stride,
            "clip_stride": data.clip_stride,
            "normalization": data.normalization,
            "background": data.background,
            **like_v1,
        }

    def tr_range(self) -> list[float]:
        """Shortest and longest TR of the training scans, seconds."""
        found = [self.store.scans[scan].tr for scan in np.unique(self.train_index.scan)]
        return [min(found), max(found)]

    def beside_contract(self) -> dict[str, Any]:
        """What more is known of the training scans: the range of their TR, and where their grids lie."""
        return {"tr": self.tr_range(), "placement": self._placement()}

    def state_dict(self) -> dict[str, Any]:
        """All that exact continuation needs, and what it must find again."""
        # Beside the contract, not in it: runs that began without it must still be able to go on.
        told = self.beside_contract() | {"subjects": self.seen_subjects()}
        return {"consumed": self.consumed, "contract": self.contract(), **told, **self._stream()}

    def _stream(self) -> dict[str, Any]:
        """What decides which sample every counter is."""
        index, scans = self.train_index, self.store.scans
        parts = "\n".join(f"{scans[s].scan_id} {f} {n}" for s, f, n in zip(index.scan, index.first, index.length))
        return {
            "seed": self.seed,
            "clips": len(index),
            "training frames": hashlib.sha256(parts.encode()).hexdigest()[:16],
            "mixture": self.order.quota if isinstance(self.order, MixedOrder) else None,
            "split": self.split_hash,
            "augment": asdict(self.data.augment),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after `consumed` samples; UserError if the data are not those of the state."""
        for name, mine in {"contract": self.contract(), **self._stream()}.items():
            if state_dict.get(name) != mine:
                raise UserError(
                    f"cannot go on exactly: the run had {name} {state_dict.get(name)}, now it is {mine}; restore it "
                    "or start a new run with init= instead of resume="
                )
        self.consumed = int(state_dict["consumed"])
        self.seen_before = list(state_dict.get("subjects", self.seen_before))

    # ------------------------------------------------------------------------------------------------- loaders
    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        rank = self._rank if self._rank is not None else trainer.global_rank if trainer else 0
        world = self._world if self._world is not None else trainer.world_size if trainer else 1
        return rank, world

    def _stage(self) -> None:
        """Copy what will be read to the node's own disk, once."""
        if self.data.stage_dir and not self._staged:
            self._staged = True
            used = {int(scan) for index in self.indices() for scan in index.scan}
            for number, store in enumerate(self.store.stores):
                own = np.flatnonzero(self.store.cohort == number)
                stage(store, self.data.stage_dir, [place for place, scan in enumerate(own) if int(scan) in used])

    def indices(self) -> tuple[ClipIndex, ...]:
        """Everything that will be read."""
        return self.train_index, self.val_index

    def seen_subjects(self) -> list[str]:
        """Subjects that the weights have been trained on when this run ends, with those of init=; sorted."""
        own = {self.store.scans[scan].subject for scan in np.unique(self.train_index.scan)}
        return sorted(own | set(self.seen_before))

    def _loader(self, index: ClipIndex, batches: TrainBatches | ValBatches, train: bool) -> ClipLoader:
        self._stage()
        data = self.data
        dataset = ClipDataset(self.store, index, self.spec, data.normalization, data.verify, train)
        pins = self.trainer is not None and device.pins(self.trainer.strategy.root_device)
        same = train and data.repeat_batch
        workers = 0 if same else data.workers
        return (SameBatchLoader if same else ClipLoader)(
            dataset,
            batch_sampler=batches,
            collate_fn=identity,
            num_workers=workers,
            worker_init_fn=leave_stopping_to_parent if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pins,
        )

    def train_dataloader(self) -> ClipLoader:
        """Endless; begins after `consumed` samples."""
        rank, world = self._place()
        self._train_batches = TrainBatches(self.order, self.data.batch_size, rank, world, self.consumed)
        return self._loader(self.train_index, self._train_batches, True)

    def val_dataloader(self) -> ClipLoader | list[Any]:
        """Every held-out clip once; an empty list where nothing is held out."""
        if not len(self.val_index):
            return []
        rank, world = self._place()
        return self._loader(self.val_index, ValBatches(len(self.val_index), self.data.batch_size, rank, world), False)

    # -------------------------------------------------------------------------------------------- to the device
    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Count the batch, while it is on the CPU, and leave behind what the device does not need."""
        if "codes" not in batch:
            return batch
        check_fresh(batch)
        if batch["train"] and self._train_batches is not None:
            self.consumed = self._train_batches.consumed_after(int(batch["meta"][0, 0]))
        kept = {name: batch[name] for name in (*PACKED, "voxels", "train")}
        return kept | ({"background": self._smallest(batch["meta"])} if self._v1 else {})

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Copy the batch, while the host works on; see `swift.utils.device.Copies`."""
        return self._copies(batch, device)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, torch.Tensor]:
        """Packed to dense, as `swift.data.clips.scatter.to_dense` describes; training clips augmented."""
        if "codes" not in batch:
            return batch
        dense = self.scattered(batch)
        return self.augment(dense) if self.augment is not None and batch["train"] else dense

    def scattered(self, packed: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A packed batch as the model takes it, not augmented; see `swift.data.clips.scatter.to_dense`.

        With data.layout=swift_v1 also background (B,): the smallest normalized value of each clip's scan.
        """
        grid, frames = self.store.grid, self.data.frames
        if not self._v1:
            return to_dense(packed, grid, frames, self.data.background, self.dtype)
        background = packed["background"] if "background" in packed else self._smallest(packed["meta"])
        dense = to_dense(packed, grid, frames, background, self.dtype, self._layout)
        return dense | {"background": background.to(dense["bold"])}

    def _smallest(self, meta: torch.Tensor) -> torch.Tensor:
        """(B,) float32: the smallest normalized value of the scan of each row; 0 for padding rows."""
        for scan in {int(scan) for scan in meta[:, 1] if scan >= 0} - self._least.keys():
            self._least[scan] = least(self.data.normalization, self.store.attributes(scan))
        return torch.tensor([self._least.get(int(scan), 0.0) for scan in meta[:, 1]])

    def dense(self, packed: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Both steps at once, on the CPU, without a Trainer."""
        return self.on_after_batch_transfer(self.on_before_batch_transfer(packed))
