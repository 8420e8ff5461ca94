"""The points of the study: one factor at a time around two bases, today's network and the one with maps.

A point is a name, the suite whose clips it is trained and judged on, options of `python -m swift.train`, and what no
option says yet (`Point.extra`). Its budget is CPU time, the same for all points of a suite.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swift.utils.errors import UserError

SECONDS = {"sample": 80.0, "cohort": 300.0}
"""CPU seconds of training by suite, where a point does not name its own."""
DEMO_SECONDS = 160.0
"""About those of the demo's 200 steps without maps, as measured where the study was written."""

SAMPLE = ("data.workers=0", "trainer.threads=1", "run_dir=unused")
COHORT = (
    *SAMPLE,
    *("model.embed_dim=24", "model.depths=[2,2]", "model.num_heads=[4,8]", "model.patch_size=[4,4,4,1]"),
    *("data=store", "data.grid=[16,16,16]", "data.spacing=8.0", "data.batch_size=4", "model.maps_of=shared"),
)
BASES = {"sample": SAMPLE, "cohort": COHORT}
MAPS = "model.maps=40"


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        name: Unique; SUITE/BASE/FACTOR=VALUE.
        suite: sample | cohort.
        options: Beside those of the suite.
        seed: Of weights, order and training masks. What it is judged on does not depend on it.
        extra: seen (what the encoder is shown: voxels | rest | filled), ema (decay of averaged weights), muon (its rate
            for matrices), frozen_maps, steps (a number of steps in place of the budget), seconds (another budget).
    """

    name: str
    suite: str
    options: tuple[str, ...]
    seed: int = 0
    extra: dict[str, float | str] = field(default_factory=dict)


FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "rate": {"3e-4": ("optimizer.lr=3e-4",), "3e-3": ("optimizer.lr=3e-3",), "1e-2": ("optimizer.lr=1e-2",)},
    "warm-up": {"5": ("optimizer.warmup_steps=5",), "60": ("optimizer.warmup_steps=60",)},
    "batch": {"1": ("data.batch_size=1",), "4": ("data.batch_size=4",)},
    "LayerScale": {"none": ("model.layer_scale=null",), "1": ("model.layer_scale=1.0",)},
    "positions": {
        "rope_global": ("model.position=rope_global",),
        "tables": ("model.position=absolute",),
        "none": ("model.position=none",),
    },
    "window": {"grid": ("model.window=[8,8,8,20]",)},
    "width": {"48": ("model.embed_dim=48",), "96": ("model.embed_dim=96",)},
    "stages": {"2": ("model.depths=[2,2]", "model.num_heads=[4,8]")},
    "decoder": {"linear": ("model.decoder=linear",), "local, 256 wide": ("model.decoder_dim=256",)},
    "loss": {"l2": ("task.loss=l2",), "smooth_l1": ("task.loss=smooth_l1",)},
    "mask ratio": {value: (f"task.mask_ratio={value}",) for value in ("0.5", "0.6", "0.7", "0.9")},
    "mask": {
        "tube": ("task.mask_kind=tube",),
        "units of 2x2x2 patches": ("task.mask_unit=[12,12,12,1]",),
        "units of 5 frames": ("task.mask_unit=[6,6,6,5]",),
    },
    "clip": {
        "10 frames": ("data.frames=10", "data.batch_size=4"),
        "40 frames": ("data.frames=40", "data.batch_size=1"),
        "every start": ("data.clip_stride=1",),
    },
    "normalization": {value: (f"data.normalization={value}",) for value in ("percent", "robust", "zscore_global")},
    "decay": {"0": ("optimizer.weight_decay=0",)},
}
"""Factor -> value -> options."""

EXTRAS: dict[str, dict[str, dict[str, float | str]]] = {
    "average of weights": {"0.98": {"ema": 0.98}},
    "optimizer": {"Muon 0.003": {"muon": 0.003}, "Muon 0.02": {"muon": 0.02}},
}
WITH_MAPS: dict[str, tuple[str, ...]] = {
    "rate": ("3e-3", "1e-2"),
    "LayerScale": ("none",),
    "positions": ("rope_global", "tables"),
    "width": ("96",),
    "decoder": ("linear",),
    "loss": ("l2", "smooth_l1"),
    "mask ratio": ("0.6", "0.9"),
    "mask": ("tube",),
    "clip": ("every start",),
    "average of weights": ("0.98",),
    "optimizer": ("Muon 0.02",),
}
"""Of these factors the values that are also tried with maps."""
MAP_NUMBERS = (10, 20, 80)
SEEN: dict[str, dict[str, float | str]] = {"what maps leave": {"seen": "rest"}, "filled": {"seen": "filled"}}


def _around(base: str, common: tuple[str, ...]) -> list[Point]:
    name = f"sample/{base}"
    found = [Point(f"{name}/base", "sample", common)]
    for factor in [*FACTORS, *EXTRAS]:
        values: dict[str, tuple[str, ...]] = FACTORS.get(factor, dict.fromkeys(EXTRAS.get(factor, {}), ()))
        for value, options in values.items():
            if base == "maps" and value not in WITH_MAPS.get(factor, ()):
                continue
            extra = EXTRAS.get(factor, {}).get(value, {})
            found.append(Point(f"{name}/{factor}={value}", "sample", (*common, *options), 0, extra))
    return found


def factors() -> list[Point]:
    """Every factor around both bases, the bases first."""
    network, maps = _around("network", ()), _around("maps", (MAPS,))
    for number in MAP_NUMBERS:
        maps.insert(1, Point(f"sample/maps/number={number}", "sample", (f"model.maps={number}",)))
    for value, extra in SEEN.items():
        maps.insert(1, Point(f"sample/maps/encoder sees={value}", "sample", (MAPS,), 0, extra))
    steps: dict[str, float | str] = {"steps": 200}
    demo = [
        Point(f"sample/{name}/200 steps", "sample", more, 0, steps)
        for name, more in (("network", ()), ("maps", (MAPS,)))
    ]
    turn = [point for pair in zip(network, maps) for point in pair]
    return demo + turn + network[len(maps) :]


def cohort() -> list[Point]:
    """Held-out subjects: the network, shared maps kept fixed and trained, three seeds each."""
    fixed: dict[str, float | str] = {"frozen_maps": 1.0}
    arms: dict[str, tuple[tuple[str, ...], dict[str, float | str]]] = {
        "network": (("model.position=rope_global",), {}),
        "maps=20": (("model.maps=20",), {}),
        "maps=40": ((MAPS,), {}),
        "maps=20, rate 3e-3": (("model.maps=20", "optimizer.lr=3e-3"), {}),
        "maps=20, fixed": (("model.maps=20",), fixed),
        "maps=20, encoder sees what they leave": (("model.maps=20",), {"seen": "rest"}),
    }
    return [
        Point(f"cohort/{name}#{seed}", "cohort", options, seed, extra)
        for seed in range(3)
        for name, (options, extra) in arms.items()
    ]


FINALISTS: dict[str, tuple[tuple[str, ...], dict[str, float | str]]] = {
    "network": ((), {}),
    "maps": ((MAPS,), {}),
    "maps, rate 3e-3": ((MAPS, "optimizer.lr=3e-3"), {}),
    "maps, encoder sees what they leave": ((MAPS, "optimizer.lr=3e-3"), {"seen": "rest"}),
}
"""Recipes that are run for the demo's CPU time with three seeds."""


def finalists() -> list[Point]:
    """Three seeds of each."""
    return [
        Point(f"sample/final/{name}#{seed}", "sample", options, seed, {**extra, "seconds": DEMO_SECONDS})
        for seed in range(3)
        for name, (options, extra) in FINALISTS.items()
    ]


def chosen(sets: list[str]) -> list[Point]:
    """Points of some sets, in their order.

    Raises:
        UserError: no such set.
    """
    every = {"factors": factors, "cohort": cohort, "finalists": finalists}
    for name in sets:
        if name not in every:
            raise UserError(f"--sets {name}: legal are {', '.join(every)}")
    return [point for name in sets for point in every[name]()]
