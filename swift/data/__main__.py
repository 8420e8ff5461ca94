"""`python -m swift.data`: scans into a store, and everything that is done to a store."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift.data.ingest.listing import add_places
from swift.data.labels import split_cli
from swift.data.quality import cli as quality
from swift.data.store import join_cli
from swift.data.synthetic import cli as synthetic
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

Command = Callable[[argparse.Namespace], int]
log = logging.getLogger("swift.data")


def _ingest(options: argparse.Namespace) -> int:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from swift.data.ingest.bids import find
    from swift.data.ingest.listing import choice_of, listing
    from swift.data.ingest.pipeline import ingest
    from swift.data.ingest.prepare import Recipe

    if len(options.grid) not in (1, 3):
        raise UserError(f"--grid {' '.join(map(str, options.grid))}: one number or three")
    x, y, z = options.grid if len(options.grid) == 3 else options.grid * 3
    recipe = Recipe(
        grid=(x, y, z),
        spacing=options.spacing,
        tr=options.tr,
        tr_resample=options.tr_resample,
        frame_spacing=options.frame_spacing,
        confounds=not options.no_confounds,
        mask=str(options.mask) if options.mask is not None else None,
        drop_first=options.drop_first,
        any_size=options.any_size,
        cropped=options.cropped,
    )
    recipe.check()
    found = find(options.inputs, choice_of(options))
    if options.frame_spacing is not None and not any(source.is_frames for source in found.sources):
        raise UserError(f"--frame-spacing {options.frame_spacing:g}: is for SwiFT v1 frames, and there are none")
    if options.list:
        figures, lines = listing(found)
        _show(options, figures, lines)
        return 1 if figures["left_out"] else 0
    for line in [*found.kinds, *found.told()]:
        log.info("%s", line)
    for note in found.notes:
        log.warning("%s", note)
    if options.out is None:
        raise UserError("--out STORE is missing: the folder of the store to make or add to")
    shard_bytes = int(options.shard_gb * 1e9) or 1
    with logging_redirect_tqdm():
        report = ingest(
            found.sources,
            options.out,
            recipe,
            workers=options.workers,
            shard_bytes=shard_bytes,
            progress=not options.quiet,
            notes=[*found.notes, *found.told()],
            part=options.part,
        )
    figures = report.summary()
    line = (
        "{store}: {added} added, {present} there already, {changed} changed, {failed} failed, "
        "{seconds:g} s, {scans_per_minute:g} scans/min"
    )
    line += "; labels of {relabelled} taken anew" if report.relabelled else ""
    _show(options, figures, [line.format(**figures)])
    if report.exit_code:
        print(f"what failed or has changed is named in {options.out / 'ingest_report.csv'}", file=sys.stderr)
    return report.exit_code


def _info(options: argparse.Namespace) -> int:
    from swift.data.quality.picture import quality_picture
    from swift.data.store import format as fmt
    from swift.data.store.reader import Store
    from swift.data.store.spaces import placement_text
    from swift.data.store.tables import read_report

    store = Store(options.store)
    places = [store.find(name) for name in options.scan] if options.scan else list(range(len(store.scans)))
    description = fmt.read_json(options.store / "store.json")
    frames = sum(scan.frames for scan in store.scans)
    figures: dict[str, Any] = {
        "store": str(options.store),
        "format_version": description["format_version"],
        "tool_version": description.get("tool_version", ""),
        "grid": list(store.grid),
        "spacing_mm": store.spacing,
        "placement": placement_text(store.placement, store.version),
        "spaces": list(store.spaces),
        "shards": len(store.shards),
        "bytes": sum(entry["bytes"] for entry in store.shards.values()),
        "scans": len(store.scans),
        "subjects": len({scan.subject for scan in store.scans}),
        "sites": sorted({scan.site for scan in store.scans} - {""}),
        "tasks": sorted({scan.task for scan in store.scans} - {""}),
        "frames": frames,
        "hours": round(sum(scan.frames * scan.tr for scan in store.scans) / 3600, 3),
        "tr": {f"{tr:g}": count for tr, count in sorted(Counter(scan.tr for scan in store.scans).items())},
        "phenotypes": sorted({name for scan in store.scans for name in scan.phenotypes}),
    }
    rows = []
    for place in places if options.scan or options.qc or options.scans or options.json else []:
        row = _scan_row(store, place)
        if options.qc:
            picture = options.qc / f"{store.scans[place].scan_id}.png"
            row |= {"picture": str(picture), **quality_picture(store, place, picture)}
        rows.append(row)
    lines = [f"{name:<15} {value}" for name, value in figures.items()]
    notes = [str(note) for note in read_report(options.store).get("notes", [])]
    lines += [f"note: {note}" for note in notes]
    for row in rows:
        lines.append(f"\n{row['scan_id']}")
        lines += [f"  {name:<15} {value}" for name, value in row.items() if name not in ("scan_id", "notes")]
        lines += [f"  note: {note}" for note in row["notes"]]
    if options.qc:
        lines.append(f"\nall scans on one page: swift-fmri data report {options.store} --out qc.html")
    _show(options, {**figures, "notes": notes, "scan_list": rows}, lines)
    return 0


def _scan_row(store: Any, place: int) -> dict[str, Any]:
    scan, attributes = store.scans[place], store.attributes(place)
    names = ("orientation", "source", "source_sha256")
    counts = ("nan_voxels", "flat_voxels", "clipped")
    row = {name: getattr(scan, name) for name in ("scan_id", "subject", "session", "task", "run", "site", "shard")}
    row |= {"frames": scan.frames, "voxels": scan.voxels, "tr": scan.tr, "phenotypes": scan.phenotypes}
    row |= {"space": attributes.get("space", ""), "dropped": int(attributes.get("dropped", 0))}
    row["start_time"] = float(attributes.get("start_time", 0.0))
    row |= {name: attributes[name] for name in names} | {name: int(attributes[name]) for name in counts}
    row |= {name: float(value) for name, value in attributes.items() if name.startswith("global_")}
    return row | {"affine": attributes["affine"].tolist(), "notes": json.loads(attributes["notes"])}


def _verify(options: argparse.Namespace) -> int:
    from swift.data.store.check import describe, verify

    bar, tick = _bar(options, options.store, "verify")
    with bar:
        damage = verify(options.store, workers=options.workers, progress=tick)
    rows = [vars(one) for one in damage]
    good = f"{options.store}: every checksum is right"
    lines = [f"{'changed' if one.changed else 'damaged'}: {describe(one)}" for one in damage]
    broken = [one for one in damage if not one.changed]
    _show(options, {"damaged": rows}, lines if broken else [*lines, good])
    return 1 if broken else 0


def _repair(options: argparse.Namespace) -> int:
    from swift.data.ingest.bids import find
    from swift.data.ingest.listing import choice_of
    from swift.data.ingest.repair import repair
    from swift.data.ingest.sources import Choice
    from swift.data.store.check import describe

    choice = choice_of(options)
    if not options.source and choice != Choice():
        raise UserError("--layout, --prefix and entities say which scans of --source are meant, and there is none")
    sources = find(options.source, choice).sources if options.source else []
    outcome = repair(options.store, replica=options.replica, sources=sources)
    lines = [f"restored from {giver}: {describe(one)}" for one, giver in outcome.fixed]
    lines += [f"still damaged: {describe(one)}: {why}" for one, why in outcome.left]
    figures = {
        "restored": [{**vars(one), "from": giver} for one, giver in outcome.fixed],
        "damaged": [{**vars(one), "reason": why} for one, why in outcome.left],
    }
    _show(options, figures, lines or [f"{options.store}: nothing to repair"])
    return 1 if outcome.left else 0


def _copy(options: argparse.Namespace) -> int:
    from swift.data.store.check import copy

    bar, tick = _bar(options, options.store, "copy")
    with bar:
        figures = copy(options.store, options.target, workers=options.workers, progress=tick)
    line = (
        f"{options.target}: {figures['copied']} shards copied ({figures['bytes'] / 1e6:.1f} MB), {figures['kept']} kept"
    )
    _show(options, figures, [line + ", all verified"])
    return 0


def _export(options: argparse.Namespace) -> int:
    from swift.data.store.export import export_scan, export_table
    from swift.data.store.reader import Store

    store = Store(options.store)
    places = [store.find(name) for name in options.scan] if options.scan else list(range(len(store.scans)))
    rows = []
    for place in places:
        bold, mask = export_scan(store, place, options.out)
        rows.append({"scan_id": store.scans[place].scan_id, "bold": str(bold), "mask": str(mask)})
    export_table(store, places, options.out)
    _show(options, rows, [row["bold"] for row in rows])
    return 0


def _bar(options: argparse.Namespace, store: Path, what: str) -> tuple[Any, Callable[[str], None]]:
    from tqdm import tqdm

    from swift.data.store import format as fmt

    total = len(fmt.read_json(store / "store.json").get("shards", {}))
    bar = tqdm(total=total, unit="shard", desc=what, disable=options.quiet or options.json)

    def tick(_: str) -> None:
        bar.update()

    return bar, tick


def _show(options: argparse.Namespace, figures: Any, lines: list[str]) -> None:
    print(json.dumps(figures, indent=2) if options.json else "\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swift.data",
        description="NIfTI and BIDS derivatives into a checksummed HDF5 store, and the store's upkeep.",
        epilog="Exit status: 0 well, 1 some scan failed or some data are damaged, 2 a mistake in what was asked.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print figures as JSON")
    common.add_argument("--quiet", action="store_true", help="no progress bar, no notes")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    _add_ingest(add("ingest", _ingest, "bring scans into a store; run it again to go on where it stopped"))
    info = add("info", _info, "what is in a store")
    info.add_argument("store", type=Path)
    info.add_argument("--scans", action="store_true", help="also every scan, with its notes")
    info.add_argument("--scan", action="append", default=[], metavar="ID", help="only this scan (may be repeated)")
    info.add_argument("--qc", type=Path, metavar="FOLDER", help="draw mean, tSNR and carpet of each scan there")
    quality.add_arguments(
        add("report", quality.run, "one page of brains: every scan's quality, what stands out marked")
    )
    check = add("verify", _verify, "compare every checksum; name damage by shard, scan and frame")
    check.add_argument("store", type=Path)
    check.add_argument("--workers", type=int, default=2, help="shards read at once (2)")
    _add_repair(add("repair", _repair, "write damaged bytes anew from a replica or from the sources"))
    split_cli.add_arguments(
        add("split", split_cli.run, "train, validation and test subjects, saved to a file with a hash")
    )
    copy = add("copy", _copy, "copy a store elsewhere, verified; run it again to go on where it stopped")
    copy.add_argument("store", type=Path)
    copy.add_argument("target", type=Path)
    copy.add_argument("--workers", type=int, default=2, help="shards copied at once (2)")
    join_cli.add_join(add("join", join_cli.run_join, "several stores made one, verified: what ingest --part made"))
    join_cli.add_place(add("place", join_cli.run_place, "move a store of format version 1 into its template's box"))
    export = add("export", _export, "scans back to NIfTI, with the right affine")
    export.add_argument("store", type=Path)
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    export.add_argument("--scan", action="append", default=[], metavar="ID", help="only this scan (may be repeated)")
    synthetic.add_arguments(add("synthetic", synthetic.run, "make a cohort with planted effects of chosen size"))
    return parser


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        help="fMRIPrep derivatives, a folder of NIfTI, NIfTI files, a CSV/TSV with a column path, SwiFT v1 folders",
    )
    parser.add_argument("--out", type=Path, metavar="STORE", help="folder of the store")
    parser.add_argument("--grid", type=int, nargs="+", default=[96], metavar="N", help="voxels, one or three (96)")
    parser.add_argument("--spacing", type=float, default=2.0, help="isotropic voxel size, mm (2)")
    parser.add_argument(
        "--mask", type=Path, metavar="NIFTI", help="brain mask of all NIfTI scans (else: the one beside, or computed)"
    )
    parser.add_argument("--tr", type=float, help="seconds between frames, where the files do not say (wins over them)")
    parser.add_argument("--tr-resample", type=float, metavar="TR", help="bring every scan to this TR, seconds")
    parser.add_argument("--frame-spacing", type=float, help="voxel size of SwiFT v1 frames, mm (as --spacing)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="target size of a shard; 0: one scan each (4)")
    parser.add_argument("--participants", type=Path, help="participants.tsv that does not lie in the data set")
    parser.add_argument(
        "--drop-first", type=int, default=0, metavar="N", help="leave out N frames at the start of every scan (0)"
    )
    parser.add_argument("--any-size", action="store_true", help="take brains below 0.05 or above 5 litres: it is meant")
    parser.add_argument("--cropped", action="store_true", help="take brains of which more than 10 %% are cut off")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="only the I-th of N parts, for job arrays; see join"
    )
    parser.add_argument("--no-confounds", action="store_true", help="leave fMRIPrep's confounds out")
    parser.add_argument("--list", action="store_true", help="only say what would be ingested")
    add_places(parser)


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdigit() and parts.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: I/N, such as 3/8")
    return int(number), int(parts)


def _add_repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)
    parser.add_argument("--replica", type=Path, metavar="STORE", help="another copy of the store")
    parser.add_argument("--source", type=Path, nargs="+", default=[], help="what the store was ingested from")
    add_places(parser)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with its status."""
    options = _parser().parse_args(arguments)
    set_up_logging()
    log.setLevel(logging.WARNING if options.quiet else logging.NOTSET)
    status = 0

    def work() -> None:
        nonlocal status
        status = options.run(options)

    reported(work)
    sys.exit(status)


if __name__ == "__main__":
    main()
