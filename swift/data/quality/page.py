"""The page of brains: one self-contained file that shows every scan of a store, with what stands out marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from swift.data.quality.measures import Measures
from swift.utils.page import document

STYLE = """
body { max-width: 76rem; }
.tools { display: none; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: 1rem 0 0; }
.scripted .tools { display: flex; }
.tools input[type=search] { font: inherit; padding: .3rem .6rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--paper); color: var(--ink); width: 16rem; max-width: 100%; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort] button { color: var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.wide { max-height: 32rem; overflow: auto; } thead th { position: sticky; top: 0; }
th[data-kind=number] { text-align: right; }
.marks { color: var(--mark); } td.marks { white-space: normal; min-width: 14rem; }
.scan { content-visibility: auto; contain-intrinsic-size: auto 34rem; border-top: 1px solid var(--line);
  padding: 1rem 0 .5rem; }
.scan h3 { margin: 0; } .scan p { margin: .15rem 0; }
.planes { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; background: #000; padding: .5rem;
  border-radius: 6px; }
.planes svg { width: 100%; height: auto; display: block; }
.planes text { fill: #ffd28a; font: 600 13px system-ui, sans-serif; } .planes .mm { fill: #e6eaf0; font-weight: 400; }
.trace { display: block; width: 100%; height: 3rem; overflow: visible; }
.trace polyline { fill: none; stroke: var(--accent); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.trace.movement polyline { stroke: var(--mark); }
.trace .limit { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3;
  vector-effect: non-scaling-stroke; }
img.carpet { width: 100%; height: 9rem; padding: 0; border: 0; border-radius: 0; image-rendering: pixelated;
  margin-top: .25rem; }
[hidden] { display: none; }
@media (max-width: 40rem) { .planes { grid-template-columns: 1fr; } .wide { max-height: 24rem; } }
"""

SCRIPT = """
(function () {
  "use strict";
  var table = document.querySelector("table"), body = table.tBodies[0], cards = document.getElementById("scans");
  var rows = Array.from(body.rows), find = document.getElementById("find"), only = document.getElementById("only");
  var shown = document.getElementById("shown");
  document.documentElement.classList.add("scripted");
  function value(row, column) { return row.cells[column].dataset.value; }
  function filter() {
    var words = find.value.toLowerCase().split(/\\s+/), count = 0;
    rows.forEach(function (row) {
      var text = row.textContent.toLowerCase();
      var fits = words.every(function (word) { return text.includes(word); });
      row.hidden = !fits || (only.checked && !row.dataset.marked);
      count += !row.hidden;
      var card = document.getElementById(row.dataset.card);
      if (card) card.hidden = row.hidden;
    });
    shown.textContent = count + " of " + rows.length + " scans";
  }
  function sort(head, column) {
    var up = head.getAttribute("aria-sort") !== "ascending", number = head.dataset.kind !== "text";
    Array.from(head.parentNode.cells).forEach(function (cell) { cell.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort(function (a, b) {
      var x = value(a, column), y = value(b, column);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (number ? x - y : x.localeCompare(y));
    });
    rows.forEach(function (row) {
      body.append(row);
      var card = document.getElementById(row.dataset.card);
      if (card) cards.append(card);
    });
  }
  Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
    var button = document.createElement("button");
    button.textContent = head.textContent;
    head.textContent = "";
    head.append(button);
    button.addEventListener("click", function () { sort(head, column); });
  });
  find.addEventListener("input", filter);
  only.addEventListener("change", filter);
  filter();
})();
"""

COLUMNS = (
    ("scan", "text"),
    ("subject", "text"),
    ("tSNR", "number"),
    ("movement, mm", "number"),
    ("in the grid, %", "number"),
    ("outliers, %", "number"),
    ("TR, s", "number"),
    ("frames", "number"),
    ("marked", "marks"),
)


def line(row: Measures, card: str) -> str:
    """A scan's line of the table."""
    link = f'<a href="#{card}">{escape(row.scan_id)}</a>' if card else escape(row.scan_id)
    numbers: list[tuple[float | None, str]] = [
        (row.tsnr, ".1f"),
        (row.displacement, ".3f"),
        (100 * row.in_grid, ".1f"),
        (None if row.outliers is None else 100 * row.outliers, ".1f"),
        (row.tr, "g"),
        (row.frames, "d"),
    ]
    cells = [f"<th scope=row data-value='{escape(row.scan_id)}'>{link}</th>"]
    cells.append(f"<td data-value='{escape(row.subject)}'>{escape(row.subject)}</td>")
    for value, form in numbers:
        text, sorted_by = ("–", "") if value is None else (format(value, form), f"{value:.6g}")
        cells.append(f"<td class=number data-value='{sorted_by}'>{text}</td>")
    cells.append(f"<td class=marks data-value='{len(row.marks)}'>{escape('; '.join(row.marks))}</td>")
    return f"<tr data-card='{card}'{' data-marked=1' if row.marks else ''}>{''.join(cells)}</tr>"


def card(row: Measures, name: str, pictures: str) -> str:
    """A scan's pictures."""
    marks = f"<p class=marks>{escape('; '.join(row.marks))}</p>" if row.marks else ""
    told = (
        f"{row.frames} frames, TR {row.tr:g} s, {row.voxels:,} voxels; from {escape(row.source) or 'an unknown file'}"
    )
    return f'<section class=scan id="{name}"><h3>{escape(row.scan_id)}</h3>{marks}<p>{told}</p>{pictures}</section>'


def page(title: str, rows: Sequence[Measures], pictures: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The page.

    Args:
        title: Of the page.
        rows: A line a scan, marked.
        pictures: Markup of each scan's pictures, "" where there are none.
        notes: Said above the table.
    """
    names = [f"scan-{place}" if picture else "" for place, picture in enumerate(pictures)]
    head = "".join(f"<th scope=col data-kind={kind}>{escape(name)}</th>" for name, kind in COLUMNS)
    lines = "".join(line(row, name) for row, name in zip(rows, names, strict=True))
    cards = "".join(card(*each) for each in zip(rows, names, pictures, strict=True) if each[2])
    marked = sum(bool(row.marks) for row in rows)
    trs = Counter(f"{row.tr:g}" for row in rows)
    told = ", ".join(f"{tr} s ({count})" for tr, count in trs.most_common(6))
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    tools = (
        '<div class=tools><label>Find <input type=search id=find placeholder="a name, a mark"></label>'
        "<label><input type=checkbox id=only> only what is marked</label><span id=shown></span></div>"
    )
    explained = (
        "<details><summary>What the columns are</summary><p style='padding: 0 .75rem'>tSNR: median over the brain of "
        "mean / standard deviation over time. Movement: mean framewise displacement, from the confounds that were "
        "kept. "
        "In the grid: part of the brain that the store holds. Outliers: frames that differ from the frame before by "
        "more than the third quartile + 1.5 interquartile ranges of the scan. Marked as an outlier: a modified z-score "
        "beyond 3.5 among the scans of this page, of at least 6.</p></details>"
    )
    body = (
        f"<main>{said}<p>TR: {told}.</p>{tools}<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>{explained}<div id=scans>{cards}</div></main>"
    )
    people = len({row.subject for row in rows})
    summary = f"{len(rows)} scans of {people} subjects, {marked} marked"
    return document(title, summary, body, STYLE, SCRIPT)
