"""The plug-ins for Brainmarks, with a stand-in of its registries: found, and equal to what swift gives of NIfTI files.

TemplateFlow's mask is not to be had without a network: an ellipsoid on the same grid takes its place.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import swift
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.labels.splits import make_split, save_splits
from swift.data.labels.subjects import people_of
from swift.data.store.reader import Store
from swift.data.synthetic import write_store
from swift.inference.brainmarks_model import AFFINE, GRID, SampleReader, reader_of, sample_order, template_mask
from swift.inference.brainmarks_rows import Space, scan_in_space
from swift.inference.contract import Contract
from swift.inference.embedding import Embedding
from swift.inference.fit_scan import Fitting, find_scans
from swift.inference.model import Trained
from swift.models.heads import build_model
from swift.utils.errors import BadScan, UserError
from tests.cohort import SPEC
from tests.data import scans
from tests.small import settings, small_store

ROOT = Path(swift.__file__).resolve().parents[1]
REGISTRY = """
from typing import NamedTuple
found = {}
class Embeddings(NamedTuple):
    cls_embeds: object
    reg_embeds: object
    patch_embeds: object
def register(func):
    found[func.__name__] = func
    return func
register_model = register_dataset = register
"""
FRAMES = 20


@pytest.fixture
def brainmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Names of models and data sets that are found as Brainmarks looks for them: a namespace in two places."""
    for kind in ("models", "datasets"):
        folder = tmp_path / "site/brainmarks" / kind
        folder.mkdir(parents=True)
        for name in ("base", "registry"):
            (folder / f"{name}.py").write_text(REGISTRY)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(ROOT), *sys.path])
    found: dict[str, Any] = {}
    for kind in ("models", "datasets"):
        package = importlib.import_module(f"brainmarks.{kind}")
        for _, name, _ in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"brainmarks.{kind}.{name}")
        found |= sys.modules[f"brainmarks.{kind}.registry"].found
    yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "brainmarks"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mask, and a scan of the template's grid that is stored as HCP does (LAS), 0 outside the mask."""
    folder = tmp_path_factory.mktemp("mni")
    mask = scans.ellipsoid(GRID, 0.6)
    mask[:30, :, 50:] = False  # not the same from any side
    scans.save(folder / "mask.nii.gz", mask, AFFINE, dtype=np.uint8)
    rng = np.random.default_rng(0)
    bold = np.zeros((*GRID, FRAMES), np.float32)
    bold[mask] = rng.normal(1000, 10, (int(mask.sum()), FRAMES)) + 50 * np.sin(np.arange(FRAMES) / 3)
    bold[45, 54, 40:44] = 0  # still
    scans.save(folder / "sub-1_space-MNI152NLin6Asym_bold.nii", bold, AFFINE, "LAS")
    return folder


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Random weights that take 4 mm, so that values are interpolated."""
    torch.manual_seed(0)
    cfg = settings("data.grid=[40,48,40]")
    model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    contract = Contract((40, 48, 40), 4.0, cfg.data.frames, 1, "zscore_voxel", 0.0, (2.0, 2.0), placement="MNI152")
    return Trained("random", model.eval(), cfg, contract, 0)


def sample_of(file: Path, mask: Path) -> dict[str, Any]:
    """What Brainmarks makes of a scan (its nisc.read_mni152_2mm_data and nisc.scale), with nibabel alone."""
    image = nib.as_closest_canonical(nib.load(file))
    inside = np.asarray(nib.as_closest_canonical(nib.load(mask)).dataobj).T > 0
    series = np.ascontiguousarray(image.get_fdata().T)[:, inside]
    mean, std = series.mean(0, keepdims=True), series.std(0, keepdims=True)
    valid = std > 1e-6
    scaled = (series - mean) / std.clip(min=1e-6) * valid
    arrays = {"bold": scaled, "mean": mean * valid, "std": std * valid}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in arrays.items()} | {"tr": 2.0}


def test_order_of_a_sample() -> None:
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 1] = mask[1, 0, 0] = mask[0, 1, 0] = True
    # x fastest: (1,0,0), (0,1,0), (0,0,1); in C order (0,0,1), (0,1,0), (1,0,0)
    assert sample_order(mask).tolist() == [2, 1, 0]


def test_cls_is_what_embed_gives_of_the_file(
    files: Path, trained: Trained, brainmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mask = files / "sub-1_space-MNI152NLin6Asym_bold.nii", files / "mask.nii.gz"
    embedding = Embedding(trained, fitting=Fitting(mask=mask), device="cpu")
    wanted = embedding(find_scans([file], trained.contract)[0]).values["stage2"][0]
    monkeypatch.setattr(
        "swift.inference.brainmarks_model.load_model", lambda *_: type("Found", (), {"trained": trained})
    )
    reader, model = brainmarks["swift_v2"](model="ORGANISATION/NAME", mask=str(mask), clips=2)
    assert model.__space__ == "mni"
    assert not hasattr(reader, "fit")  # Brainmarks would take it for its own hook
    sample = sample_of(file, mask)
    still = {name: value.clone() if name != "tr" else value for name, value in sample.items()}
    still["std"][:, :9000] = still["mean"][:, :9000] = still["bold"][:, :9000] = 0  # fewer voxels, in the same batch
    with torch.no_grad():
        found = model(default_collate([reader(sample | {"target": 1}), reader(still | {"target": 0})]))
    assert found.cls_embeds.shape == (2, 1, len(wanted))
    torch.testing.assert_close(found.cls_embeds[0, 0], torch.from_numpy(wanted), rtol=1e-3, atol=1e-3)
    assert (found.cls_embeds[1, 0] - torch.from_numpy(wanted)).abs().max() > 0.01
    assert found.reg_embeds is None
    # All brain of the template is there in the first sample: its tokens are those that cls is the mean of.
    torch.testing.assert_close(found.patch_embeds[0].mean(0), found.cls_embeds[0, 0], rtol=1e-3, atol=1e-4)
    clips, steps = 3, 4  # 20 frames: clips of 8 begin at 0, 8 and 12; two frames a token
    assert found.patch_embeds.shape[1] == clips * steps * int(model.tokens.sum())


def test_samples_that_do_not_fit(files: Path, trained: Trained) -> None:
    mask = template_mask(files / "mask.nii.gz")
    sample = sample_of(files / "sub-1_space-MNI152NLin6Asym_bold.nii", files / "mask.nii.gz")
    reader = SampleReader(trained, mask, Fitting())
    with pytest.raises(UserError, match=f"a sample has 7 voxels, the mask {mask.sum()}"):
        reader({**sample, **{name: sample[name][:, :7] for name in ("bold", "mean", "std")}})
    with pytest.raises(BadScan, match="TR 1 s, but the model was trained on 2 s"):
        reader({**sample, "tr": 1.0})
    short = {**sample, "bold": sample["bold"][:6]}
    with pytest.raises(BadScan, match=r"6 frames is shorter than a clip \(pad=true"):
        reader(short)
    padded = SampleReader(trained, mask, Fitting(), pad=True)(short)
    index, values = padded["index"], padded["codes"][0] * padded["a"] + padded["b"]
    assert values.shape == (8, len(index))
    np.testing.assert_allclose(values[6:], 0, atol=2e-3)  # the mean frame


def test_a_grid_that_leaves_out_much(files: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = replace(trained, contract=replace(trained.contract, grid=(12, 12, 12)))
    found = type("Found", (), {"trained": narrow})
    monkeypatch.setattr("swift.inference.brainmarks_model.load_model", lambda *_: found)
    mask = str(files / "mask.nii.gz")
    with pytest.raises(UserError, match=r"8\d.* % of the template's brain lies outside the model's grid"):
        reader_of("a/b", mask=mask)
    assert reader_of("a/b", mask=mask, cropped=True)[0].plan.outside > 0.8


def test_names_that_are_missing(files: Path, brainmarks: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="swift_v2 needs a model"):
        brainmarks["swift_v2"]()
    with pytest.raises(UserError, match="swift_store needs a store and a task"):
        brainmarks["swift_store"]("mni", mask=str(files / "mask.nii.gz"))
    with pytest.raises(
        UserError, match="space flat is not made of volumes: a store serves mni, mni_cortex, schaefer400"
    ):
        brainmarks["swift_store"]("flat")
    with pytest.raises(UserError, match="not on the 2 mm grid of MNI152NLin6Asym"):
        template_mask(scans.save(tmp_path / "mask.nii.gz", scans.ellipsoid(), dtype=np.uint8))
    blocked = ModuleType("templateflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "templateflow", blocked)
        with pytest.raises(UserError, match=r"brain mask cannot be had .*: give mask=FILE"):
            template_mask()


def test_a_stored_scan_lies_where_it_lay(tmp_path: Path) -> None:
    store = Store(small_store(tmp_path / "store"))  # 12^3 voxels of 4 mm: every second voxel of 2 mm is one of them
    box = Space(np.ones(GRID[::-1], bool))
    sample = scan_in_space(store, 0, 3, box)
    found = (sample["bold"] * sample["std"] + sample["mean"]).numpy().reshape(3, *GRID[::-1])
    mask, values = store.mask(0), store.values(0, 0, 3)
    places = np.argwhere(mask) @ store.affine(0)[:3, :3].T + store.affine(0)[:3, 3]  # mm
    x, y, z = np.rint((places - AFFINE[:3, 3]) / 2).astype(int).T
    np.testing.assert_allclose(found[:, z, y, x], values, rtol=1e-5, atol=1e-3)
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(len(places))
    pairs = [(v, number[i + 1, j, k]) for v, (i, j, k) in enumerate(np.argwhere(mask)) if i < 11 and mask[i + 1, j, k]]
    one, other = np.array(pairs).T
    between = found[:, z[one], y[one], x[one] + 1]
    np.testing.assert_allclose(between, (values[:, one] + values[:, other]) / 2, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sample["bold"].numpy().mean(0), 0, atol=1e-5)
    assert sample["tr"] == 2.0
    assert (sample["std"] == 0).sum() == (sample["bold"] == 0).all(0).sum() > 0.9 * np.prod(GRID)


@pytest.mark.slow
def test_one_row_a_person(
    tmp_path: Path, brainmarks: dict[str, Any], files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(replace(SPEC, n_subjects=12, frames=8, runs=2), tmp_path / "store")
    people = people_of(Store(tmp_path / "store").scans, label="label_binary")
    made = make_split(people, 0.25, 0.25, 0)
    save_splits(tmp_path / "split.json", [made])
    kwargs = {"store": str(tmp_path / "store"), "task": "synthetic_binary", "mask": str(files / "mask.nii.gz")}
    parts = brainmarks["swift_store"]("mni", split=str(tmp_path / "split.json"), **kwargs)
    assert "left out, 12 further scans of a subject" in caplog.text
    store = Store(tmp_path / "store")
    for part, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = parts[name]
        assert [store.scans[place].subject for place in rows.places] == list(made.parts[part])
        told = [store.scans[place].phenotypes["label_binary"] for place in rows.places]
        assert rows.targets.tolist() == told
        assert rows.num_classes == 2
        assert rows.label_counts.tolist() == [told.count("0"), told.count("1")]
    sample = parts["test"].compose(lambda sample: sample | {"seen": True})[0]
    assert sample["bold"].shape == (8, int(template_mask(files / "mask.nii.gz").sum()))
    assert sample["seen"]
    manifest = tmp_path / "store/manifest.csv"
    lines = [line.split(",") for line in manifest.read_text().splitlines()]
    age = lines[0].index("age")
    for line in lines[1:5]:
        line[age] = lines[5][age]  # the first three people are one family
    manifest.write_text("".join(",".join(line) + "\n" for line in lines))
    families = brainmarks["swift_store"]("mni", family="age", **kwargs)
    ages = [rows.store.scans[place].phenotypes["age"] for rows in families.values() for place in rows.places]
    assert len(ages) == 10
    assert sorted(ages) == sorted({line[age] for line in lines[1:]})
    for wrong, said in (
        ({"task": "age"}, "Brainmarks judges classes of subjects only"),
        ({"frames": 9}, "frames=9: the scans have 8 to 8"),
    ):
        with pytest.raises(UserError, match=said):
            brainmarks["swift_store"]("mni", **(kwargs | wrong))


def test_a_store_without_template_space(files: Path, brainmarks: dict[str, Any], tmp_path: Path) -> None:
    scans.save(tmp_path / "in/sub-1_bold.nii.gz", scans.bold())
    ingest(find_sources([tmp_path / "in"]), tmp_path / "store", Recipe((12, 12, 12), 4.0))
    mask = str(files / "mask.nii.gz")
    with pytest.raises(UserError, match="its scans are not in a template space"):
        brainmarks["swift_store"]("mni", mask=mask, store=str(tmp_path / "store"), task="sex")
