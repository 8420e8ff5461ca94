"""Sphinx settings of the documentation site: `make docs` builds it in site/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS / "gallery")]

import draw
import pages
import shell

import swift

project = "swift"
author = "The swift developers"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
]
exclude_patterns = ["gallery"]
nitpicky = False

# Markdown
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# API: our Google docstrings, types from the signatures
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

# Look
html_theme = "furo"
html_title = "swift"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


def pictures(block: Any, variables: dict[str, Any], settings: dict[str, Any]) -> str:
    """sphinx-gallery: the figures that swift's own commands wrote and an example shows."""
    from sphinx_gallery.scrapers import figure_rst

    names = []
    while shell.shown:
        name = Path(next(variables["image_path_iterator"]))
        name.write_bytes(shell.shown.pop(0).read_bytes())
        names.append(str(name))
    return figure_rst(names, settings["src_dir"])


def order(file: str) -> str:
    """Examples follow each other by their number."""
    return file


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": r"plot_\d",
    "ignore_pattern": r"shell\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib", "conf.pictures"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "copyfile_regex": "",
    "plot_gallery": "True",
    "nested_sections": False,
    "reset_modules": ("matplotlib",),
    "remove_config_comments": True,
}


def read(app: Any, page: str, source: list[str]) -> None:
    """Links of a page of docs/ that lead into the repository."""
    file = DOCS / f"{page}.md"
    if file.is_file() and not page.startswith((pages.MADE, "examples")):
        source[0] = pages.rewritten(source[0], file, page)


def plain(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Meanings of settings are plain text: characters that are markup elsewhere stand for themselves."""
    if name.startswith("swift.config."):
        lines[:] = [re.sub(r"([*|_`\\])", r"\\\1", line) for line in lines]


def setup(app: Any) -> None:
    """Make what is made before Sphinx looks for pages."""
    pages.write()
    draw.draw_all(DOCS / pages.MADE)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain)


assert swift  # the checkout itself, which PYTHONPATH or the editable installation gives
