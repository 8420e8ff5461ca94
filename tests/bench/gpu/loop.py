"""What the training loop adds to the bare step: Lightning with swift's strategy, the guard, logging, the loader."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset

from swift.config.schema import Config
from swift.parallel.setup import resolve
from swift.parallel.strategies import build_strategy
from swift.train.callbacks.guard import Guard
from swift.train.wiring import build_callbacks, build_data, build_loggers, build_module
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import Step, make_batch, settings
from tests.bench.gpu.measure import milliseconds, synchronize
from tests.bench.gpu.stores import random_store

COLUMNS = (("ms", "9.2f"), ("waits_ms", "9.2f"), ("clips_s", "9.2f"), ("steps", "6d"))
LEVELS = ("bare", "+lightning", "+guard", "+logging", "+loader")


class Same(IterableDataset[dict[str, Any]]):
    """One batch, already on the device, again and again."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


class Clock(pl.Callback):
    """Wall time from the end of step `first` to that of step `last`, and how long the loop looked for a batch."""

    def __init__(self, bench: Bench, first: int, last: int) -> None:
        self.bench, self.first, self.last = bench, first, last
        self.began = self.ended = self.left = self.waited = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The batch is there."""
        if self.first <= trainer.global_step < self.last:
            self.waited += time.perf_counter() - self.left

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Wait for the device at the two ends alone."""
        if trainer.global_step == self.first:
            synchronize(self.bench.device)
            self.began = time.perf_counter()
        elif trainer.global_step == self.last:
            synchronize(self.bench.device)
            self.ended = time.perf_counter()
        self.left = time.perf_counter()


def run_settings(bench: Bench, model: str, clips: int, steps: int, level: str) -> Config:
    """Settings of a run of so many steps; for the loader on a store of its own."""
    cfg = settings(
        bench,
        model,
        f"data.batch_size={clips}",
        f"data.workers={0 if bench.small else 4}",
        f"trainer.max_steps={steps}",
        f"trainer.val_every={10 * steps}",
        f"trainer.accelerator={'gpu' if bench.gpu else 'cpu'}",
        "parallel.compile=false",  # as the bare step
        "trainer.figures=false",
        f"run_dir={bench.folder / 'loop'}",
    )
    if level == "+loader":
        grid = (cfg.data.grid[0], cfg.data.grid[1], cfg.data.grid[2])
        path = random_store(bench.folder / "store", grid, cfg.data.spacing, 2, 40 if bench.small else 200)
        cfg = replace(cfg, data=replace(cfg.data, path=str(path), val_gap=0 if bench.small else cfg.data.val_gap))
    return cfg


def bare(bench: Bench, model: str, clips: int) -> Row:
    """The step without any loop, in the run's precision."""
    cfg = settings(bench, model)
    step = Step(cfg, clips, bench.device, "mixed" if bench.gpu else "fp32")
    ms = milliseconds(step, bench.device, 0.05 if bench.small else 2.0)
    return {"ms": ms, "clips_s": 1000 * clips / ms}


def peeled(bench: Bench, model: str, clips: int, level: str) -> Row:
    """A run of the product's module under its strategy, with what the level says."""
    first, last = (2, 6) if bench.small else (12, 52)
    cfg = run_settings(bench, model, clips, last, level)
    setup, run_dir, depth = resolve(cfg), Path(cfg.run_dir), LEVELS.index(level)
    for talkative in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    module = build_module(setup, empty=True)
    spread = build_strategy(setup)
    clock = Clock(bench, first, last)
    callbacks: list[Any] = build_callbacks(setup, []) if depth >= LEVELS.index("+logging") else []
    if depth >= LEVELS.index("+guard"):
        callbacks.append(Guard(cfg, run_dir, run_dir / "checkpoints"))
    trainer = pl.Trainer(
        **spread,
        max_steps=last,
        max_epochs=-1,
        gradient_clip_val=cfg.trainer.clip_norm or math.inf,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=setup.log_every,
        logger=build_loggers(cfg, run_dir) if depth >= LEVELS.index("+logging") else False,
        callbacks=[*callbacks, clock],
        enable_checkpointing=False,
        enable_progress_bar=depth >= LEVELS.index("+logging"),
        enable_model_summary=False,
        default_root_dir=run_dir,
        use_distributed_sampler=False,
    )
    if level == "+loader":
        trainer.fit(module, datamodule=build_data(cfg))
    else:
        trainer.fit(module, DataLoader(Same(make_batch(cfg, clips, bench.device)), batch_size=None))
    steps = last - first
    ms = 1000 * (clock.ended - clock.began) / steps
    return {"ms": ms, "waits_ms": 1000 * clock.waited / steps, "clips_s": 1000 * clips / ms, "steps": steps}


def cases(bench: Bench) -> list[Case]:
    """A small model, whose step is short, and a large one."""
    shapes = [("tiny", 1)] if bench.small else [("51m", 4), ("806m", 4), ("7m", 4)]
    return [
        Case(
            f"{model} {clips} clips {level}",
            lambda k=(model, clips, level): bare(bench, *k[:2]) if k[2] == "bare" else peeled(bench, *k),  # type: ignore[misc]
        )
        for model, clips in shapes
        for level in LEVELS
    ]


PART = Part("the training loop peeled, ms a step; waits_ms: until the next batch was there", cases, COLUMNS)
