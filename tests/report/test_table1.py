"""The downstream table and the ablation's ranking: numbers by hand, marks only where a real difference was planted."""

import argparse
import csv
import json

import numpy as np
import pytest
import scipy.stats
import yaml
from PIL import Image

from swift.evaluate.compare import corrected_t
from swift.evaluate.downstream import column, load, method_of, results
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import judge, scores
from swift.report.figures import ranking, table1
from swift.utils.errors import UserError


def write(folder, noise, task="ill", seed=0, split="a", kind="binary", n=60, **summary):
    """A judged run whose scores follow the truth through noise of this size; a test set for every split."""
    rng = np.random.default_rng([ord(split[0]), len(task)])
    names = [f"{split}{i:03d}" for i in range(n)]
    target = (np.arange(n) % 2).astype(float) if kind == "binary" else 100 + 15 * rng.normal(size=n)
    seen = (target - target.mean()) / target.std() + noise * np.random.default_rng([seed, int(noise * 1e6)]).normal(
        size=n
    )
    if kind == "binary":
        p = 1 / (1 + np.exp(-seen))
        made = Predictions(kind, ["no", "yes"], names, [""] * n, [-1] * n, target, np.stack([1 - p, p], 1))
    else:
        made = Predictions(kind, [], names, [""] * n, [-1] * n, target, 100 + 15 * seen)
    made.save(folder / "predictions" / "test.csv")
    said = judge(made, made, draws=50)
    about = {"task": task, "adapt": "scratch", "init": None, "seed": seed, "split_hash": split}
    about["n"] = {"train": 120, "val": 20, "test": n}
    (folder / "summary.json").write_text(json.dumps(about | said | summary))
    return made, said["threshold"]


PRE = {"adapt": "full", "init": "runs/pre"}


def report(*argv):
    parser = argparse.ArgumentParser()
    table1.add_arguments(parser)
    return table1.run(parser.parse_args([str(a) for a in argv]))


def test_means_intervals_and_marks(tmp_path, capsys):
    for seed in range(3):
        write(tmp_path / f"s{seed}", 2.0, seed=seed)
        write(tmp_path / f"f{seed}", 0.6, seed=seed, **PRE)
        write(tmp_path / f"n{seed}", 2.0, task="null label", seed=seed)
        write(tmp_path / f"m{seed}", 1.95, task="null label", seed=seed, **PRE)
    write(tmp_path / "b" / "fc", 1.5, method="connectome (correlation)", baseline="fc")
    assert report(tmp_path, "--out", tmp_path / "out", "--draws", 500) == 0
    text = capsys.readouterr().out
    values = [scores(*[(r := load(tmp_path / f"f{s}")).predictions, r.threshold])["auroc"] for s in range(3)]
    shown = f"**{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}**"
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert shown in lines["pre-trained, full"]
    assert list(lines)[2:] == ["connectome (correlation)", "scratch", "pre-trained, full"]
    assert text.count("**") == 2  # not where the two are about equal
    assert "ill, AUROC (n = 120 + 60)" in text
    rows = json.loads((tmp_path / "out" / "table1.json").read_text())
    cells = {(row["task"], row["method"]): row for row in rows}
    best = cells["ill", "pre-trained, full"]
    assert best["low"] < best["mean"] < best["high"]
    assert (best["best"], best["leading"], best["runs"], best["seeds"], best["splits"]) == (True, True, 3, 3, 1)
    assert cells["ill", "scratch"]["p"] < 0.05 < cells["null label", "scratch"]["p"] or (
        not cells["null label", "pre-trained, full"]["best"]
    )
    with (tmp_path / "out" / "table1.csv").open() as file:
        every = list(csv.DictReader(file))
    assert {row["score"] for row in every} == {"auroc", "balanced_accuracy", "f1", "average_precision", "accuracy"}
    tex = (tmp_path / "out" / "table1.tex").read_text()
    assert r"\textbf{" in tex
    assert tex.count(r"\\") == 4
    assert Image.open(tmp_path / "out" / "table1.png").size[0] == 900


def test_permutations_on_demand_tell_a_signal_from_none(tmp_path, capsys):
    """p of the main score: the rank of the run's own U (scipy) among those of shuffled labels."""
    told, _ = write(tmp_path / "told", 1.0, **PRE)
    write(tmp_path / "guess", 50.0)
    report(tmp_path, "--draws", 50, "--permutations", 400)
    found = [line.split("|")[2:5] for line in capsys.readouterr().out.splitlines() if line.startswith("| ill |")]
    p = {method.strip(): float(value) for method, _, value in found}
    rng = np.random.default_rng(1)
    chance = told.scores[:, 1]

    def u(labels):
        return scipy.stats.mannwhitneyu(chance[labels == 1], chance[labels == 0]).statistic

    shuffled = np.array([u(rng.permutation(told.target)) for _ in range(400)])
    assert p["pre-trained, full"] == pytest.approx((np.sum(shuffled >= u(told.target)) + 1) / 401, abs=1e-4)
    assert p["scratch"] > 0.05
    with pytest.raises(UserError, match="--permutations -1"):
        report(tmp_path, "--permutations", -1)


def test_over_splits_the_corrected_t_decides(tmp_path):
    for number, split in enumerate("abcde"):
        write(tmp_path / f"s{split}", 1.2 + 0.05 * number, split=split, kind="regression", task="age")
        write(tmp_path / f"f{split}", 0.5 + 0.05 * number, split=split, kind="regression", task="age", **PRE)
    found = results([tmp_path])
    got = column(found, "r", draws=50)
    by = {method: [scores(r.predictions)["r"] for r in found if r.method == method] for method in ("scratch", PRE_NAME)}
    test = corrected_t(np.subtract(by[PRE_NAME], by["scratch"]), 120, 60)
    assert got["scratch"].p == pytest.approx(test.p)
    assert got[PRE_NAME].best == (test.p < 0.05)
    assert got[PRE_NAME].over == "splits"
    assert got[PRE_NAME].mean == pytest.approx(np.mean(by[PRE_NAME]))
    one = corrected_t(by[PRE_NAME], 120, 60)
    assert (got[PRE_NAME].low, got[PRE_NAME].high) == pytest.approx((one.low, one.high))
    lower = column(found, "mae", draws=50)
    assert lower[PRE_NAME].leading  # smaller is better


PRE_NAME = "pre-trained, full"


def test_equal_methods_are_marked_no_more_often_than_the_level(tmp_path):
    marked = 0
    for trial in range(40):
        folder = tmp_path / str(trial)
        write(folder / "a", 1.0, seed=trial)
        write(folder / "b", 1.000001, seed=trial + 1000, **PRE)
        found = results([folder])
        marked += any(cell.best for cell in column(found, "auroc", seed=trial, draws=200).values())
    assert marked <= 6  # 5 % of 40 is 2; P(more than 6) < 0.5 %


def test_methods_without_a_common_split_are_not_compared(tmp_path):
    write(tmp_path / "s", 2.0, split="a")
    write(tmp_path / "f", 0.1, split="b", **PRE)
    got = column(results([tmp_path]), "auroc", draws=50)
    assert not got[PRE_NAME].best
    assert np.isnan(got["scratch"].p)


def test_names_of_methods():
    assert method_of({"adapt": "scratch", "init": None}) == "scratch"
    assert method_of({"adapt": "linear", "init": None}) == "random weights, linear"
    assert method_of({"adapt": "lora", "init": "runs/a"}) == "pre-trained, lora"
    assert method_of({"method": "volumes", "adapt": None}) == "volumes"


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run with"):
        report(tmp_path / "empty")
    write(tmp_path / "x" / "1", 1.0)
    write(tmp_path / "x" / "2", 0.5)
    with pytest.raises(UserError, match="both are scratch on ill with seed 0"):
        report(tmp_path / "x")
    write(tmp_path / "y", 1.0)
    content = json.loads((tmp_path / "y" / "summary.json").read_text())
    content["scores"]["test"]["auroc"] += 1e-6
    (tmp_path / "y" / "summary.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"summary\.json says auroc"):
        report(tmp_path / "y")
    (tmp_path / "y" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="not that of a judged run"):
        report(tmp_path / "y")
    with pytest.raises(UserError, match="--draws 0"):
        report(tmp_path / "x" / "1", "--draws", 0)


# ----------------------------------------------------------------------------------------------------------- ranking
def ablation(folder):
    """Two mask ratios by two patch sizes, two tasks, two seeds."""
    noise = {(0.4, 1): 1.5, (0.4, 2): 1.0, (0.8, 1): 0.8, (0.8, 2): 0.3}
    for number, ((ratio, patch), size) in enumerate(noise.items()):
        pre = folder / f"pre{number}"
        pre.mkdir(parents=True)
        config = {"task": {"mask_ratio": ratio}, "model": {"patch_size": [6, 6, 6, patch]}, "seed": number}
        (pre / "config.yaml").write_text(yaml.safe_dump(config))
        for seed in range(2):
            about = {"adapt": "full", "init": str(pre / "checkpoints" / "last.ckpt")}
            write(folder / f"ill{number}{seed}", size, seed=seed, **about)
            write(folder / f"age{number}{seed}", size, seed=seed, task="age", kind="regression", **about)


def rank(*argv):
    parser = argparse.ArgumentParser()
    ranking.add_arguments(parser)
    return ranking.run(parser.parse_args([str(a) for a in argv]))


def test_points_are_ranked_by_the_sum_of_z(tmp_path, capsys):
    ablation(tmp_path)
    assert rank(tmp_path, "--out", tmp_path / "out", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["settings"] == {"model.patch_size": "[6,6,6,2]", "task.mask_ratio": "0.8"}
    assert rows[-1]["settings"] == {"model.patch_size": "[6,6,6,1]", "task.mask_ratio": "0.4"}
    means = np.empty((4, 2))
    for number in range(4):
        for place, (task, score) in enumerate((("age", "r"), ("ill", "auroc"))):
            runs = [load(tmp_path / f"{task}{number}{seed}") for seed in range(2)]
            means[number, place] = np.mean([scores(r.predictions, r.threshold)[score] for r in runs])
    z = (means - means.mean(0)) / means.std(0, ddof=1)
    assert [row["sum_z"] for row in rows] == pytest.approx(sorted(z.sum(1), reverse=True))
    assert "| 1 | [6,6,6,2] | 0.8 |" in (tmp_path / "out" / "ranking.md").read_text()
    assert (tmp_path / "out" / "ranking.csv").read_text().count("\n") == 5


def test_a_ranking_needs_two_points_every_task_and_a_pre_training(tmp_path):
    ablation(tmp_path)
    with pytest.raises(UserError, match="same settings"):
        rank(tmp_path / "ill00", tmp_path / "age00")
    with pytest.raises(UserError, match="no run on age"):
        rank(tmp_path / "ill00", tmp_path / "age00", tmp_path / "ill10")
    write(tmp_path / "scratch", 1.0)
    with pytest.raises(UserError, match="began from no pre-training"):
        rank(tmp_path / "scratch", tmp_path / "ill00")
    write(tmp_path / "gone", 1.0, adapt="full", init="nowhere/run")
    with pytest.raises(UserError, match="is no run's folder"):
        rank(tmp_path / "gone", tmp_path / "ill00")


def test_the_interval_of_the_training_mean_map_is_a_point_and_of_few_hits_unknown(tmp_path, capsys):
    """Residual r of the mean map is 0 for everybody, whatever Dice says; six hits of six are too few to tell."""
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(6)]
    columns = ["residual_r", "r", "identification", "rank", "diagonality", "dice"]
    for method, rest, hits in (("training mean map", np.zeros(6), 1 / 6), ("scratch", rng.uniform(0.1, 0.6, 6), 1.0)):
        values = np.column_stack([rest, rng.uniform(size=6), np.full(6, hits), *rng.uniform(size=(3, 6))])
        made = Predictions("map", columns, names, [""] * 6, [-1] * 6, np.ones(6), values)
        folder = tmp_path / method.split()[0]
        made.save(folder / "predictions" / "test.csv")
        said = {"scores": {"test": dict(zip(columns, values.mean(0).tolist(), strict=True))}, "threshold": 0.5}
        about = {"task": "task_map", "method": method, "seed": 0, "split_hash": "a", "n": {"train": 12}}
        (folder / "summary.json").write_text(json.dumps(about | said))
    assert report(tmp_path, "--out", tmp_path / "out", "--draws", 200) == 0
    assert "| training mean map | 0.000 [0.000, 0.000] |" in capsys.readouterr().out
    assert report(tmp_path, "--out", tmp_path / "out", "--draws", 200, "--score", "identification") == 0
    text = capsys.readouterr().out
    assert "| training mean map | 0.167 [0.167, 0.167] |" in text
    assert "| scratch | **1.000** (too few) |" in text or "| scratch | 1.000 (too few) |" in text
