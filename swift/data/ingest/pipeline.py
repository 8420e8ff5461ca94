"""Sources -> scans -> store: a pool of processes, a report, and nothing lost when it is stopped.

Every scan is written whole by the process that prepared it (StoreWriter.add stages it under a temporary name and
renames it), so running the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swift.data.ingest.nifti import sha256_file
from swift.data.ingest.prepare import Recipe, place_of, plan, prepare
from swift.data.ingest.relabel import doubts, labels_of, relabel, write_path
from swift.data.ingest.sources import Source, duplicates, why_twice
from swift.data.store import format as fmt
from swift.data.store.spaces import OWN, placement_of
from swift.data.store.tables import read_report, write_report
from swift.data.store.writer import StoreWriter
from swift.utils.errors import BadScan, UserError

log = logging.getLogger("swift.data")
SHARD_BYTES = 4 << 30
SAID = 20
"""Changed labels that are named on the screen; the report has all."""
_KEPT = ("frames", "voxels", "tr", "notes", "source_bytes", "source_modified", "source_sha256", "dataset")


@dataclass
class Result:
    """What became of one source.

    `status`: added, present (it was in the store already), changed (so was it, but the source is another file now) or
    failed.
    """

    scan_id: str
    source: str
    status: str
    reason: str = ""
    frames: int = 0
    voxels: int = 0
    tr: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    source_bytes: int = 0
    source_modified: int = 0
    """Time of the source file's last change, ns since 1970; with its size a cheap sign that it is another one now."""
    source_sha256: str = ""
    subject: str = ""
    dataset: str = ""
    """The folder or table that the source was found in."""
    labels: dict[str, str] = field(default_factory=dict)
    """Subject, session, ..., phenotypes as they were last taken from the source."""


@dataclass
class Report:
    """Outcome of an ingest; also in the store as ingest_report.json and .csv."""

    path: Path
    recipe: Recipe
    results: list[Result]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What has to be said of the whole: assumptions, people in doubt."""
    part: str = ""
    """i/n of a job array's point; "": the whole."""
    relabelled: int = 0
    """Scans that were there already and whose labels were taken anew."""

    def having(self, status: str) -> list[Result]:
        """Results of one status."""
        return [result for result in self.results if result.status == status]

    @property
    def exit_code(self) -> int:
        """0, or 1 when some scan failed or has changed."""
        return 1 if self.having("failed") or self.having("changed") else 0

    def summary(self) -> dict[str, Any]:
        """Figures for people and machines."""
        added = len(self.having("added"))
        return {
            "store": str(self.path),
            "added": added,
            "present": len(self.having("present")),
            "changed": len(self.having("changed")),
            "failed": len(self.having("failed")),
            "relabelled": self.relabelled,
            "seconds": round(self.seconds, 2),
            "scans_per_minute": round(60 * added / self.seconds, 2) if self.seconds > 0 else 0.0,
        }


def ingest(
    sources: list[Source],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    notes: Sequence[str] = (),
    part: tuple[int, int] = (1, 1),
) -> Report:
    """Bring scans into a store; those that it has already are left as they are, but for their labels.

    A scan whose source has become another file is refused by name, and the store keeps the one it has. Labels that were
    corrected or added at the source are taken into the manifest, and said.

    Args:
        sources: From swift.data.ingest.bids.find_sources. Two of one name are both refused.
        out: Folder of the store; made, or added to.
        recipe: Grid, spacing, TR.
        workers: Processes; 1: this one.
        shard_bytes: Target size of a shard.
        progress: Show a bar with rate and time left.
        notes: What was said in finding the sources; goes into the report.
        part: i, n: only the i-th of n parts, each with its own `out`; swift.data.store.join makes them one.

    Returns:
        The report; `exit_code` is 1 when some scan failed.

    Raises:
        UserError: nothing to do, unwritable folder, disk full, a store of another grid or made with another TR.
    """
    recipe, out = recipe or Recipe(), Path(out)
    recipe.check()
    if not sources:
        raise UserError("no scans to ingest")
    if workers < 1:
        raise UserError(f"workers {workers}: legal is 1 or more")
    began = time.monotonic()
    placement = _placement(sources, recipe, out)
    sources = part_of(sources, *part)
    writer = StoreWriter(out, recipe.grid, recipe.spacing, shard_bytes=shard_bytes, placement=placement)
    earlier = _earlier(out, recipe, part)
    results, todo = _sort_out(sources, writer.done(), earlier)
    try:
        with closing(_run(todo, recipe, writer, workers)) as finished:
            bar = tqdm(
                finished, total=len(todo), unit="scan", desc="ingest", smoothing=0, disable=not progress or not todo
            )
            for result in bar:
                results.append(result)
                _say(result)
        writer.close()
        _relabel(writer, sources, results, earlier)
    finally:
        report = Report(out, recipe, sorted(results, key=lambda result: (result.scan_id, result.source)))
        report.seconds = time.monotonic() - began
        report.part = f"{part[0]}/{part[1]}" if part[1] > 1 else ""
        report.relabelled = sum(result.reason.startswith("labels taken anew") for result in results)
        rows = {**earlier, **{result.scan_id: asdict(result) for result in results}}
        new = doubts(rows.values(), notes)
        for note in new:
            log.warning("%s", note)
        report.notes = [*notes, *new]
        _write_report(report, earlier)
    return report


def _relabel(
    writer: StoreWriter, sources: list[Source], results: list[Result], earlier: dict[str, dict[str, Any]]
) -> None:
    """Take corrected labels of scans that were there before; every change is said."""
    there = {result.scan_id: result for result in results if result.status == "present"}
    said = relabel(writer, [source for source in sources if source.scan_id in there], earlier)
    for name, words in said.items():
        taken = any(" -> " in word for word in words)
        there[name].reason = ("labels taken anew: " if taken else "") + "; ".join(words)
    for name in list(said)[:SAID]:
        _say(there[name])
    if len(said) > SAID:
        log.warning("and %d more scans whose labels differ from the store's; all are in the report", len(said) - SAID)


def part_of(sources: list[Source], number: int, parts: int) -> list[Source]:
    """The sources of one of n parts: every n-th name, so that long and short scans are spread, and doubles together.

    Raises:
        UserError: no such part, or more parts than scans.
    """
    names = sorted({source.scan_id for source in sources})
    if not 1 <= number <= parts <= len(names):
        raise UserError(
            f"--part {number}/{parts}: legal is i/n with i from 1 to n, and n at most the {len(names)} scans"
        )
    mine = set(names[number - 1 :: parts])
    return [source for source in sources if source.scan_id in mine]


def _placement(sources: list[Source], recipe: Recipe, out: Path) -> str:
    """Where the grid of the store lies: what the store says already, else what the sources say.

    Headers are read only where names do not tell: of the first such source that can be read. Others of another kind are
    left out by name when their turn comes.

    Raises:
        UserError: sources of two kinds of space.
    """
    told: dict[str, list[Source]] = {}
    twice = duplicates(sources)  # refused by name
    for source in sources:
        if source.scan_id not in twice and source.space and not source.is_frames:
            told.setdefault(placement_of(source.space), []).append(source)
    if len(told) > 1:
        kinds = "; ".join(
            f"{len(some)} scans in {', '.join(sorted({str(one.space) for one in some}))} (grid: {where})"
            for where, some in sorted(told.items())
        )
        raise UserError(f"scans of two kinds of space do not go into one store: {kinds}; choose one with --space")
    if (out / "store.json").is_file():
        return str(fmt.read_json(out / "store.json").get("placement", OWN))
    for source in sources if not told else ():
        try:
            return place_of(source, plan(source, recipe), recipe)[1]
        except BadScan:  # it will fail by name
            continue
    return next(iter(told), OWN)


def _sort_out(
    sources: list[Source], done: set[str], earlier: dict[str, dict[str, Any]]
) -> tuple[list[Result], list[Source]]:
    """Results that need no work, and the sources that do."""
    results, todo = [], []
    twice = duplicates(sources)
    for source in sources:
        if source.scan_id in twice:
            results.append(_result(source, "failed", why_twice(twice[source.scan_id])))
            _say(results[-1])
        elif source.scan_id in done:
            row = earlier.get(source.scan_id, {})
            kept = {key: row[key] for key in _KEPT if row.get(key)}
            results.append(replace(_result(source, "present"), **kept))
            if why := _changed(source, row):
                results[-1].status, results[-1].reason = "changed", why
                _say(results[-1])
        else:
            todo.append(source)
    return results, todo


def _result(source: Source, status: str, reason: str = "") -> Result:
    name = fmt.printable(str(source.path))
    result = Result(source.scan_id, name, status, fmt.printable(reason), subject=source.subject)
    result.dataset, result.labels = write_path(source.dataset), labels_of(source)
    return result


def _changed(source: Source, row: dict[str, Any]) -> str:
    """Why a source is not the file that a line of the report tells of; "" where it is, or the line does not say."""
    if source.problem:
        return f"{source.problem}; the store keeps the scan it has"
    if source.is_frames or not row.get("source_sha256"):
        return ""
    try:
        stat = source.path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (row["source_bytes"], row["source_modified"]):
            return ""
        if sha256_file(source.path) == row["source_sha256"]:
            return ""
    except OSError as error:
        return f"{source.path.name}: cannot be read ({error.strerror or error}); the store keeps the scan it has"
    if row.get("dataset") and row["dataset"] != write_path(source.dataset):
        return f"the store has another scan of this name, from {row['source']}: give one data set a --prefix"
    return f"{source.path.name} has changed since; the store has the old scan: use another folder"


def _run(todo: list[Source], recipe: Recipe, writer: StoreWriter, workers: int) -> Generator[Result, None, None]:
    """Yield results as they come."""
    workers = min(workers, len(todo))
    if workers <= 1:
        for source in todo:
            yield ingest_one(source, recipe, writer)
        return
    lost: list[Source] = []
    with _pool(workers) as pool:
        futures: dict[Future[Result], Source] = {
            pool.submit(ingest_one, source, recipe, writer): source for source in todo
        }
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
        except KeyboardInterrupt:
            log.warning("stopping after the scans in hand; run the same command again to go on")
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    done = writer.done()
    for source in lost:  # one of them killed its worker: each alone, to find which
        yield _alone(source, recipe, writer) if source.scan_id not in done else ingest_present(source)


def ingest_present(source: Source) -> Result:
    """The result for a scan that is in the store already."""
    return _result(source, "present")


def _alone(source: Source, recipe: Recipe, writer: StoreWriter) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(ingest_one, source, recipe, writer).result()
        except BrokenProcessPool:
            reason = f"{source.path.name}: the process that read it died (killed for memory?)"
            return _result(source, "failed", reason)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: HDF5 and thread pools of the parent do not survive it.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_leave_stopping_to_parent)


def _leave_stopping_to_parent() -> None:
    """On Ctrl-C workers finish the scan in hand, which is then in the store, and get no other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ingest_one(source: Source, recipe: Recipe, writer: StoreWriter) -> Result:
    """Prepare one scan and stage it in the store.

    Raises:
        UserError: what concerns the store rather than the scan, such as a full disk.
    """
    began = time.monotonic()
    result = _result(source, "added")
    try:
        scan = prepare(source, recipe)
        info = writer.add(scan.header, scan.mask, scan.bold)
        result.frames, result.voxels, result.tr, result.notes = info.frames, info.voxels, info.tr, scan.header.notes
        if not source.is_frames:
            stat = source.path.stat()
            result.source_bytes, result.source_modified = stat.st_size, stat.st_mtime_ns
        result.source_sha256 = scan.header.source_sha256
    except BadScan as error:
        result.status, result.reason = "failed", " ".join(fmt.printable(str(error)).split())
    except UserError:
        raise
    except MemoryError:
        result.status, result.reason = "failed", f"{fmt.printable(source.path.name)}: not enough memory"
    except Exception as error:  # a scan that trips a library must not end a run over thousands
        log.debug("%s", source.path, exc_info=True)
        text = " ".join(fmt.printable(str(error)).split())
        result.status, result.reason = "failed", f"{fmt.printable(source.path.name)}: {type(error).__name__}: {text}"
    result.seconds = round(time.monotonic() - began, 3)
    return result


def _say(result: Result) -> None:
    if result.reason:
        log.warning("%s: %s: %s", result.scan_id, result.status, result.reason)
    for note in result.notes:
        log.info("%s: %s", result.scan_id, note)


def _earlier(out: Path, recipe: Recipe, part: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Rows of the last report by scan_id; refuses to mix scans that were made otherwise."""
    content = read_report(out)
    before, now = content.get("part", ""), f"{part[0]}/{part[1]}" if part[1] > 1 else ""
    if before and before != now:
        raise UserError(f"{out}: is part {before} of an ingest, not {now or 'the whole'}; use another folder")
    rows = {row["scan_id"]: row for row in content.get("scans", []) if row.get("status") != "failed"}
    for name in ("tr_resample", "drop_first"):
        before, now = content.get("recipe", {}).get(name, getattr(Recipe, name)), getattr(recipe, name)
        if rows and before != now:
            option = name.replace("_", "-")
            raise UserError(f"{out}: its scans were made with --{option} {before}, not {now}; use another folder")
    return rows


def _write_report(report: Report, earlier: dict[str, dict[str, Any]]) -> None:
    """Both forms; scans of earlier runs that were not asked for this time keep their lines."""
    rows = [asdict(result) for result in report.results]
    now = {row["scan_id"] for row in rows}
    rows = sorted(
        [*rows, *(row for name, row in earlier.items() if name not in now)], key=lambda row: str(row["scan_id"])
    )
    content = {
        "recipe": asdict(report.recipe),
        "part": report.part,
        **report.summary(),
        "notes": report.notes,
        "scans": rows,
    }
    write_report(report.path, content)
