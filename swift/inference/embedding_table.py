"""The file that embeddings are written to, .npz or .parquet, and means over the scans of a subject.

Legend: N rows, E width of a stage.
"""

from __future__ import annotations

import json
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swift.utils.errors import UserError

SUFFIXES = (".npz", ".parquet")
PLACE = {"frame": "frame", "clip": "start", "scan": None, "subject": "scans"}
"""What tells the rows of a scan apart: the frame, or the first frame of a clip; of a subject, how many scans it has."""


class Writer(Protocol):
    """Takes rows and leaves one file, or none."""

    rows: int

    def add(self, ids: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        """Take N rows: identity columns (N,) and layer -> (N, E) float32."""

    def close(self) -> None:
        """Put the file in its place."""

    def abandon(self) -> None:
        """Leave no file."""


class NpzWriter:
    """Arrays by name: the identity columns, `embedding` (or one array a layer, by its name) and `info` (JSON text)."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info, self.rows = path, info, 0
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, ids: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        """See `Writer`."""
        named = values if len(values) > 1 else {"embedding": next(iter(values.values()))}
        for name, array in (ids | named).items():
            self._parts.setdefault(name, []).append(array)
        self.rows += len(next(iter(values.values())))

    def close(self) -> None:
        """See `Writer`."""
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        partial = _partial(self.path)
        try:
            with partial.open("wb") as stream:
                # Text has a fixed width, never type object: the file opens with allow_pickle=False.
                np.savez(stream, allow_pickle=False, info=np.asarray(json.dumps(self.info)), **arrays)
            partial.replace(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def abandon(self) -> None:
        """See `Writer`."""
        _partial(self.path).unlink(missing_ok=True)


class ParquetWriter:
    """A table: the identity columns, then LAYER_0, LAYER_1, ...; written scan by scan; JSON `swift` in its metadata."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info, self.rows = path, info, 0
        self._writer: Any = None

    def add(self, ids: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        """See `Writer`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = dict(ids)
        for name, value in values.items():
            columns |= {f"{name}_{place}": value[:, place] for place in range(value.shape[1])}
        table = pa.table(columns)
        try:
            if self._writer is None:
                schema = table.schema.with_metadata({"swift": json.dumps(self.info)})
                self._writer = pq.ParquetWriter(_partial(self.path), schema)
            self._writer.write_table(table.cast(self._writer.schema))
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.rows += len(table)

    def close(self) -> None:
        """See `Writer`."""
        self._writer.close()
        _partial(self.path).replace(self.path)

    def abandon(self) -> None:
        """See `Writer`."""
        if self._writer is not None:
            self._writer.close()
        _partial(self.path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--out {path}: cannot be written ({error.strerror or error})")


def check_out(path: Path) -> None:
    """Raise UserError for a file that could not be written at the end."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {path}: must end in {' or '.join(SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_table(
    path: Path, info: dict[str, Any], rows: Iterable[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
) -> int:
    """Write a table and put it in its place whole.

    Args:
        path: Of the table.
        info: Plain values, kept with it.
        rows: Identity columns (N,) and layer -> (N, E) float32, some rows after the other.

    Returns:
        How many rows.

    Raises:
        UserError: it cannot be written.
    """
    hidden = path.with_name(f".{uuid.uuid4().hex[:8]}{path.name}")  # two processes may come to the end at once
    writer: Writer = (NpzWriter if path.suffix == ".npz" else ParquetWriter)(hidden, info)
    try:
        for ids, values in rows:
            writer.add(ids, values)
        writer.close()
        hidden.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        writer.abandon()  # what is closed is in its place already
    return writer.rows


def read_info(path: Path) -> dict[str, Any]:
    """What `write_table` has kept with a table; {} for another file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = json.loads(str(file["info"]))
        else:
            import pyarrow.parquet as pq

            found = json.loads((pq.read_schema(path).metadata or {})[b"swift"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
    return found if isinstance(found, dict) else {}


def read_features(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Subjects (N,) and layer -> (N, E) of a table that `write_table` has made."""
    layers = list(read_info(path)["layers"])
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            names = {layer: layer if layer in file else "embedding" for layer in layers}
            return file["subject"], {layer: file[name] for layer, name in names.items()}
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {layer: [c for c in table.column_names if c.rpartition("_")[0] == layer] for layer in layers}
    values = {layer: np.stack([table[c].to_numpy() for c in names], axis=1) for layer, names in columns.items()}
    return np.asarray(table["subject"].to_pylist()), values


class SubjectMeans:
    """Mean over the scans of each subject: sums only."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, dict[str, np.ndarray]]] = {}

    def add(self, subject: str, values: dict[str, np.ndarray]) -> None:
        """Take the row of a scan: layer -> (1, E)."""
        count, sums = self._sums.get(subject, (0, {}))
        added = {name: sums.get(name, 0.0) + value.astype("f8") for name, value in values.items()}
        self._sums[subject] = count + 1, added

    def rows(self) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Identity columns and means, a subject after the other, as their first scans came."""
        for subject, (count, sums) in self._sums.items():
            ids = {"subject": np.array([subject]), "scans": np.array([count], np.int64)}
            yield ids, {name: (total / count).astype(np.float32) for name, total in sums.items()}
