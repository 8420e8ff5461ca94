"""python -m swift.data: what is printed, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from swift.data.__main__ import main
from swift.data.labels.splits import load_splits
from tests.data import scans

SMALL = ["--grid", "24", "--spacing", "4", "--workers", "1", "--quiet"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, shown.out, shown.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cli")
    data = scans.dataset(root / "d", subjects=6)
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(data), "--out", str(root / "s"), *SMALL])
    assert ended.value.code == 0
    return root / "s", data


def test_ingest_prints_figures(tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "ingest", made[1], "--out", tmp_path / "s", *SMALL, "--json")
    figures = json.loads(out)
    assert (code, figures["added"], figures["failed"], figures["present"]) == (0, 6, 0, 0)
    assert figures["scans_per_minute"] == pytest.approx(60 * 6 / figures["seconds"], rel=0.05)
    code, out, err = run(capsys, "ingest", made[1], "--out", tmp_path / "s", *SMALL)
    assert (code, err) == (0, "")
    assert "0 added, 6 there already, 0 changed, 0 failed" in out


def test_some_failed_is_1_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = scans.dataset(tmp_path / "d", subjects=2)
    next(data.rglob("sub-01*_bold.nii.gz")).write_bytes(b"")
    code, out, err = run(capsys, "ingest", data, "--out", tmp_path / "s", *SMALL)
    assert code == 1
    assert "1 added, 0 there already, 0 changed, 1 failed" in out
    assert "ingest_report.csv" in err
    assert "a NIfTI header has 348" in (tmp_path / "s" / "ingest_report.csv").read_text()


MISTAKES = {
    "no place": (["ingest", "/nowhere", "--out", "{t}/s"], "no such file or folder"),
    "no out": (["ingest", "{d}"], "--out STORE is missing"),
    "unwritable": (["ingest", "{d}", "--out", "/dev/null/s"], "cannot be made a store"),
    "grid": (["ingest", "{d}", "--out", "{t}/s", "--grid", "1"], "grid [1, 1, 1]"),
    "two voxel counts": (["ingest", "{d}", "--out", "{t}/s", "--grid", "3", "4"], "--grid 3 4: one number or three"),
    "other grid": (["ingest", "{d}", "--out", "{s}", "--grid", "48", "--spacing", "4"], "use another folder"),
    "layout": (["ingest", "{d}", "--out", "{t}/s", "--layout", "x"], "legal are auto, bids"),
    "tr": (["ingest", "{d}", "--out", "{t}/s", "--tr", "2000"], "--tr 2000"),
    "no store": (["info", "{t}"], "not a swift store"),
    "no scan": (["export", "{s}", "--out", "{t}", "--scan", "zz"], "no scan 'zz'"),
    "nothing to repair from": (["repair", "{s}"], "--replica STORE or --source PATH"),
    "choice of nothing": (["repair", "{s}", "--replica", "{s}", "--task", "a"], "and there is none"),
    "frame spacing": (["ingest", "{d}", "--out", "{t}/s", "--frame-spacing", "2"], "there are none"),
    "entity": (["ingest", "{d}", "--out", "{t}/s", "--entity", "x"], "KEY=LABEL"),
    "label": (["split", "{s}", "--out", "{t}/x.json", "--label", "iq"], "--label iq: no such phenotype; there are age"),
    "shares": (["split", "{s}", "--out", "{t}/x.json", "--val", "2"], "val=2.0"),
    "continuous": (["split", "{s}", "--out", "{t}/x.json", "--label", "sex", "--continuous"], "is not a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_2(
    name: str, tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = MISTAKES[name]
    code, out, err = run(capsys, *(word.format(t=tmp_path, s=made[0], d=made[1]) for word in words))
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_info(tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", made[0], "--json", "--scan", "sub-01_ses-1_task-rest_run-1", "--qc", tmp_path)
    figures = json.loads(out)
    assert code == 0
    assert {k: figures[k] for k in ("scans", "subjects", "frames", "grid", "spacing_mm", "tr", "sites", "tasks")} == {
        "scans": 6, "subjects": 6, "frames": 48, "grid": [24, 24, 24], "spacing_mm": 4.0, "tr": {"2": 6},
        "sites": ["A"], "tasks": ["rest"],
    }  # fmt: skip
    (scan,) = figures["scan_list"]
    assert scan["notes"][:2] == [
        "brain mask: sub-01_ses-1_task-rest_run-1_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz",
        "space MNI152NLin2009cAsym: grid in the fixed box of MNI152",
    ]
    assert figures["placement"] == "MNI152: one fixed box for all scans around 0, -17, 5 mm"
    assert (scan["space"], scan["dropped"], scan["start_time"]) == ("MNI152NLin2009cAsym", 0, 0.0)
    assert Path(scan["picture"]).is_file()
    code, out, _ = run(capsys, "info", made[0], "--scans")
    assert "scans           6" in out
    assert "note: brain mask" in out


def test_verify_repair_copy_export(tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "copy", made[0], tmp_path / "c", "--quiet")
    assert (code, "all verified" in out) == (0, True)
    shard = tmp_path / "c" / "shards" / "00000.h5"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 4
    shard.write_bytes(raw)
    code, out, _ = run(capsys, "verify", tmp_path / "c", "--quiet")
    assert (code, out.startswith("damaged: shard 00000.h5")) == (1, True)
    code, out, _ = run(capsys, "verify", tmp_path / "c", "--json")
    assert json.loads(out)["damaged"][0]["shard"] == "00000.h5"
    code, out, _ = run(capsys, "repair", tmp_path / "c", "--replica", made[0])
    assert (code, out.startswith("restored from replica")) == (0, True)
    assert run(capsys, "verify", tmp_path / "c", "--quiet")[0] == 0
    code, out, _ = run(
        capsys, "export", tmp_path / "c", "--out", tmp_path / "nii", "--scan", "sub-02_ses-1_task-rest_run-2"
    )
    assert code == 0
    assert nib.load(out.strip()).shape == (24, 24, 24, 8)


def test_split(
    tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "split.json"
    code, out, _ = run(
        capsys, "split", made[0], "--out", file, "--val", "0.34", "--test", "0.33", "--label", "sex",
        "--pretrained", made[0], "--json",
    )  # fmt: skip
    assert code == 0
    (split,) = load_splits(file)
    counts = {"train": 2, "val": 2, "test": 2}
    how = {"seed": 0, "val": 0.34, "test": 0.33}
    assert json.loads(out) == [{"hash": split.hash, **counts, "how": how}]
    assert {part: len(names) for part, names in split.parts.items()} == counts
    assert "test subjects were in pre-training" in caplog.text
    code, out, _ = run(capsys, "split", made[0], "--out", file, "--folds", "3", "--val", "0.25", "--seed", "5")
    line = f"{file}:2  hash {load_splits(file)[2].hash}  train 3  val 1  test 2"
    assert out.splitlines()[2] == line + "  (seed 5  folds 3  fold 2  repeat 0  val 0.25)"
    assert sorted(name for fold in load_splits(file) for name in fold.parts["test"]) == [
        f"sub-{n:02d}" for n in range(1, 7)
    ]


def test_list_says_what_would_be_done(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "ingest", made[1], "--list")
    assert code == 0
    assert out.count("desc-brain_mask") == 6


def test_help_in_a_process_of_its_own() -> None:
    """It answers without importing torch, lightning or hydra."""
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('swift.data', run_name='__main__')\n"
    code += "except SystemExit: print([m for m in ('torch', 'lightning', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ingest" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_store_and_ingest_import_neither_lightning_nor_hydra() -> None:
    code = "import sys, swift.data.store.reader, swift.data.ingest.pipeline; "
    code += "print([m for m in ('torch', 'lightning', 'hydra', 'omegaconf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
