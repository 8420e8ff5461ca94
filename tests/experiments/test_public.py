"""experiments/public: the whole path in process, on made scans that lie where nilearn's download leaves its own."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from swift.config.compose import load_frozen
from tests.runs import QUIET, start
from tests.scripts import load

SUBJECTS = 12
TUNED = [
    ("scratch", "scratch"),
    ("linear", "pre-trained, linear"),
    ("full", "pre-trained, full"),
]
SMALL = [
    *("model.embed_dim=12", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.patch_size=[6,6,6,1]"),
    *("model.window=[2,2,2,4]", "model.decoder_dim=8", "data.frames=8", "data.clip_stride=20", "data.workers=0"),
    *("data.batch_size=2", "trainer.threads=1", "trainer.accelerator=cpu", "trainer.val_batches=1", QUIET),
    *("optimizer.warmup_steps=1", "model.maps=4"),
]


class Study:
    """The study run once, its commands in this process, its downloader replaced.

    Attributes:
        out: Its folder.
        said: Every command of the first run, and of a second one on the same folder.
    """

    def __init__(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.module, self.out, self.said = load("public/run.py"), out, ([], [])  # type: ignore[var-annotated]
        self.calls: list[list[str]] = self.said[0]
        patch.setattr("nilearn.datasets.fetch_development_fmri", self.download)
        patch.setattr(self.module, "call", self.call)
        given = ["--grid", "24", "--spacing", "8", "--steps", "2", "--tune-steps", "2", "--seeds", "1"]
        patch.setattr("sys.argv", ["run.py", "--out", str(out), *given, "--set", *SMALL])
        self.module.main()
        self.calls = self.said[1]
        self.module.main()

    def download(self, data_dir: str, reduce_confounds: bool) -> Any:
        """What nilearn gives: the files, and a table with more columns than are wanted."""
        assert not reduce_confounds
        folder = self.module.stand_in(Path(data_dir) / "development_fmri" / "development_fmri", SUBJECTS)
        labels = pd.read_csv(folder / "labels.tsv", sep="\t").assign(FB_Memory=0.5)
        (folder / "labels.tsv").unlink()
        return SimpleNamespace(func=sorted(map(str, folder.glob("*.nii.gz"))), phenotypic=labels)

    def call(self, *words: str | Path) -> None:
        """`python -m NAME ...` without a process of its own; trainings for age are left out, to save time."""
        name, *rest = map(str, words)
        self.calls.append([name, *rest])
        if name == "swift.train":
            if "task=age" not in rest:
                start(*rest)
            return
        if name == "swift.baselines":
            rest = ["--only", "constant,fc", *rest]
        elif rest[0] == "ingest":
            rest += ["--workers", "1"]  # one more process would import torch once more
        main = importlib.import_module(
            "swift.evaluate.__main__" if name == "swift.baselines" else f"{name}.__main__"
        ).main
        try:
            status = main(rest)
        except SystemExit as end:
            status = end.code
        assert not status, (name, rest)

    def labels(self) -> dict[str, dict[str, str]]:
        """Subject -> row of the table that the download left."""
        (file,) = self.out.glob("nilearn/**/labels.tsv")
        with file.open() as stream:
            return {row["participant_id"]: row for row in csv.DictReader(stream, delimiter="\t")}

    def parts(self) -> dict[str, list[str]]:
        """train | val | test -> subjects."""
        (split,) = json.loads((self.out / "split.json").read_text())["splits"]
        return {part: split[part] for part in ("train", "val", "test")}

    def predictions(self, task: str, run: str) -> dict[str, dict[str, str]]:
        """Subject -> what a run says of it in the test part."""
        with (self.out / "runs" / task / run / "predictions" / "test.csv").open() as stream:
            return {row["subject"]: row for row in csv.DictReader(stream)}

    def table(self) -> dict[tuple[str, str, str], float]:
        """Task, method, score -> mean."""
        with (self.out / "table" / "table1.csv").open() as stream:
            return {
                (row["task"], row["method"], row["score"]): float(row["mean"] or "nan")
                for row in csv.DictReader(stream)
            }


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield Study(tmp_path_factory.mktemp("public"), patch)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_subjects_are_split_once_and_by_their_label(study: Study) -> None:
    labels, parts = study.labels(), study.parts()
    assert list(next(iter(labels.values()))) == list(study.module.COLUMNS)
    everybody = sorted(subject for part in parts.values() for subject in part)
    assert everybody == sorted(labels) == [f"sub-pixar{n:03d}" for n in range(1, SUBJECTS + 1)]
    assert [len(parts[part]) for part in parts] == [7, 2, 3]
    for part in parts.values():
        assert {labels[subject]["Child_Adult"] for subject in part} == {"child", "adult"}
    # Pre-training and every label have this split, and only what is not from scratch begins from pre-training.
    for how in (None, *(how for how, _ in TUNED)):
        cfg = load_frozen(study.out / (f"runs/child_adult/{how}-0" if how else "pretrain"), [])
        assert Path(str(cfg.data.split)) == study.out / "split.json"
        assert cfg.init == (None if how in (None, "scratch") else str(study.out / "pretrain"))
    for run in ("scratch-0", "linear-0", "full-0", "baselines/constant", "baselines/fc"):
        assert set(study.predictions("child_adult", run)) == set(parts["test"])
    assert set(study.predictions("age", "baselines/fc")) == set(parts["test"])


@pytest.mark.slow
def test_the_table_has_a_row_for_every_method_and_nothing_is_done_twice(study: Study) -> None:
    rows = {(task, method) for task, method, _ in study.table()}
    baselines = ["majority / mean", "connectome (correlation)"]
    tuned = {("child_adult", method) for method in [*baselines, *(name for _, name in TUNED)]}
    assert rows == tuned | {("age", method) for method in baselines}
    first, second = study.said
    assert [words[0] for words in first] == [
        "swift.data", "swift.data", "swift.train", *(["swift.baselines"] + ["swift.train"] * 3) * 2, "swift.report"
    ]  # fmt: skip
    assert [words[0] for words in second if "task=age" not in words] == ["swift.report"]
    settings = {"task=age", "task.target.column=Age", f"init={study.out / 'pretrain'}", "task.adapt=full", "seed=0"}
    assert settings <= set(first[-2])


@pytest.mark.slow
def test_scores_are_those_of_the_downloaded_labels(study: Study) -> None:
    """Mean age of the training subjects, and AUROC by counting pairs, from labels.tsv and split.json."""
    labels, parts, table = study.labels(), study.parts(), study.table()
    ages = {subject: float(row["Age"]) for subject, row in labels.items()}
    mean = np.mean([ages[subject] for subject in parts["train"]])
    errors = [abs(ages[subject] - mean) for subject in parts["test"]]
    assert table["age", "majority / mean", "mae"] == pytest.approx(np.mean(errors))
    for run, method in TUNED:
        said = study.predictions("child_adult", f"{run}-0")
        p = {
            kind: [float(said[s]["p_adult"]) for s in parts["test"] if labels[s]["Child_Adult"] == kind]
            for kind in ("adult", "child")
        }
        won = [float(a > c) + 0.5 * float(a == c) for a in p["adult"] for c in p["child"]]
        assert table["child_adult", method, "auroc"] == pytest.approx(np.mean(won))
