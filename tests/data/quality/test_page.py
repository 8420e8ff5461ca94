"""The page of brains: everything of the store in it, self-contained, sortable; and what the command says."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swift.data.quality.pictures import TILE, binned, edge_of, slices_of, tile
from swift.data.store.reader import Store
from swift.data.synthetic import CohortSpec, write_store
from tests.browser import CHROMIUM, Browser
from tests.data import stores
from tests.data.test_cli import run
from tests.report.test_html import Checked


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scans, four of site A with TR 2 s and two of site B with 1 s; movement is known."""
    folder = tmp_path_factory.mktemp("page") / "s<b>"
    write_store(
        CohortSpec(n_subjects=6, frames=12, grid=(12, 12, 12), spacing=16.0, sites=3, site_tr=(2, 2, 1)), folder
    )
    return folder


@pytest.fixture(scope="module")
def made(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from swift.data.__main__ import main

    out = tmp_path_factory.mktemp("out") / "qc.html"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(cohort), "--out", str(out), "--workers", "1", "--quiet"])
    assert ended.value.code == 0
    return out


def test_the_page_holds_every_scan_and_fetches_nothing(cohort: Path, made: Path) -> None:
    text, store = made.read_text(), Store(cohort)
    found = Checked(text)
    words = " ".join(found.words)
    assert "Scans of s<b>" in words
    for place, scan in enumerate(store.scans):
        tsnr = np.median(store.array(place, "stats/mean") / store.array(place, "stats/std"))
        line = re.search(rf"<tr data-card='scan-{place}'.*?</tr>", text)
        assert line
        values = re.findall("data-value='(.*?)'", line[0])
        assert values[0] == scan.scan_id
        assert float(values[2]) == pytest.approx(tsnr, rel=1e-4)
        kept = store.confounds(place)["framewise_displacement"]
        assert float(values[3]) == pytest.approx(np.nanmean(kept), rel=1e-4)
        assert (float(values[4]), float(values[6]), int(values[7])) == (100, scan.tr, 12)
        assert ("TR 1 s, most have 2 s" in line[0]) == (scan.tr == 1)
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not re.search(r"https?://|@import|url\(", text)
    pictures = re.findall(r"data:image/webp;base64,([^\"]+)", text)
    assert len(pictures) == 6 * 4
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (3 * TILE, 2 * TILE)


def test_slices_lie_where_the_page_says(cohort: Path, made: Path) -> None:
    store = Store(cohort)
    mask, affine = store.mask(0), store.affine(0)
    card = made.read_text().partition('id="scan-0"')[2]
    said = [(letter, float(mm)) for letter, mm in re.findall(r"class=mm>(\w) (-?[\d.]+)<", card)[:9]]
    want = []
    for axis, letter in enumerate("xyz"):
        indices = np.sort(np.nonzero(mask)[axis])
        want += [
            (letter, affine[axis, axis] * indices[int(np.ceil(q * len(indices))) - 1] + affine[axis, 3])
            for q in (0.25, 0.5, 0.75)
        ]
    assert said == want


def test_a_tile_has_left_on_the_left_and_up_above() -> None:
    mask = np.zeros((8, 16), bool)
    mask[1:7, 2:14] = True
    values = np.zeros((8, 16), np.float32)
    values[1:4, 8:14] = 1.0  # left, above
    pixels = tile(values, mask, 0.0, 1.0, "mean")
    assert pixels.shape == (TILE, TILE // 2, 3)
    assert pixels[TILE // 4, TILE // 8].tolist() == [255] * 3
    assert pixels[TILE // 4, TILE // 2 - TILE // 8 - 4].tolist() == [0] * 3
    assert pixels[3 * TILE // 4, TILE // 8].tolist() == [0] * 3
    assert pixels[0, 0].tolist() == [0] * 3
    assert slices_of(np.pad(np.ones((4, 1, 1), bool), ((3, 0), (0, 0), (0, 0))), 0) == [3, 4, 5]


def test_edges_and_bins_by_hand() -> None:
    mask = np.array([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], bool)
    assert edge_of(mask).tolist() == [[False, True, True, True], [False, True, False, True], [False, True, True, True]]
    values = np.array([1.0, 5, 2, 2, 0, 9])
    assert binned(values, 3, True).tolist() == [5, 2, 9]
    assert binned(values[:, None], 3, False).tolist() == [[3], [2], [4.5]]
    assert binned(values, 6, True) is values


def test_what_the_command_says(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.html"
    code, said, _ = run(capsys, "report", cohort, "--out", out, "--workers", 1, "--pictures", 2, "--json")
    rows = json.loads(said)["scans"]
    assert (code, len(rows)) == (0, 6)
    assert out.read_text().count("<section class=scan") == 2
    drawn = re.findall("<section class=scan.*?<h3>(.*?)</h3>", out.read_text())
    assert sorted(drawn) == sorted(row["scan_id"] for row in rows if row["marks"])
    for words, message in (
        (["--out", tmp_path / "p.pdf"], "must end in .html"),
        (["--out", "/proc/p.html", "--workers", 1], "cannot be written"),
        (["--out", out, "--workers", 1, "--limit-mb", 0.05], "the limit is 0.05 MB: --pictures "),
        (["--out", out, "--scan", "zz"], "no scan 'zz'"),
        (["--out", out, "--pictures", -1], "legal is 0 or more"),
    ):
        code, said, err = run(capsys, "report", cohort, *words, "--quiet")
        assert (code, said, err.count("\n")) == (2, "", 1), words
        assert message in err
    code, said, _ = run(capsys, "info", cohort, "--qc", tmp_path / "qc", "--scan", rows[0]["scan_id"])
    assert said.splitlines()[-1] == f"all scans on one page: swift-fmri data report {cohort} --out qc.html"


def test_a_damaged_scan_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores.build(tmp_path / "s", [1, 2, 3], shard_bytes=1)
    store = Store(tmp_path / "s")
    file = tmp_path / "s" / "shards" / store.scans[1].shard
    raw = bytearray(file.read_bytes())
    place = store._layout(1).bold + 2 * store.scans[1].voxels * 7
    raw[place] ^= 1
    file.write_bytes(raw)
    code, said, err = run(capsys, "report", tmp_path / "s", "--out", tmp_path / "p.html", "--workers", 1, "--quiet")
    assert code == 1
    assert said.endswith("3 scans, 1 marked, 1 not readable\n")
    assert f"scan {store.scans[1].scan_id}, frame 7" in err
    assert err.count("\n") == 1
    assert (tmp_path / "p.html").read_text().count("<section class=scan") == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(made: Path) -> None:
    """It sorts and filters, fits a phone, is dark where wanted, fetches nothing; without script it is all there."""
    names = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.cells[COLUMN].dataset.value)"
    with Browser() as browser:
        for dark in (False, True):
            for width in (1280, 360):
                browser.open(made, width, dark)
                assert browser.complaints() == []
                assert browser.fetched() == [made.resolve().as_uri()]
                assert browser.value("document.documentElement.scrollWidth") <= width
                colour = browser.value("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == dark
        click = "document.querySelectorAll('thead button')[2].click()"
        browser.value(click)
        tsnr = list(map(float, browser.value(names.replace("COLUMN", "2"))))
        assert tsnr == sorted(tsnr)
        assert len(tsnr) == 6
        assert browser.value("document.querySelectorAll('thead th')[2].getAttribute('aria-sort')") == "ascending"
        browser.value(click)
        assert list(map(float, browser.value(names.replace("COLUMN", "2")))) == tsnr[::-1]
        first = browser.value("document.querySelector('tbody tr').dataset.card")
        assert browser.value("document.querySelector('#scans section').id") == first
        browser.value("only.click()")
        assert set(browser.value(names.replace("COLUMN", "6"))) == {"1"}
        shown = "[...document.querySelectorAll('#scans section')].filter(s => !s.hidden).length"
        assert browser.value(shown) == 2
        browser.value("only.click()")
        typed = (
            "const box = document.getElementById('find'); box.value = 'SUB-0003'; box.dispatchEvent(new Event('input'))"
        )
        browser.value(typed)
        (name,) = browser.value(names.replace("COLUMN", "0"))
        assert "0003" in name
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(made, 1280, False)
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.value("document.querySelectorAll('thead button').length") == 0
        assert browser.value("document.querySelectorAll('tbody tr').length") == 6
        assert browser.value("getComputedStyle(document.querySelector('.tools')).display") == "none"
