"""`python -m swift.attribute`: what it explains, where its maps lie, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from swift.config.schema import Config
from swift.data.store.spaces import MNI, OWN
from swift.inference.attribute_cli import main, places_differ
from swift.inference.attribution import attribute, choose_target, on_own_grid, score_of, some
from swift.inference.fit_scan import Fitting, find_scans, fit
from swift.inference.model import Trained, load_trained
from swift.models.heads import build_model
from swift.parallel.checkpoint.read import FORMAT
from swift.parallel.checkpoint.write import Entry, write_sealed
from tests.data import scans
from tests.small import settings


def finetuned(path: Path, *overrides: str) -> Path:
    """An exported fine-tuned model with random weights, which keep it from being the same everywhere."""
    cfg: Config = settings(*overrides)
    torch.manual_seed(0)
    model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))

    def entry(name: str, value: torch.Tensor) -> Entry:
        return Entry(name, torch.float32, tuple(value.shape), lambda: value)

    contract = {"grid": [12, 12, 12], "spacing": 4.0, "orientation": "RAS", "frames": 8, "frame_stride": 1}
    contract |= {"normalization": "zscore_voxel", "background": 0.0, "tr": [2.0, 2.0]}
    assert cfg.task.target is not None
    target = {"classes": cfg.task.target.classes}
    target |= {"mean": 10.0, "std": 4.0} if cfg.task.target.kind == "regression" else {}
    said = {"config": asdict(cfg), "contract": contract, "step": 5, "target": target}
    metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in said.items()}
    write_sealed(path, [entry(name, value.detach()) for name, value in model.named_parameters()], metadata)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tasks = {"binary": "sex", "frame": "synthetic_frame", "many": "diagnosis"}
    return {name: finetuned(folder / f"{name}.safetensors", f"task={task}") for name, task in tasks.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames at 3 mm, stored as ASL, with a mask beside it."""
    folder = tmp_path_factory.mktemp("file")
    scans.save(folder / "sub-1_mask.nii.gz", scans.ellipsoid(), codes="ASL", dtype=np.uint8)
    return scans.save(folder / "sub-1.nii.gz", scans.bold(20), codes="ASL")


def explain(*arguments: object) -> None:
    main([*map(str, arguments), "--quiet", "--device", "cpu"])


def clips(trained: Trained, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    scan = fit(find_scans([file], trained.contract)[0], trained.contract, Fitting())
    batch = scan.clips([0, 8], torch.device("cpu"))
    return batch["bold"], batch["brain"]


def test_the_score_is_the_log_odds_of_a_class(models: dict[str, Path], file: Path) -> None:
    for name, wanted, place in (("binary", None, 1), ("binary", "F", 0), ("many", "bipolar", 2)):
        trained = load_trained(models[name])
        assert choose_target(trained, wanted) == place
        bold, brain = clips(trained, file)
        with torch.no_grad():
            p = trained.model(bold, brain).double().softmax(-1)[:, place]
            found = score_of(trained, place)(bold, brain)
        np.testing.assert_allclose(found.numpy(), torch.log(p / (1 - p)).numpy(), rtol=1e-4)
        assert found.std() > 0


def test_the_score_of_a_frame_task_is_the_middle_frames_value(models: dict[str, Path], file: Path) -> None:
    trained = load_trained(models["frame"])
    bold, brain = clips(trained, file)
    with torch.no_grad():
        frames = trained.model(bold, brain)
        found = score_of(trained, choose_target(trained, None))(bold, brain)
    assert frames.shape == (2, 8, 1)
    np.testing.assert_allclose(found.numpy(), frames[:, 4, 0].numpy() * 4 + 10, rtol=1e-6)


def test_maps_lie_on_the_files_own_grid(models: dict[str, Path], file: Path, tmp_path: Path) -> None:
    explain(models["binary"], file, "--out", tmp_path / "a", "--clips", "2", "--window", "6", "--randomise")
    said = json.loads((tmp_path / "a" / "sub-1.json").read_text())
    assert said["explains"] == "sex: log odds of M"
    assert said["clips"] == [0, 8]
    assert set(said["maps"]) == {"ig", "ig_size", "ig_share", "occlusion", "ig_size_random", "ig_share_random"}
    own = nib.load(file)
    trained = load_trained(models["binary"])
    scan = fit(find_scans([file], trained.contract)[0], trained.contract, Fitting())
    again = attribute(score_of(trained, 1), scan, [0, 8], torch.device("cpu"), window=6)
    expected = {"ig": again.gradients, "ig_size": again.size, "ig_share": again.share, "occlusion": again.occlusion}
    for name, path in said["maps"].items():
        image = nib.load(path)
        assert image.shape == own.shape[:3]
        np.testing.assert_allclose(image.affine, own.affine, atol=1e-5)
        if (values := expected.get(name)) is not None:
            wanted = np.asarray(on_own_grid(values, scan).dataobj)
            np.testing.assert_allclose(np.asarray(image.dataobj), wanted, atol=1e-5 * np.abs(wanted).max())
            assert np.abs(wanted).max() > 0
    change = np.subtract(said["output"], said["baseline"])
    assert (np.abs(said["completeness_gap"]) <= 0.02 * np.abs(change)).all()
    np.testing.assert_allclose(again.gradients.sum(), change.mean(), rtol=0.02)
    assert -1 <= said["rank_correlation_with_random_weights"] <= 1
    assert (tmp_path / "a" / "sub-1.png").stat().st_size > 10_000


def test_a_scan_of_a_store_is_explained_on_the_stores_grid(
    models: dict[str, Path], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from swift.data.store.reader import Store

    name = Store(store).scans[1].scan_id
    arguments = ("--clips", "1", "--window", "0", "--json", "--limit", "18")
    explain(models["frame"], f"{store}:{name}", "--out", tmp_path / "a", *arguments)
    said = json.loads(capsys.readouterr().out)
    assert (
        said["explains"]
        == "synthetic_frame: the predicted valence_bold, in its own unit, in the middle frame of each clip"
    )
    assert set(said["maps"]) == {"ig", "ig_size", "ig_share"}
    image = nib.load(said["maps"]["ig"])
    np.testing.assert_allclose(image.affine, Store(store).affine(1), atol=1e-5)
    assert (np.asarray(image.dataobj)[~Store(store).mask(1)] == 0).all()


PLACE: dict[str, Any] = {
    "subject": "a",
    "space": "MNI",
    "placement": MNI,
    "shape": [4, 4, 4],
    "affine": np.eye(4).tolist(),
}


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ({}, {"subject": "b", "space": "MNI152NLin6Asym"}, ""),  # one box for all MNI spaces
        ({}, {"placement": OWN, "space": "T1w"}, "space MNI (MNI152) and space T1w (own mask)"),
        ({"placement": OWN, "space": "T1w"}, {"placement": OWN, "space": "T1w"}, ""),
        (
            {"placement": OWN, "space": "T1w"},
            {"placement": OWN, "space": "T1w", "subject": "b"},
            "each subject's own space (T1w)",
        ),
        (
            {"placement": OWN, "space": ""},
            {"placement": OWN, "space": "T1w"},
            "space not known (own mask) and space T1w (own mask)",
        ),
        ({}, {"shape": [4, 4, 5]}, "other voxel grids"),
        ({}, {"affine": np.diag([1.0, 1.0, 2.0, 1.0]).tolist()}, "other voxel grids"),
    ],
)
def test_whether_two_maps_lie_in_one_place(one: dict[str, Any], other: dict[str, Any], why: str) -> None:
    assert places_differ(PLACE | one, PLACE | other) == why
    assert places_differ(PLACE, {"scan": "of before"}) == "where the maps lie is not recorded"


def test_maps_of_another_place_in_one_folder_are_said(
    models: dict[str, Path], file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two subjects in spaces of their own; two in MNI are alike."""
    given = ("--out", tmp_path / "maps", "--clips", "1", "--window", "0", "--limit", "18", "--cropped")
    names = ("sub-1_space-MNI152NLin6Asym_bold", "sub-2_space-MNI152NLin6Asym_bold", "sub-3_bold")
    notes = []
    for name in names:
        path = scans.save(tmp_path / f"{name}.nii.gz", scans.bold(20))
        scans.save(tmp_path / f"{name}_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
        caplog.clear()
        explain(models["binary"], path, *given)
        said = json.loads(next((tmp_path / "maps").glob(f"{name[:5]}*.json")).read_text())
        notes.append([note for note in said["notes"] if "do not average" in note])
    assert notes[:2] == [[], []]
    assert len(notes[2]) == 1
    assert "holds maps of 2 scans (sub-1_space-MNI152NLin6Asym_bold, sub-2_" in notes[2][0]
    assert "space not known (own mask) and space MNI152NLin6Asym (MNI152)" in notes[2][0]
    assert notes[2][0] in caplog.text


def test_clips_are_spread_over_the_scan() -> None:
    starts = list(range(0, 100, 10))
    assert some(starts, 0) == some(starts, 10) == some(starts, 99) == starts
    assert some(starts, 4) == [0, 20, 50, 70]
    assert some(starts, 1) == [0]


MISTAKES: list[tuple[list[str], str]] = [
    (["{run}", "{scan}"], "was pre-trained and predicts nothing: attribution needs a fine-tuned model"),
    (["{frame}", "{scan}", "--target", "yes"], "--target yes: this model predicts a number"),
    (["{binary}", "{scan}", "--target", "X"], "--target X: this model has the classes F, M"),
    (["{many}", "{scan}"], "--target is missing: this model has the classes control, schizophrenia, bipolar, adhd"),
    (["{binary}", "{folder}"], "holds 2 scans: name one"),
    (["{binary}", "gone.nii"], "gone.nii: no such file"),
    (["{binary}", "{flat}"], "flat.nii: 3D"),
    (["{binary}", "{fast}"], "TR 0.7 s, but the model was trained on 2 s"),
    (["{binary}", "{short}"], "4 frames, but the model takes clips over 8"),
    (["{binary}", "{scan}", "--out", "{taken}"], "holds sub-1.json already"),
    (["{binary}", "{scan}", "--out", "{flat}"], "cannot be made a folder"),
    (["{binary}", "{scan}", "--clips", "-1"], "--clips -1: must be at least 0"),
    (["{binary}", "{scan}", "--window", "-1"], "--window -1: must be at least 0"),
    (["{binary}", "{scan}", "--batch", "0"], "--batch 0: must be at least 1"),
    (["{binary}", "{scan}", "--limit", "0"], "--limit 0: must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES)
def test_a_mistake_is_one_line(
    arguments: list[str],
    line: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places: dict[str, Any] = {**models, "scan": file, "taken": tmp_path / "taken", "folder": tmp_path / "folder"}
    if "{run}" in arguments:
        places["run"] = request.getfixturevalue("finished")
    places["taken"].mkdir()
    (places["taken"] / "sub-1.json").write_text("{}")
    for name, data, tr in (
        ("flat", scans.bold()[..., 0], None),
        ("fast", scans.bold(20), 0.7),
        ("short", scans.bold(4), 2.0),
    ):
        places[name] = scans.save(tmp_path / f"{name}.nii", data, tr=tr)
    for name in ("x", "y"):
        scans.save(places["folder"] / f"{name}.nii", scans.bold(20))
    given = [one.format(**places) for one in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*given, *out, "--quiet"])
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert error[-1].startswith("error: ")
    assert line in error[-1]
