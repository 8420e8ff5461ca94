"""The documentation site: links of all texts lead somewhere, and its figures show what the model does."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import swift

ROOT = Path(swift.__file__).resolve().parents[1]
TEXTS = sorted(path for folder in ("docs", "experiments/*", "launch", ".") for path in ROOT.glob(f"{folder}/*.md"))


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "docs"))
    import pages

    yield pages
    sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("text", TEXTS, ids=[path.relative_to(ROOT).as_posix() for path in TEXTS])
def test_links_lead_to_files_and_headings(text: Path, pages: ModuleType) -> None:
    made = ("docs/made/", "docs/examples/")
    for _, _, target in pages.LINK.findall(text.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (text.parent / path).resolve() if path else text
        if place.is_relative_to(ROOT) and place.relative_to(ROOT).as_posix().startswith(made):
            page = place.relative_to(ROOT / "docs").with_suffix("").as_posix()
            drawn = place.suffix == ".png" and place.name in (ROOT / "docs/draw.py").read_text()
            assert drawn or page in {"examples/index", *pages.elsewhere().values()}, target
            continue
        assert place.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, target


def test_links_of_a_readme_become_links_of_its_page(pages: ModuleType) -> None:
    text = "[a](../../docs/tasks.md#x) [b](run.py) [run.py](run.py) ![c](maps.png) [d](../speed/) [e](https://f.org/#g)"
    done = pages.rewritten(text, ROOT / "experiments/attribution/README.md", "made/experiments/attribution")
    assert done == (
        "[a](../../tasks.md#x) b (`experiments/attribution/run.py`) `experiments/attribution/run.py` "
        "![c](../../../experiments/attribution/maps.png) [d](speed.md) [e](https://f.org/#g)"
    )
    done = pages.rewritten("[a](../launch/README.md) [b](gallery/)", ROOT / "docs/index.md", "index")
    assert done == "[a](made/cluster.md) [b](examples/index.rst)"
    with pytest.raises(ValueError, match=r"docs/use\.md: link to nowhere\.md, which is not there"):
        pages.rewritten("[a](nowhere.md)", ROOT / "docs/use.md", "use")


def test_every_page_is_in_the_contents(pages: ModuleType) -> None:
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    written = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    kept_elsewhere = {page for page in pages.elsewhere().values() if page.count("/") == 1 or page.endswith("/index")}
    assert sorted(written | kept_elsewhere | {"examples/index"}) == sorted(listed)


def test_the_gallery_has_its_examples_and_each_shows_a_figure() -> None:
    examples = sorted((ROOT / "docs/gallery").glob("plot_*.py"))
    assert [path.name[5] for path in examples] == list("123456")
    for path in examples:
        last = path.read_text().rsplit("# %%", 1)[1]
        assert "plt.show()" in last or "show(" in last, path.name
