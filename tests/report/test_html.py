"""The page: well-formed, self-contained, everything of the runs in it, nothing of theirs taken as markup."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swift.report import __main__ as report
from swift.report.figures.html import page
from swift.report.figures.loss import loss_curve
from tests import browser as browsers
from tests.browser import CHROMIUM, Browser
from tests.report.studies import write_point

VOID = {"meta", "link", "img", "br", "input"}


class Checked(HTMLParser):
    """Remembers tags and text, and refuses what is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def places(tmp_path):
    first = write_point(tmp_path / "runs" / "first", 1234567, 40, 0.5, restarts=(20,))
    loss_curve([first], first / "figures" / "loss.png")
    write_point(tmp_path / "runs" / "<b>second", 999, 20, 0.6, max_steps=40)
    folder = tmp_path / "ablation"
    folder.mkdir()
    loss_curve([first], folder / "ablation.png")
    (folder / "ablation.csv").write_text(
        "rank,name\n" + "".join(f"{i},<script>alert({i})</script>\n" for i in range(80))
    )
    (folder / "ablation.json").write_text('{"a": "<i>"}')
    return tmp_path


def made(places, *more):
    out = places / "page.html"
    assert report.main(["html", *map(str, [places / "runs", places / "ablation", *more]), "--out", str(out)]) == 0
    return out.read_text()


def test_the_page_is_well_formed_and_fetches_nothing(places):
    text = made(places)
    found = Checked(text)
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object", "b", "i")]
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        if tag == "img":
            assert attributes["alt"]
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in found.tags if tag == "a"}
    assert links == ids


def test_everything_is_in_it(places):
    text = made(places)
    words = " ".join(Checked(text).words)
    for wanted in ("first", "<b>second", "1,234,567", "Not finished", "linear interpolation", "mask_ratio: 0.5"):
        assert wanted in words, wanted
    assert '"restarts"' in words
    assert "20 further rows are left out." in words
    assert "<script>alert(59)</script>" in words
    assert "is not finished (20 of 40 steps): dashed" in words
    images = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(images) == 3
    own = (places / "runs" / "first" / "figures" / "loss.png").read_bytes()
    assert own in [base64.b64decode(image) for image in images]


def test_a_single_run_is_enough(places, tmp_path):
    assert report.main(["html", str(places / "runs" / "first"), "--out", str(tmp_path / "a" / "p.html")]) == 0
    Checked((tmp_path / "a" / "p.html").read_text())


def test_mistakes_are_one_line(places, capsys):
    (places / "empty").mkdir()
    (places / "bad").mkdir()
    (places / "bad" / "x.png").write_text(json.dumps({}))
    run = str(places / "runs" / "first")
    for given, message in (
        ([str(places / "empty"), "--out", str(places / "p.html")], "neither a run directory nor a folder with figures"),
        ([str(places / "bad"), "--out", str(places / "p.html")], "is no PNG"),
        ([run, "--out", str(places / "p.pdf")], "must end in .html"),
        ([run, "--out", "/proc/p.html"], "cannot be written"),
    ):
        assert report.main(["html", *given]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(places):
    """No complaint, nothing fetched but the page, both schemes, nothing wider than a narrow screen."""
    made(places)
    page = places / "page.html"
    with Browser() as browser:
        for dark in (False, True):
            for width in (1280, 360):
                browser.open(page, width, dark)
                assert browser.complaints() == []
                assert browser.fetched() == [page.resolve().as_uri()]
                assert browser.value("document.documentElement.scrollWidth") <= width
                assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
                colour = browser.value("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == dark


FAKE = """#!/bin/bash
# Answers commands by count, keeps to itself that it was asked to close, and a child of it fills the profile.
for given in "$@"; do case $given in --user-data-dir=*) profile=${given#*=};; esac; done
echo $$ >FOLDER/group
echo "$profile" >FOLDER/profile
(i=0; while :; do mkdir -p "$profile/Default"; : >"$profile/Default/$((i++))"; done) &
number=0
while IFS= read -r -d "" command <&3; do
  number=$((number + 1))
  [ ANSWERS = no ] && continue
  result='{"targetInfos": [{"type": "page", "targetId": "t"}], "sessionId": "s"}'
  case $command in *Browser.close*) ;; *) printf '{"id": %d, "result": %s}\\0' $number "$result" >&4;; esac
done
sleep 600
"""


def fake(folder, answers):
    program = folder / "chromium"
    program.write_text(FAKE.replace("FOLDER", str(folder)).replace("ANSWERS", answers))
    program.chmod(0o755)
    return str(program)


def left_over(folder):
    """Processes of the fake browser, and its profile."""
    profile = Path((folder / "profile").read_text().strip())
    assert profile.name.startswith("browser-")
    return browsers.members(int((folder / "group").read_text())), profile.exists()


def test_a_browser_that_stays_is_ended_before_its_profile_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(browsers, "LEAVE", 0.3)
    with Browser(fake(tmp_path, "yes")) as browser:
        browser.call("Page.enable")
        running, profile = left_over(tmp_path)
        assert len(running) >= 2
        assert profile
    assert left_over(tmp_path) == ([], False)


def test_a_browser_that_says_nothing_is_given_up(tmp_path):
    with pytest.raises(TimeoutError, match="did not answer within 5 s"):
        Browser(fake(tmp_path, "no"), answer=5)
    assert left_over(tmp_path) == ([], False)


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_check_of_a_study_stands_before_its_figures(passed: bool, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "summary.json").write_text(json.dumps({"passed": passed, "checks": {"moves < 1": passed}}))
    text = page([tmp_path], "studies")
    assert ("CHECK FAILED" in text) is not passed
    assert ("FAILED: moves &lt; 1" in text) is not passed
    if not passed:
        assert text.index("CHECK FAILED") < text.index("table.csv")
