"""Does pre-training help, on which task, by how much, is it real? The downstream table on a cohort with planted truth.

Makes a synthetic cohort, pre-trains on subjects of whom no label is used, and fine-tunes: from scratch, from random and
from pre-trained weights, on five tasks with three seeds; baselines on the same split; a learning curve over training
subjects; twenty labels without any effect. What is finished is not repeated, so the command may be stopped and given
again. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tables import write_report

HERE = Path(__file__).resolve().parent
GRID, SPACING, FRAMES = 16, 8.0, 64
PARTS = {"extra": 160, "train": 100, "val": 40, "test": 100}
"""Subjects: `extra` is for pre-training alone."""
TASKS = ("synthetic_binary", "synthetic_continuous", "synthetic_frame", "synthetic_site", "synthetic_null")
SEEDS, NULLS = 3, 20
SIZES = (10, 20, 50, 100)
CURVE_TASK = "synthetic_binary"
COHORT = {
    "signal": 2.0,
    "noise_white": 0.5,
    "noise_smooth": 0.4,
    "drift": 0.3,
    "motion": 0.3,
    "amplitude_gain": 0.8,
    "coupling_gain": 0.6,
    "map_variability": 0.2,
}
"""Quieter than a real scan and with larger effects on the signal: an hour of clips has to do for a day of them. How
well the labels follow from the latents (AUROC 0.9, r 0.6) is the generator's own default."""
MODEL = [
    "model.embed_dim=24",
    "model.depths=[2,2]",
    "model.num_heads=[2,4]",
    "model.patch_size=[4,4,4,4]",
    "model.window=[4,4,4,4]",
    "model.position=rope_global",  # where a region lies must survive the pooling over space
    "model.decoder_dim=32",
]
PRETRAIN_STEPS, STEPS = 400, 198
METHODS = {
    "scratch": ["task.adapt=scratch", "optimizer.lr=3e-3"],
    "random_linear": ["task.adapt=linear", "optimizer.lr=5e-3"],
    "linear": ["task.adapt=linear", "optimizer.lr=5e-3"],
    "full": ["task.adapt=full", "optimizer.lr=3e-3"],
}
PRETRAINED = ("linear", "full")
FRAME = ("model.patch_size=[4,4,4,1]", "data.frames=8")
"""A label of every frame wants tokens of one frame; with pre-training of its own."""
ABLATION = {"mask_ratio": ("0.5", "0.8"), "patch_size": ("[4,4,4,4]", "[4,4,4,8]")}
MAPS = ("model.maps=20", "model.maps_of=shared")
COURSES = (*MAPS, "task.courses=true")
"""Pre-training with spatial maps that all subjects share, and a head that gets their courses."""
STAGES = ("table", "baselines", "curve", "maps", "null", "ablation")


@dataclass(frozen=True)
class Point:
    """One run: its folder and settings. `pretraining` comes first; `baselines` are no training."""

    name: str
    settings: tuple[str, ...]
    baselines: bool = False

    def finished(self, out: Path) -> bool:
        """Whether its last file is there."""
        return (out / self.name / ("done" if self.baselines else "summary.json")).is_file()


# ------------------------------------------------------------------------------------------------------------- cohort
def make_cohort(out: Path) -> None:
    """The store, with twenty labels of no effect in its manifest, and the two splits."""
    from swift.data.labels.splits import Split, deal, save_splits
    from swift.data.labels.subjects import people_of
    from swift.data.store import format as fmt
    from swift.data.store.reader import Store
    from swift.data.synthetic import CohortSpec, write_store

    if (out / "pretrain.json").is_file():
        return
    shutil.rmtree(out / "store", ignore_errors=True)
    total = sum(PARTS.values())
    spec = CohortSpec(n_subjects=total, frames=FRAMES, grid=(GRID,) * 3, spacing=SPACING, seed=1, **COHORT)
    write_store(spec, out / "store")
    store = Store(out / "store")
    for number in range(NULLS):
        labels = np.random.default_rng([99, number]).permutation(np.arange(total) % 2)
        for scan, label in zip(store.scans, labels, strict=True):
            scan.phenotypes[f"null_{number:02d}"] = str(label)
    fmt.write_bytes(out / "store" / "manifest.csv", fmt.encode_manifest(store.scans))
    people = people_of(store.scans, "label_binary")
    shares = [count / total for count in PARTS.values()]
    extra, train, val, test = deal(people, shares, seed=0)
    save_splits(out / "split.json", [Split({"train": tuple(train), "val": tuple(val), "test": tuple(test)})])
    both = tuple(sorted([*extra, *train]))
    save_splits(out / "pretrain.json", [Split({"train": both, "val": tuple(val), "test": ()})])


# ------------------------------------------------------------------------------------------------------------- points
def common(out: Path, seed: int) -> list[str]:
    """Settings of every run."""
    return [
        *MODEL,
        "data=store",
        f"data.path={out / 'store'}",
        f"data.grid=[{GRID},{GRID},{GRID}]",
        f"data.spacing={SPACING}",
        "data.frames=16",
        "data.clip_stride=8",
        "data.normalization=percent",
        "data.batch_size=16",
        "data.workers=0",
        "data.verify=false",
        "trainer.threads=1",
        "trainer.accelerator=cpu",
        "trainer.figures=false",
        "trainer.keep_checkpoints=1",
        "trainer.log_every=10",
        "optimizer.warmup_steps=10",
        f"seed={seed}",
    ]


def pretraining(out: Path, name: str = "pretrain", *settings: str) -> Point:
    """Masked reconstruction on subjects that are in no test."""
    steps = [f"trainer.max_steps={PRETRAIN_STEPS}", f"trainer.val_every={PRETRAIN_STEPS // 2}", "optimizer.lr=4e-3"]
    about = [
        *common(out, 0),
        f"data.split={out / 'pretrain.json'}",
        "task.mask_ratio=0.5",
        "task.loss=l2",
        *steps,
        *settings,
    ]
    return Point(name, tuple(about))


def tuning(out: Path, name: str, task: str, method: str, seed: int, *settings: str, init: str = "pretrain") -> Point:
    """One fine-tuning."""
    started = [f"init={out / init}"] if method in PRETRAINED else []
    about = [
        f"task={task}",
        *common(out, seed),
        *METHODS[method],
        *started,
        f"data.split={out / 'split.json'}",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_every={STEPS // 6}",
        "task.pooling=mean_std",  # couplings and amplitudes are second moments: a mean of features hardly holds them
    ]
    return Point(name, (*about, *settings))


def null_label(number: int) -> tuple[str, str]:
    """Settings of a label without effect."""
    return f"task.target.column=null_{number:02d}", f"task.name=null_{number:02d}"


def null_baselines(out: Path) -> None:
    """The baselines of all labels without effect; what needs no label (parcels, connectomes) is made once."""
    from swift.config.compose import composed
    from swift.data.labels.targets import read_labels
    from swift.data.task_module import TargetDataModule
    from swift.evaluate.baselines import SAID, Baselines, leave, summary_of

    todo = [n for n in range(NULLS) if not (out / f"null/{n:02d}/baselines/{list(SAID)[4]}/summary.json").is_file()]
    if not todo:
        return
    about = ["task=synthetic_null", *common(out, 0), f"data.split={out / 'split.json'}", f"run_dir={out / 'null'}"]
    kept: Baselines | None = None
    for number in todo:
        cfg, _ = composed([*about, *null_label(number)])
        assert cfg.task.target is not None
        if kept is None:
            data = TargetDataModule(cfg.data, cfg.task, out / "store", 0)
            kept = Baselines(data, False)
        kept.relabel(read_labels(data.store, cfg.task.target))
        for name in kept.names:
            begin = time.perf_counter()
            made = kept.predict(name)
            summary = summary_of(cfg, data, name, made, time.perf_counter() - begin)
            leave(out / f"null/{number:02d}/baselines/{name}", made, summary)
        print(f"null {number:02d}: baselines", flush=True)


def points(out: Path, stage: str) -> list[Point]:
    """The runs of a stage."""
    if stage == "table":
        made = [pretraining(out, "frame/pretrain", *FRAME)]
        for seed in range(SEEDS):
            for task in TASKS:
                own, init = (FRAME, "frame/pretrain") if task == "synthetic_frame" else ((), "pretrain")
                for method in METHODS:
                    made.append(tuning(out, f"table/{task}/{method}-{seed}", task, method, seed, *own, init=init))
        return made
    if stage == "baselines":
        about = [*common(out, 0), f"data.split={out / 'split.json'}"]
        return [Point(f"table/{task}/baselines", (f"task={task}", *about), True) for task in TASKS]
    if stage == "curve":
        made = []
        for seed in range(SEEDS):
            for n in SIZES[:-1]:  # with all training subjects: the table's own runs
                budget = (f"data.max_subjects={n}", f"data.budget_seed={seed}")
                for method in ("scratch", "linear", "full"):
                    made.append(tuning(out, f"curve/{n}/{method}-{seed}", CURVE_TASK, method, seed, *budget))
                about = (f"task={CURVE_TASK}", *common(out, seed), f"data.split={out / 'split.json'}", *budget)
                made.append(Point(f"curve/{n}/baselines-{seed}", about, True))
        return made
    if stage == "maps":
        made = [pretraining(out, "maps/pretrain", *MAPS)]
        for seed in range(SEEDS):
            for n in SIZES:
                for method in ("random_linear", "linear", "full"):
                    about = (*COURSES, f"data.max_subjects={n}", f"data.budget_seed={seed}")
                    name = f"maps/{n}/{method}-{seed}"
                    made.append(tuning(out, name, CURVE_TASK, method, seed, *about, init="maps/pretrain"))
        return made
    if stage == "null":
        return [
            tuning(out, f"null/{n:02d}/{method}", "synthetic_null", method, n, *null_label(n))
            for method in METHODS
            for n in range(NULLS)
        ]
    made = []
    for ratio in ABLATION["mask_ratio"]:
        for patch in ABLATION["patch_size"]:
            name = f"ablation/m{ratio}-t{patch[-2]}"
            made.append(pretraining(out, f"{name}/pretrain", f"task.mask_ratio={ratio}", f"model.patch_size={patch}"))
            for task in TASKS[:3]:
                at = f"{name}/{task}"
                made.append(tuning(out, at, task, "linear", 0, f"model.patch_size={patch}", init=f"{name}/pretrain"))
    return made


# ------------------------------------------------------------------------------------------------------------ running
def do(job: tuple[Point, Path]) -> tuple[str, float, str]:
    """Run one point in this process; name, seconds and what went wrong (nothing: "")."""
    point, out = job
    begin = time.perf_counter()
    folder, said = out / point.name, io.StringIO()
    try:
        from swift.config.compose import composed

        cfg, _ = composed([*point.settings, f"run_dir={folder}"])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if point.baselines:
                from swift.evaluate.baselines import run_baselines

                run_baselines(cfg)
                (folder / "done").write_text("")
            else:
                from swift.train.run import train

                train(cfg, list(point.settings))
                if point.name != "pretrain" and not point.name.endswith("/pretrain"):
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nobody goes on from here
    except (Exception, SystemExit) as error:
        text = "".join(traceback.format_exception(error))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(said.getvalue()[-5000:] + "\n" + text)
        return point.name, time.perf_counter() - begin, f"{type(error).__name__}: {error}"
    return point.name, time.perf_counter() - begin, ""


def run(todo: Sequence[Point], out: Path, jobs: int, limit: float) -> int:
    """Run what is not finished; returns the number of points that failed or were not begun."""
    todo = [point for point in todo if not point.finished(out)]
    if not todo:
        return 0
    begin, bad, done = time.perf_counter(), 0, 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = iter(todo)
        running: set[Any] = set()
        while True:
            while len(running) < jobs and time.perf_counter() - begin < limit and (one := next(waiting, None)):
                running.add(pool.submit(do, (one, out)))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name, seconds, wrong = future.result()
                done += 1
                bad += bool(wrong)
                print(f"[{done}/{len(todo)}] {name} {seconds:.1f} s {wrong}", flush=True)
    return bad + len(todo) - done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/downstream"), help="runs go there (runs/downstream)")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/downstream/figures"), help="tables and figures go there"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (2)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--limit", type=float, default=1e9, help="begin no further run after so many seconds")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    out = options.out.resolve()
    begin = time.perf_counter()
    if not options.report_only:
        make_cohort(out)
        print(f"cohort: {time.perf_counter() - begin:.0f} s", flush=True)
        left = run([pretraining(out)], out, 1, options.limit) if set(options.stages) != {"baselines"} else 0
        todo = [p for stage in options.stages for p in points(out, stage)]
        first = [p for p in todo if p.name.endswith("/pretrain")]
        if "null" in options.stages:
            null_baselines(out)
        # All pre-trainings first, as fine-tunings begin from them.
        if run(first, out, options.jobs, options.limit - (time.perf_counter() - begin)):
            raise SystemExit(f"a pre-training is not finished (see error.txt below {out}); the same command goes on")
        left += run(todo, out, options.jobs, options.limit - (time.perf_counter() - begin))
        print(f"{time.perf_counter() - begin:.0f} s; {left} runs failed or are left", flush=True)
    write_report(out, options.results, CURVE_TASK, (*SIZES[:-1], PARTS["train"]), {**COHORT, "parts": PARTS})


if __name__ == "__main__":
    main()
