"""Embeddings on their way to one table: kept in small files, so that many processes make them and a kill loses little.

Beside the table lies a folder `.NAME.parts` until the table is complete:

    plan.json       what is made of which scans; another plan is refused
    0000040-….npz   rows of some scans, written whole under another name first

Each process works on its own part of the scans and leaves out what is there already, whoever made it. The process that
finds nothing missing writes the table, in the order of the scans, and removes the folder; rows, their order and their
bits are those that one process would write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from swift.inference.embedding import Embedding
from swift.inference.embedding_table import PLACE, SubjectMeans, read_info, write_table
from swift.inference.fit_scan import FittedScan, Scan, StoredScan
from swift.utils.entry import no_memory
from swift.utils.errors import UserError

log = logging.getLogger("swift.embed")

SECONDS = 30.0
"""After so long rows that were made are written; a kill loses no more."""
ROWS = 4096
"""Of the table that are handed on together."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one scan lie."""

    file: Path
    first: int
    last: int


class Parts:
    """The rows of a table that are there already.

    Args:
        out: The table.
        plan: What is made of which scans, plain values.
        scans: All of them, in their order; `place` is the place of a scan here.

    Raises:
        UserError: rows of another plan are there, or nothing can be written.
    """

    def __init__(self, out: Path, plan: dict[str, Any], scans: Sequence[Scan]) -> None:
        self.out, self.scans = out, scans
        told = json.dumps([_state(scan) for scan in scans])
        self.plan = plan | {"scans": hashlib.sha256(told.encode()).hexdigest()[:16]}
        self.folder = out.with_name(f".{out.name}.parts")

    def open(self) -> None:
        """Make the folder, or find it made for the same plan."""
        try:
            self.folder.mkdir(exist_ok=True)
            own = self.folder / f"plan.{uuid.uuid4().hex[:8]}"
            own.write_text(json.dumps(self.plan), encoding="utf-8")
            try:
                os.link(own, self.folder / "plan.json")  # of several processes one is first
            except FileExistsError:
                pass
            finally:
                own.unlink()
            there = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{self.folder} is damaged (plan.json): remove it to begin again") from error
        other = [name for name in self.plan if there.get(name) != self.plan[name]]
        if other:
            raise UserError(
                f"{self.folder} holds parts of another table (other {', '.join(other)}): remove it, or choose "
                "another --out"
            )

    def written(self) -> bool:
        """Whether the table is there, made by this plan."""
        return self.out.exists() and read_info(self.out).get("plan") == self.plan

    def found(self) -> tuple[dict[int, Rows], dict[int, str]]:
        """Rows by the place of their scan, and why scans failed."""
        rows: dict[int, Rows] = {}
        failed: dict[int, str] = {}
        for file in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(file, allow_pickle=False) as content:
                    places, reasons = content["place"], json.loads(str(content["failed"]))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                if not file.exists():
                    raise  # the table is written, and the folder is being removed
                log.warning("%s is damaged and left out: its scans are embedded again (%s)", file, error)
                continue
            starts = np.flatnonzero(np.diff(places, prepend=-1)) if len(places) else places
            for first, last in zip(starts, [*starts[1:], len(places)]):
                rows.setdefault(int(places[first]), Rows(file, int(first), int(last)))
            failed |= {int(place): reason for place, reason in reasons.items()}
        return rows, {place: reason for place, reason in failed.items() if place not in rows}

    def todo(self, places: Iterable[int]) -> list[int]:
        """Those of some places whose scans have no rows yet; scans that failed are tried again."""
        found, _ = self.found()
        return [place for place in places if place not in found]

    def rows(self, found: dict[int, Rows]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """(places, first frames, values) of some rows after the other, in the order of the scans."""

        @lru_cache(maxsize=4)
        def content(file: Path) -> dict[str, np.ndarray]:
            with np.load(file, allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files if name != "failed"}

        held: list[dict[str, np.ndarray]] = []
        for place in sorted(found):
            where = found[place]
            held.append({name: array[where.first : where.last] for name, array in content(where.file).items()})
            if sum(len(part["place"]) for part in held) >= ROWS or place == max(found):
                together = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
                held = []
                yield together.pop("place"), together.pop("row"), together

    def finish(self, per: str, info: dict[str, Any]) -> tuple[int, dict[int, str]] | None:
        """Write the table if no scan is missing, and remove the folder.

        Args:
            per: frame | clip | scan | subject: rows of the table.
            info: Goes into the table.

        Returns:
            Rows (0: no table, as all scans failed), and why scans failed; None: scans are missing, or another process
            has written it.
        """
        try:
            found, failed = self.found()
            if len(found) + len(failed) < len(self.scans):
                return None
            count = write_table(self.out, info | {"plan": self.plan}, self._table(found, per)) if found else 0
        except FileNotFoundError:
            if self.written():
                return None
            raise
        shutil.rmtree(self.folder, ignore_errors=True)
        return count, failed

    def _table(self, found: dict[int, Rows], per: str) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Identity columns and values of the table, some rows after the other."""
        means = SubjectMeans()
        for places, row, values in self.rows(found):
            scans = [self.scans[place] for place in places]
            ids = {"scan": np.array([scan.scan_id for scan in scans])}
            ids["subject"] = np.array([scan.subject for scan in scans])
            if per == "subject":
                for number, subject in enumerate(ids["subject"]):
                    means.add(str(subject), {name: value[number : number + 1] for name, value in values.items()})
                continue
            column = PLACE[per]
            yield ids | ({column: row} if column else {}), values
        yield from means.rows()


class Chunk:
    """Rows that this process makes, written when SECONDS have passed, and at the end."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.failed: dict[int, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._rows: list[tuple[int, np.ndarray, dict[str, np.ndarray]]] = []
        self._reasons: dict[int, str] = {}
        self._since = time.monotonic()

    def add(self, place: int, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Keep the rows of a scan."""
        self._rows.append((place, rows, values))
        self._flush_if_due()

    def fail(self, place: int, reason: str) -> None:
        """Keep why a scan has no rows."""
        self.failed[place] = self._reasons[place] = reason
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held to a file of its own."""
        if not self._rows and not self._reasons:
            return
        first = min([place for place, *_ in self._rows] + list(self._reasons))
        arrays = {
            "place": np.concatenate([np.full(len(rows), place) for place, rows, _ in self._rows] or [np.empty(0, int)]),
            "row": np.concatenate([rows for _, rows, _ in self._rows] or [np.empty(0, np.int64)]),
        }
        for name in self._rows[0][2] if self._rows else ():
            arrays[name] = np.concatenate([values[name] for *_, values in self._rows])
        target = self.parts.folder / f"{first:07d}-{uuid.uuid4().hex[:8]}.npz"
        partial = target.with_suffix(".partial")
        try:
            with partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, failed=np.asarray(json.dumps(self._reasons)), **arrays)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        except OSError as error:
            raise UserError(f"--out {self.parts.out}: cannot be written ({error.strerror or error})") from error
        self._begin()


def prepared(
    scans: Sequence[Scan], places: Sequence[int], embedding: Embedding, ahead: int
) -> Iterator[tuple[int, Callable[[], FittedScan]]]:
    """Places in order, each with what gives its scan as the model takes it; some are made ready by threads before.

    Reading, unpacking and resampling leave the interpreter free, so threads do it while the device computes. A scan of
    a store is ready as it is.

    Args:
        scans: All of them.
        places: Of those to embed.
        embedding: Whose model takes them.
        ahead: Scans in memory besides the one that is encoded; 0: no threads.
    """
    if not ahead:
        yield from ((place, partial(embedding.prepare, scans[place])) for place in places)
        return
    waiting: deque[tuple[int, Callable[[], FittedScan]]] = deque()
    pool = ThreadPoolExecutor(ahead, "prepare")
    try:
        for place in places:
            scan = scans[place]
            in_store = isinstance(scan, StoredScan)
            get = partial(embedding.prepare, scan) if in_store else pool.submit(embedding.prepare, scan).result
            waiting.append((place, get))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def embed_places(
    scans: Sequence[Scan], places: Sequence[int], embedding: Embedding, parts: Parts, quiet: bool, ahead: int = 0
) -> dict[int, str]:
    """Embed the scans of some places; a bad one is named and the rest goes on.

    Args:
        scans: All of them.
        places: Of those to embed.
        embedding: What makes rows of a scan.
        parts: Where rows are kept, also when this is stopped.
        quiet: Without a progress bar.
        ahead: Scans that are made ready while another is encoded.

    Returns:
        Place -> why it failed.

    Raises:
        UserError: a GPU whose memory is too small, or nothing can be written.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    chunk = Chunk(parts)
    try:
        with logging_redirect_tqdm():
            ready = prepared(scans, places, embedding, ahead)
            for place, fitted in tqdm(ready, "embed", len(places), unit="scan", smoothing=0, disable=quiet):
                scan = scans[place]
                try:
                    done = embedding.encode(fitted())
                except Exception as error:  # a scan that trips a library must not end a run over thousands
                    log.debug("%s", scan.scan_id, exc_info=True)
                    chunk.fail(place, _reason(error, embedding.batch))
                    log.warning("%s: failed: %s", scan.scan_id, chunk.failed[place])
                    continue
                for note in done.notes:
                    log.info("%s: %s", scan.scan_id, note)
                chunk.add(place, done.rows, done.values)
    finally:
        chunk.flush()
    return chunk.failed


def _reason(error: Exception, batch: int) -> str:
    """Why a scan failed, on one line; a GPU without memory ends the run, as it would at the next scan."""
    lacks = no_memory(error)
    if lacks and not isinstance(error, MemoryError) and "GPU" in lacks:
        raise UserError(f"--batch {batch}: the GPU's memory is too small; try a smaller one") from error
    if lacks:
        return lacks
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _state(scan: Scan) -> list[str]:
    """What tells whether a scan is the one that rows were made of."""
    if isinstance(scan, StoredScan):
        return [scan.scan_id, scan.subject, str(scan.store.path.resolve())]
    try:
        stat = scan.path.stat()
    except OSError:  # it will fail by name
        return [scan.scan_id, scan.subject, str(scan.path)]
    return [scan.scan_id, scan.subject, str(scan.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
