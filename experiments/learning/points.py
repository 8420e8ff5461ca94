"""The points of the study: one factor at a time around two bases, today's network and the one with maps.

A point is a name, the suite whose clips it is trained and judged on, options of `python -m swift.train`, and what no
option says yet (`Point.extra`). Its budget is CPU time, the same for all points of a suite.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from swift.utils.errors import UserError

SECONDS = {"sample": 80.0, "cohort": 100.0}
"""CPU seconds of training by suite, where a point does not name its own: what a shared core had room for in an hour.

On the sample about those of the demo's 100 steps with maps.
"""
FACTOR_SECONDS = 12.0

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
    "rate": {"3e-3": ("optimizer.lr=3e-3",), "1e-2": ("optimizer.lr=1e-2",), "3e-4": ("optimizer.lr=3e-4",)},
    "LayerScale": {"none": ("model.layer_scale=null",), "1": ("model.layer_scale=1.0",)},
    "positions": {
        "rope_global": ("model.position=rope_global",),
        "tables": ("model.position=absolute",),
        "none": ("model.position=none",),
    },
    "loss": {"l2": ("task.loss=l2",), "smooth_l1": ("task.loss=smooth_l1",)},
    "decoder": {"linear": ("model.decoder=linear",), "local, 256 wide": ("model.decoder_dim=256",)},
    "mask ratio": {value: (f"task.mask_ratio={value}",) for value in ("0.6", "0.9", "0.5", "0.7")},
    "width": {"48": ("model.embed_dim=48",), "96": ("model.embed_dim=96",)},
    "window": {"grid": ("model.window=[4,4,4,20]",)},
    "batch": {"2": ("data.batch_size=2",), "8": ("data.batch_size=8",)},
    "mask": {
        "tube": ("task.mask_kind=tube",),
        "units of 2x2x2 patches": ("task.mask_unit=[8,8,8,1]",),
        "units of 5 frames": ("task.mask_unit=[4,4,4,5]",),
    },
    "clip": {
        "every start": ("data.clip_stride=1",),
        "10 frames": ("data.frames=10", "data.batch_size=8"),
        "40 frames": ("data.frames=40", "data.batch_size=2"),
    },
    "warm-up": {"5": ("optimizer.warmup_steps=5",), "60": ("optimizer.warmup_steps=60",)},
    "normalization": {value: (f"data.normalization={value}",) for value in ("percent", "robust", "zscore_global")},
    "decay": {"0": ("optimizer.weight_decay=0",)},
}
"""Factor -> value -> options. The values that matter most come first: a study that is stopped has those."""

EXTRAS: dict[str, dict[str, dict[str, float | str]]] = {
    "optimizer": {"Muon 0.02": {"muon": 0.02}, "Muon 0.003": {"muon": 0.003}},
    "average of weights": {"0.98": {"ema": 0.98}},
}
WITH_MAPS: dict[str, tuple[str, ...]] = {
    "rate": ("3e-3", "1e-2", "3e-4"),
    "LayerScale": ("none",),
    "positions": ("rope_global", "tables"),
    "loss": ("l2", "smooth_l1"),
    "decoder": ("linear",),
    "mask ratio": ("0.6", "0.9"),
    "width": ("48",),
    "batch": ("2",),
    "mask": ("tube",),
    "clip": ("every start",),
    "optimizer": ("Muon 0.02",),
    "average of weights": ("0.98",),
}
"""Of these factors the values that are also tried with maps."""
MAP_NUMBERS = (10, 40, 80)
FIXED: dict[str, float | str] = {"frozen_maps": 1.0}
WITH_MAPS_ONLY: dict[str, dict[str, float | str]] = {
    "maps trained=no": FIXED,
    "encoder sees=what maps leave": {"seen": "rest"},
    "encoder sees=filled": {"seen": "filled"},
}


def _around(base: str, common: tuple[str, ...]) -> list[Point]:
    name = f"factors/{base}"
    found = [Point(f"{name}/base", "cohort", common)]
    for factor in [*FACTORS, *EXTRAS]:
        values: dict[str, tuple[str, ...]] = FACTORS.get(factor, dict.fromkeys(EXTRAS.get(factor, {}), ()))
        for value, options in values.items():
            if base == "maps" and value not in WITH_MAPS.get(factor, ()):
                continue
            extra = EXTRAS.get(factor, {}).get(value, {})
            found.append(Point(f"{name}/{factor}={value}", "cohort", (*common, *options), 0, extra))
    return found


BASE_STEPS = {"network": (45, 57, 36), "maps": (32, 38, 26)}
"""The bases again, for these numbers of steps: a busy machine makes fewer in the same CPU time, so that a factor is
compared with its base at as many steps as it had itself."""


def base_points(base: str) -> list[str]:
    """Names of the trainings of a base."""
    return [f"factors/{base}/base", *(f"factors/{base}/base, {steps} steps" for steps in BASE_STEPS[base])]


def data_of_a_step(point: Point) -> float:
    """Clips of 20 frames that a step sees, in those of a base."""
    found = {"data.batch_size": 4.0, "data.frames": 20.0}
    for option in point.options:
        name, value = option.split("=", 1)
        if name in found:
            found[name] = float(value)
    return found["data.batch_size"] * found["data.frames"] / 80


def factors() -> list[Point]:
    """Every factor around both bases on the cohort, the bases first."""
    bases = {"network": (), "maps": ("model.maps=20",)}
    network, maps = (_around(base, options) for base, options in bases.items())
    only = [
        Point(f"factors/maps/{name}", "cohort", ("model.maps=20",), 0, extra) for name, extra in WITH_MAPS_ONLY.items()
    ]
    only += [Point(f"factors/maps/number={number}", "cohort", (f"model.maps={number}",)) for number in MAP_NUMBERS]
    maps[3:3] = only
    turn = [
        replace(point, extra={"seconds": FACTOR_SECONDS, **point.extra})
        for pair in zip(network, maps)
        for point in pair
    ]
    rest = network[len(maps) :] + maps[len(network) :]
    again = [
        Point(f"factors/{base}/base, {steps} steps", "cohort", options, 0, {"steps": steps, "seconds": FACTOR_SECONDS})
        for base, options in bases.items()
        for steps in BASE_STEPS[base]
    ]
    return again + turn + [replace(point, extra={"seconds": FACTOR_SECONDS, **point.extra}) for point in rest]


COHORT_ARMS: dict[str, tuple[tuple[str, ...], dict[str, float | str], int]] = {
    "network": (("model.position=rope_global",), {}, 1),
    "maps=20": (("model.maps=20",), {}, 1),
    "maps=20, rate 3e-3": (("model.maps=20", "optimizer.lr=3e-3"), {}, 3),
    "maps=20, fixed": (("model.maps=20",), FIXED, 1),
    "maps=20, encoder sees what they leave": (("model.maps=20",), {"seen": "rest"}, 1),
    "maps=40": ((MAPS,), {}, 1),
}
"""Name -> options, extra, number of seeds."""


def cohort() -> list[Point]:
    """Held-out subjects: the network, shared maps kept fixed and trained."""
    return [
        Point(f"cohort/{name}#{seed}", "cohort", options, seed, extra)
        for seed in range(3)
        for name, (options, extra, seeds) in COHORT_ARMS.items()
        if seed < seeds
    ]


FINALISTS: dict[str, tuple[tuple[str, ...], dict[str, float | str], int]] = {
    "maps, untrained": ((MAPS,), {"seconds": 0.0}, 1),
    "maps, rate 3e-3": ((MAPS, "optimizer.lr=3e-3"), {}, 3),
    "maps": ((MAPS,), {}, 1),
    "network": ((), {}, 1),
}
"""Recipes on the demo's clips for the demo's CPU time: name -> options, extra, number of seeds."""


def finalists() -> list[Point]:
    """The recipes on the demo's clips."""
    return [
        Point(f"sample/final/{name}#{seed}", "sample", options, seed, extra)
        for seed in range(3)
        for name, (options, extra, seeds) in FINALISTS.items()
        if seed < seeds
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
