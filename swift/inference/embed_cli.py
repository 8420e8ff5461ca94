"""`python -m swift.embed MODEL SCAN... --out FILE`: what a trained model makes of scans, one row a frame, clip or scan.

Nothing is trained and nothing is hidden from the model: each scan is brought to the model's input contract
(orientation, grid, spacing, TR, normalization), cut into clips and encoded; the features are averaged over the brain.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.inference.embedding_table import PLACE, NpzWriter, ParquetWriter, SubjectMeans, Writer, check_out
from swift.inference.options import add_model_options
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.inference.embedding import Embedded, Embedding
    from swift.inference.fit_scan import Scan

log = logging.getLogger("swift.embed")


def run(options: argparse.Namespace) -> int:
    """Embed all scans of the command line; 1 where some failed, else 0."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    check_out(options.out)

    from swift.inference.embedding import Embedding
    from swift.inference.fit_scan import Fitting, find_scans
    from swift.inference.model import load_trained

    began = time.monotonic()
    trained = load_trained(options.model, options.which, options.config)
    fitting = Fitting(options.tr, options.other_tr, options.mask)
    per = "scan" if options.per == "subject" else options.per
    embedding = Embedding(trained, options.layer, per, fitting, options.device, options.batch)
    scans = find_scans(options.scans, trained.contract)
    if trained.contract.tr is None:
        log.info("%s does not say which TR it was trained on: the TR of scans is not compared", options.model)
    info = {"model": trained.source, "step": trained.step, "layers": embedding.widths, "per": options.per}
    writer: Writer = (NpzWriter if options.out.suffix == ".npz" else ParquetWriter)(options.out, info)
    failed: list[dict[str, str]] = []
    try:
        with logging_redirect_tqdm():
            bar = tqdm(scans, unit="scan", desc="embed", smoothing=0, disable=options.quiet)
            _embed_all(bar, embedding, options.per, writer, failed)
        if writer.rows:
            writer.close()
    finally:
        writer.abandon()  # what is closed is in its place already
    _say(options, info, writer, len(scans), failed, time.monotonic() - began)
    return 1 if failed else 0


def _embed_all(scans: Any, embedding: Embedding, per: str, writer: Writer, failed: list[dict[str, str]]) -> None:
    """One scan in memory at a time; a bad one is named and the rest goes on."""
    import numpy as np

    subjects = SubjectMeans()
    for scan in scans:
        done = _one(scan, embedding, failed)
        if done is None:
            continue
        for note in done.notes:
            log.info("%s: %s", scan.scan_id, note)
        if per == "subject":
            subjects.add(scan.subject, done.values)
            continue
        count = len(done.rows)
        ids = {"scan": np.array([scan.scan_id] * count), "subject": np.array([scan.subject] * count)}
        place = PLACE[per]
        writer.add(ids | ({place: done.rows.astype(np.int64)} if place else {}), done.values)
    subjects.write(writer)


def _one(scan: Scan, embedding: Embedding, failed: list[dict[str, str]]) -> Embedded | None:
    """The embeddings of one scan; None: it is in `failed`, with the reason."""
    import torch

    try:
        return embedding(scan)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"--batch {embedding.batch}: the GPU's memory is too small; try a smaller one") from error
    except UserError as error:
        reason = " ".join(str(error).split())
    except MemoryError:
        reason = "not enough memory"
    except Exception as error:  # a scan that trips a library must not end a run over thousands
        log.debug("%s", scan.scan_id, exc_info=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    failed.append({"scan": scan.scan_id, "reason": reason})
    log.warning("%s: failed: %s", scan.scan_id, reason)
    return None


def _say(
    options: argparse.Namespace,
    info: dict[str, Any],
    writer: Writer,
    scans: int,
    failed: list[dict[str, str]],
    seconds: float,
) -> None:
    out = str(options.out) if writer.rows else None
    figures = {"out": out, **info, "rows": writer.rows, "scans": scans - len(failed), "failed": failed}
    if options.json:
        print(json.dumps(figures | {"seconds": round(seconds, 2)}, indent=2))
        return
    if out:
        widths = ", ".join(f"{name} ({width})" for name, width in info["layers"].items())
        print(f"{out}: {writer.rows} rows, one a {info['per']}; {widths}; {scans - len(failed)} scans, {seconds:.1f} s")
    if failed:
        print(f"{len(failed)} of {scans} scans failed" + ("" if out else ": nothing written"), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m swift.embed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="run directory, checkpoint, exported .safetensors, or SwiFT v1 file"
    )
    parser.add_argument(
        "scans", metavar="SCAN", nargs="+", help="NIfTI file, folder, BIDS derivatives, store, or STORE:SCAN_ID"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz|.parquet")
    parser.add_argument("--layer", default="last", help="last (default), stage1, stage2, ..., or all")
    parser.add_argument("--per", choices=tuple(PLACE), default="scan", help="what a row stands for (default: scan)")
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="clips at once (default: 4)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    set_up_logging()
    status: list[int] = []
    reported(lambda: status.append(run(options)))
    sys.exit(status[0])


if __name__ == "__main__":
    main()
