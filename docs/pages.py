"""Pages of the site that are kept elsewhere: README files of the repository become pages, and links lead to them.

Each text has one home, where a reader of the repository finds it. The site shows it with its links rewritten: to a page
of the site where there is one, else as plain text, as the repository has no fixed address.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MADE = "made"
"""Folder of docs/ with what is made here; git ignores it."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
IMAGE = re.compile(r'(<img src=")([^"]+)(")')


def elsewhere() -> dict[Path, str]:
    """File of the repository -> page of the site."""
    pages = {ROOT / "launch/README.md": "cluster", ROOT / "CONTRIBUTING.md": "contributing"}
    pages |= {ROOT / "CHANGELOG.md": "changelog", ROOT / "experiments/README.md": "experiments/index"}
    pages |= {file: f"experiments/{file.parent.name}" for file in sorted(ROOT.glob("experiments/*/README.md"))}
    return {file: f"{MADE}/{page}" for file, page in pages.items() if file.is_file()}


def page_of(target: Path) -> str | None:
    """The page that shows a file or folder of the repository, with its ending; None: no page does."""
    if target == DOCS / "gallery":
        return "examples/index.rst"
    pages = elsewhere()
    for file in (target, target / "README.md"):
        if file in pages:
            return f"{pages[file]}.md"
    if target.suffix in (".md", ".rst") and target.parent == DOCS and target.is_file():
        return target.name
    return None


def rewritten(text: str, source: Path, page: str) -> str:
    """A text of the repository with links that work on the site.

    Args:
        text: Markdown.
        source: Its file, from where its links count.
        page: Its page, from where the new links count.

    Raises:
        ValueError: a link to a file that is not there.
    """
    here = (DOCS / page).parent

    def link(found: re.Match[str]) -> str:
        bang, words, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or target.startswith(("#", "mailto:")):
            return found[0]
        place = (source.parent / path).resolve()
        if not place.exists():
            raise ValueError(f"{source.relative_to(ROOT)}: link to {target}, which is not there")
        if bang:
            return f"![{words}]({os.path.relpath(place, here)})"
        other = page_of(place)
        if other is None:
            named = place.relative_to(ROOT).as_posix()
            plain = words.strip("`")
            return f"`{named}`" if plain.rstrip("/") in (named, path.rstrip("/")) else f"{words} (`{named}`)"
        return f"[{words}]({os.path.relpath(DOCS / other, here)}{hash_}{anchor})"

    def image(found: re.Match[str]) -> str:
        place = (source.parent / found[2]).resolve()
        return found[1] + os.path.relpath(place, here) + found[3]

    return IMAGE.sub(image, LINK.sub(link, text))


def write() -> None:
    """Write the pages that are kept elsewhere, anew where they changed."""
    wanted = set()
    for file, page in elsewhere().items():
        out = DOCS / f"{page}.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        text = rewritten(file.read_text(encoding="utf-8"), file, page)
        if page == f"{MADE}/experiments/index":
            text += toctree()
        if not out.is_file() or out.read_text(encoding="utf-8") != text:
            out.write_text(text, encoding="utf-8")
        wanted.add(out)
    for old in (DOCS / MADE).rglob("*.md"):
        if old not in wanted:
            old.unlink()


def toctree() -> str:
    """The experiments as the index lists them."""
    names = sorted(file.parent.name for file in ROOT.glob("experiments/*/README.md"))
    return "\n".join(["", "```{toctree}", ":hidden:", "", *names, "```", ""])


def clean() -> None:
    """Remove what was made."""
    shutil.rmtree(DOCS / MADE, ignore_errors=True)
