"""`python -m swift.embed` and `swift.Embedder`: equal to a plain recomputation, from a file and from a store alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.base import clone
from torch import nn

import swift
from swift.config.compose import load_frozen
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.store.reader import Store
from swift.inference.embed_cli import main
from swift.inference.export import export
from swift.parallel.setup import resolve
from swift.train.init_weights import start_from
from swift.train.wiring import build_module
from swift.utils.errors import BadScan, UserError
from tests.data import scans

FRAMES = 8
CLIPS = (0, 8, 12)
"""First frames of the clips of a scan of 20 frames."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans of 20 frames at 3 mm, one of them stored as LPI, with masks beside them."""
    folder = tmp_path_factory.mktemp("files")
    for number, codes in ((1, "RAS"), (2, "LPI")):
        scans.save(folder / f"sub-{number}_task-a.nii.gz", scans.bold(20, seed=number), codes=codes)
        scans.save(folder / f"sub-{number}_task-a_mask.nii.gz", scans.ellipsoid(), codes=codes, dtype=np.uint8)
    return folder


@pytest.fixture(scope="module")
def ingested(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans in a store."""
    out = tmp_path_factory.mktemp("ingested") / "store"
    assert not ingest(find_sources([files]), out, Recipe((12, 12, 12), 4.0)).exit_code
    return out


def embed(*arguments: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--quiet", "--device", "cpu"])
    assert ended.value.code == status


def npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def encoder_of(run: Path) -> nn.Module:
    module = build_module(resolve(load_frozen(run, [])))
    start_from(module, str(run))
    encoder: nn.Module = module.model.encoder
    return encoder


def reference(encoder: nn.Module, store: Path, place: int, starts: Sequence[int] = CLIPS) -> dict[str, np.ndarray]:
    """Stage -> (clips, t, E): values of the store scaled by numpy, tokens picked one by one."""
    opened = Store(store)
    values, mask = opened.values(place).astype(np.float64), opened.mask(place)
    std = values.std(0)
    scaled = (values - values.mean(0)) / np.where(std > 0, std, 1)
    dense = np.zeros((len(starts), 1, *mask.shape, FRAMES), np.float32)
    for number, start in enumerate(starts):
        dense[number, 0][mask] = scaled[start : start + FRAMES].T
    with torch.no_grad():
        features = encoder.eval()(torch.from_numpy(dense))
    out = {}
    for stage, feature in enumerate(features):
        cell = 4 * 2**stage
        seen = [
            feature[:, i, j, k].numpy()
            for i, j, k in np.ndindex(*feature.shape[1:4])
            if mask[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell, k * cell : (k + 1) * cell].any()
        ]
        out[f"stage{stage + 1}"] = np.mean(seen, 0)
    return out


def test_every_row_equals_a_recomputation(finished: Path, ingested: Path, tmp_path: Path) -> None:
    by_hand = [reference(encoder_of(finished), ingested, place) for place in (0, 1)]
    for per in ("frame", "clip", "scan"):
        embed(finished, ingested, "--out", tmp_path / f"{per}.npz", "--layer", "all", "--per", per)
    frames, clips, whole = (npz(tmp_path / f"{per}.npz") for per in ("frame", "clip", "scan"))
    assert clips["start"].tolist() == [*CLIPS, *CLIPS]
    assert frames["frame"].tolist() == [*range(20), *range(20)]
    assert whole["scan"].tolist() == ["sub-1_task-a", "sub-2_task-a"]
    assert whole["subject"].tolist() == ["sub-1", "sub-2"]
    for layer, width in (("stage1", 12), ("stage2", 24)):
        steps = np.stack([one[layer] for one in by_hand])  # scan, clip, step, E
        assert steps.shape == (2, 3, FRAMES // 2, width)
        np.testing.assert_allclose(clips[layer], steps.mean(2).reshape(6, width), atol=2e-5)
        np.testing.assert_allclose(whole[layer], steps.mean((1, 2)), atol=2e-5)
        for scan in (0, 1):
            for frame in range(20):
                held = [steps[scan, c, (frame - s) // 2] for c, s in enumerate(CLIPS) if 0 <= frame - s < FRAMES]
                np.testing.assert_allclose(frames[layer][20 * scan + frame], np.mean(held, 0), atol=2e-5)


def test_a_file_equals_its_copy_in_a_store_to_the_last_bit(
    finished: Path, files: Path, ingested: Path, tmp_path: Path
) -> None:
    embed(finished, files, "--out", tmp_path / "files.npz", "--per", "clip")
    embed(finished, ingested, "--out", tmp_path / "store.npz", "--per", "clip", "--batch", "1")
    mine, stored = npz(tmp_path / "files.npz"), npz(tmp_path / "store.npz")
    assert mine["scan"].tolist() == stored["scan"].tolist()
    np.testing.assert_allclose(mine["embedding"], stored["embedding"], atol=1e-6)  # batches of 3 and 1
    embed(finished, ingested, "--out", tmp_path / "same.npz", "--per", "clip")
    np.testing.assert_array_equal(mine["embedding"], npz(tmp_path / "same.npz")["embedding"])


def test_run_checkpoint_and_exported_file_are_one_model(finished: Path, ingested: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "model.safetensors")
    checkpoint = sorted((finished / "checkpoints").glob("step-*"))[-1]
    found = []
    for number, model in enumerate((finished, finished / "checkpoints", checkpoint, tmp_path / "model.safetensors")):
        embed(model, f"{ingested}:sub-2_task-a", "--out", tmp_path / f"{number}.npz")
        found.append(npz(tmp_path / f"{number}.npz"))
    assert json.loads(str(found[0]["info"]))["step"] == 6
    for one in found:
        assert one["scan"].tolist() == ["sub-2_task-a"]
        np.testing.assert_array_equal(one["embedding"], found[0]["embedding"])


def test_parquet_holds_the_same_rows(finished: Path, ingested: Path, tmp_path: Path) -> None:
    for suffix in ("npz", "parquet"):
        embed(finished, ingested, "--out", tmp_path / f"a.{suffix}", "--layer", "all", "--per", "frame")
    arrays, table = npz(tmp_path / "a.npz"), pq.read_table(tmp_path / "a.parquet")
    assert json.loads(table.schema.metadata[b"swift"])["layers"] == {"stage1": 12, "stage2": 24}
    assert table.column_names[:4] == ["scan", "subject", "frame", "stage1_0"]
    assert table["scan"].to_pylist() == arrays["scan"].tolist()
    assert table["frame"].to_pylist() == arrays["frame"].tolist()
    for layer in ("stage1", "stage2"):
        columns = [table[f"{layer}_{place}"].to_numpy() for place in range(arrays[layer].shape[1])]
        np.testing.assert_array_equal(np.stack(columns, 1), arrays[layer])


def test_a_subject_is_the_mean_of_its_scans(finished: Path, files: Path, tmp_path: Path) -> None:
    for number, name in ((1, "sub-7_run-1"), (2, "sub-7_run-2")):
        for part in ("", "_mask"):
            shutil.copy(files / f"sub-{number}_task-a{part}.nii.gz", tmp_path / f"{name}{part}.nii.gz")
    for per in ("scan", "subject"):
        embed(finished, tmp_path, "--out", tmp_path / f"{per}.npz", "--per", per)
    whole, subject = npz(tmp_path / "scan.npz"), npz(tmp_path / "subject.npz")
    assert (subject["subject"].tolist(), subject["scans"].tolist()) == (["sub-7"], [2])
    np.testing.assert_allclose(subject["embedding"][0], whole["embedding"].mean(0), rtol=1e-6)


def test_a_bad_scan_is_named_and_the_others_go_on(
    finished: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flat = scans.save(tmp_path / "flat.nii", scans.bold()[..., 0])
    short = scans.save(tmp_path / "short.nii.gz", scans.bold(4))
    fast = scans.save(tmp_path / "fast.nii.gz", scans.bold(20), tr=0.7)
    torn = tmp_path / "torn.nii.gz"
    torn.write_bytes(short.read_bytes()[:-5000])
    good = files / "sub-1_task-a.nii.gz"
    capsys.readouterr()
    embed(finished, flat, short, fast, torn, good, "--out", tmp_path / "o.npz", "--json", status=1)
    said = json.loads(capsys.readouterr().out)
    reasons = {one["scan"]: one["reason"] for one in said["failed"]}
    assert said["scans"] == said["rows"] == 1
    assert list(reasons) == ["flat", "short", "fast", "torn"]
    assert "3D" in reasons["flat"]
    assert "4 frames, but the model takes clips over 8" in reasons["short"]
    assert "TR 0.7 s, but the model was trained on 2 s" in reasons["fast"]
    assert "truncated" in reasons["torn"]
    assert all("\n" not in reason for reason in reasons.values())
    assert "flat: failed: flat.nii: 3D" in caplog.text
    assert npz(tmp_path / "o.npz")["scan"].tolist() == ["sub-1_task-a"]


def test_another_tr_is_resampled_or_kept_by_option(finished: Path, tmp_path: Path) -> None:
    data = scans.bold(40, seed=5)
    scans.save(tmp_path / "fast.nii.gz", data, tr=1.0)
    scans.save(tmp_path / "fast_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    for choice in ("resample", "keep"):
        out = tmp_path / f"{choice}.npz"
        embed(finished, tmp_path / "fast.nii.gz", "--out", out, "--per", "clip", "--other-tr", choice)
    assert npz(tmp_path / "resample.npz")["start"].tolist() == [0, 8, 12]  # 20 frames of 2 s
    assert npz(tmp_path / "keep.npz")["start"].tolist() == [0, 8, 16, 24, 32]
    recipe = Recipe((12, 12, 12), 4.0, tr_resample=2.0)
    assert not ingest(find_sources([tmp_path / "fast.nii.gz"]), tmp_path / "store", recipe).exit_code
    embed(finished, tmp_path / "store", "--out", tmp_path / "ingested.npz", "--per", "clip")
    mine, stored = npz(tmp_path / "resample.npz"), npz(tmp_path / "ingested.npz")
    np.testing.assert_array_equal(mine["embedding"], stored["embedding"])


def test_nothing_is_written_when_all_fail(finished: Path, tmp_path: Path) -> None:
    short = scans.save(tmp_path / "short.nii.gz", scans.bold(4))
    for name in ("o.npz", "o.parquet"):
        embed(finished, short, "--out", tmp_path / name, status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["short.nii.gz"]


MISTAKES = [
    (["nowhere", "{scan}"], "nowhere: no such run, checkpoint or file"),
    (["{empty}", "{scan}"], "holds no checkpoint of swift"),
    (["{text}", "{scan}"], "cannot be read as plain weights"),
    (["{bare}", "{scan}"], "was not written by swift.export"),
    (["{loose}", "{scan}"], "has no contract beside its weights"),
    (["{run}", "gone.nii.gz"], "gone.nii.gz: no such file or folder"),
    (["{run}", "{text}"], "neither a NIfTI file"),
    (["{run}", "{scan}", "{scan}"], "2 scans have the name sub-1_task-a"),
    (["{run}", "{other}"], "has grid [5, 6, 7] at 2 mm, the model takes [12, 12, 12] at 4 mm"),
    (["{run}", "{store}:sub-9"], "no scan 'sub-9'"),
    (["{run}", "{scan}", "--layer", "stage3"], "--layer stage3: this model has stage1, stage2, last (stage2) and all"),
    (["{run}", "{scan}", "--out", "{empty}/a.csv"], "must end in .npz or .parquet"),
    (["{run}", "{scan}", "--out", "{text}.npz"], "exists already"),
    (["{run}", "{scan}", "--device", "tpu9"], "--device tpu9: legal are auto, cpu, cuda"),
    (["{run}", "{scan}", "--device", "cuda:77"], "--device cuda:77: torch sees"),
    (["{run}", "{scan}", "--batch", "0"], "--batch 0: must be at least 1"),
    (["{run}", "{scan}", "--tr", "900"], "--tr 900: legal is"),
    (["{run}", "{scan}", "--config", "{run}"], "carries its own settings"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES)
def test_a_mistake_is_one_line(
    arguments: list[str],
    line: str,
    finished: Path,
    files: Path,
    ingested: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import save_file

    from swift.parallel.checkpoint.read import FORMAT
    from swift.parallel.checkpoint.write import write_sealed
    from tests.data.stores import build

    places = {"run": finished, "scan": files / "sub-1_task-a.nii.gz", "store": ingested, "empty": tmp_path / "empty"}
    places |= {name: tmp_path / f"{name}.safetensors" for name in ("bare", "loose")}
    places |= {"text": tmp_path / "notes.txt", "other": tmp_path / "other"}
    places["empty"].mkdir()
    places["text"].write_text("hello")
    (tmp_path / "notes.txt.npz").write_text("mine")
    if "{other}" in arguments:
        build(places["other"], [1])
    save_file({"a": torch.zeros(1)}, places["bare"])
    config = {"format": FORMAT, "config": '{"seed": 0}', "step": "1"}
    write_sealed(places["loose"], [], config)
    given = [one.format(**places) for one in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out.npz")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*given, *out, "--quiet"])
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert line in error[-1]
    assert error[-1].startswith("error: ")
    assert not (tmp_path / "out.npz").exists()


def test_v1_weights_need_settings_and_then_embed(
    finished: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The encoder's own names stand for themselves in an import, so a state dict of it is a v1 file to the loader.
    module = build_module(resolve(load_frozen(finished, [])))
    start_from(module, str(finished))
    torch.save({"state_dict": module.model.encoder.state_dict()}, tmp_path / "v1.ckpt")
    scan = files / "sub-1_task-a.nii.gz"
    embed(tmp_path / "v1.ckpt", scan, "--out", tmp_path / "a.npz", status=2)
    assert "add --config RUN" in capsys.readouterr().err
    embed(tmp_path / "v1.ckpt", scan, "--out", tmp_path / "a.npz", "--config", finished)
    embed(finished, scan, "--out", tmp_path / "b.npz")
    np.testing.assert_array_equal(npz(tmp_path / "a.npz")["embedding"], npz(tmp_path / "b.npz")["embedding"])


def test_the_transformer_gives_what_the_command_writes(finished: Path, files: Path, tmp_path: Path) -> None:
    paths = [files / f"sub-{number}_task-a.nii.gz" for number in (2, 1)]
    embedder = swift.Embedder(finished, device="cpu", layer="all")
    copy = clone(embedder)
    assert copy.get_params() == embedder.get_params()
    rows = copy.fit_transform(paths)
    assert rows.shape == (2, 36)
    assert list(copy.get_feature_names_out()[[0, 12]]) == ["stage1_0", "stage2_0"]
    embed(finished, *paths, "--out", tmp_path / "o.npz", "--layer", "all")
    written = npz(tmp_path / "o.npz")
    np.testing.assert_array_equal(rows, np.hstack([written["stage1"], written["stage2"]]))
    assert copy.set_params(layer="last").transform(paths).shape == (2, 24)


def test_the_transformer_names_a_bad_scan(finished: Path, files: Path, tmp_path: Path) -> None:
    embedder = swift.Embedder(finished, device="cpu")
    short = scans.save(tmp_path / "short.nii.gz", scans.bold(4))
    with pytest.raises(BadScan, match="short: 4 frames"):
        embedder.transform([files / "sub-1_task-a.nii.gz", short])
    with pytest.raises(UserError, match="holds 2 scans"):
        embedder.transform([files])
    with pytest.raises(UserError, match="wants a list of paths"):
        embedder.transform(str(short))
    with pytest.raises(UserError, match="not Nifti1Image"):
        embedder.transform([nib.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4))])


def test_a_pipeline_fits_on_scans(finished: Path, files: Path) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    paths = [files / f"sub-{number}_task-a.nii.gz" for number in (1, 2)]
    model = make_pipeline(swift.Embedder(finished, device="cpu"), Ridge(1e-9)).fit(paths, [3.0, 5.0])
    np.testing.assert_allclose(model.predict(paths), [3.0, 5.0], atol=1e-3)


def test_importing_swift_stays_cheap() -> None:
    import subprocess
    import sys

    code = "import sys, swift; print(sorted({'torch', 'sklearn', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        swift.Embeder  # noqa: B018


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_fingerprint_is_that_of_the_written_rows(
    suffix: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject in (1, 2):
        for again in (1, 2):
            bold = scans.bold(12, seed=subject) + scans.bold(12, seed=10 * subject + again)
            scans.save(tmp_path / "f" / f"sub-{subject}_task-a_run-{again}.nii.gz", bold)
    mask = scans.save(tmp_path / "mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    out = tmp_path / f"e.{suffix}"
    embed(finished, tmp_path / "f", "--out", out, "--layer", "all", "--fingerprint", "--mask", mask, "--json")
    found = json.loads(capsys.readouterr().out)["fingerprint"]
    from swift.evaluate.fingerprint import fingerprint

    if suffix == "npz":
        with np.load(out, allow_pickle=False) as file:
            subjects, rows = file["subject"], {name: file[name] for name in found}
    else:
        table = pq.read_table(out).to_pandas()
        subjects = table["subject"].to_numpy()
        rows = {name: table.filter(regex=f"^{name}_").to_numpy() for name in found}
    assert list(found) == ["stage1", "stage2"]
    for layer, values in rows.items():
        again = fingerprint(values, subjects)
        assert found[layer]["identified"] == again["identified"]
        assert found[layer]["icc"]["median"] == pytest.approx(again["icc"]["median"], rel=1e-5)
    embed(finished, tmp_path / "f", "--out", tmp_path / "c.npz", "--per", "clip", "--fingerprint", status=2)
