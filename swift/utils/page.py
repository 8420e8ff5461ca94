"""What every page that swift writes has: one look in light and dark, nothing fetched, its size known."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from swift.utils.errors import UserError
from swift.utils.files import replace_text

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2430; --soft: #5b6675; --line: #d9dee5; --card: #f6f8fa;
  --accent: #0072b2; --mark: #a33f00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181e; --ink: #e6eaf0; --soft: #9aa6b5; --line: #313a46;
  --card: #1d232b; --accent: #56b4e9; --mark: #ffa05c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, figcaption { color: var(--soft); margin: .25rem 0 1rem; }
figcaption { font-size: .875rem; margin: .4rem 0 0; }
a { color: var(--accent); }
nav ul { list-style: none; padding: 0; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
figure { margin: 1rem 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .8125rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { background: var(--card); font-weight: 600; }
td.number { text-align: right; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
summary { cursor: pointer; padding: .5rem .75rem; font-weight: 600; }
pre { margin: 0; padding: .75rem; overflow-x: auto; font: .8125rem/1.45 ui-monospace, Menlo, Consolas, monospace;
  border-top: 1px solid var(--line); }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; } h1 { font-size: 1.3rem; } }
@media print { details { display: none; } }
"""


def document(title: str, summary: str, body: str, style: str = "", script: str = "") -> str:
    """A page in one piece. Its policy forbids the browser to fetch anything, and to run any script but this one.

    Args:
        title: Plain text.
        summary: Plain text, one line below the title; who made the page and when is added.
        body: Markup.
        style: CSS beside STYLE.
        script: JavaScript; the page must also work without it.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><header><h1>{escape(title)}</h1>"
        f"<p>{escape(summary)}; made by swift on {made}.</p></header>{body}{code}</body></html>\n"
    )


def check_name(out: Path) -> None:
    """Raises UserError where `--out` is no name of a page."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: must end in .html")


def write(out: Path, text: str) -> str:
    """Put a page in place, whole or not at all.

    Returns:
        A line that says where it is and how large.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return f"wrote {out} ({len(text.encode()) / 2**20:.1f} MiB)"
