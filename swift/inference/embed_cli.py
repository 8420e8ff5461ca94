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
from typing import Any

from swift.inference.embedding_table import PLACE, check_out, read_features
from swift.inference.options import add_model_options, fitting_of
from swift.parallel.ranks import current_place
from swift.utils import parts as parts_of
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError
from swift.utils.parts import Part, parse_part

log = logging.getLogger("swift.embed")

AHEAD_OF_A_GPU = 2
"""Scans that are made ready while a GPU encodes another; on a CPU the encoder has all cores."""


def run(options: argparse.Namespace) -> int:
    """Embed the scans of the command line, or this process's part of them; 1 where some failed, else 0."""
    check_out(options.out)
    if (options.ahead or 0) < 0:
        raise UserError(f"--ahead {options.ahead}: must not be negative")
    if options.fingerprint and options.per != "scan":
        raise UserError(f"--fingerprint: needs a row a scan, not --per {options.per}")
    ranks = current_place()
    part = parse_part(options.part).among(ranks.rank, ranks.world)
    if ranks.problem and ranks.world == 1:
        raise UserError(ranks.problem)
    if part.count == 1 and options.out.exists():
        raise UserError(f"--out {options.out}: exists already")

    from swift.inference.embedding import PER, Embedding
    from swift.inference.embedding_parts import Parts, embed_places
    from swift.inference.fit_scan import find_scans
    from swift.inference.model import fingerprint, load_trained

    began = time.monotonic()
    trained = load_trained(options.model, options.which, options.config)
    fitting = fitting_of(options)
    per = options.per if options.per in PER[:2] else "scan"
    embedding = Embedding(trained, options.layer, per, fitting, options.device, options.batch, ranks.local_rank)
    ahead = options.ahead if options.ahead is not None else AHEAD_OF_A_GPU * (embedding.device.type != "cpu")
    scans = find_scans(options.scans, trained.contract)
    if trained.contract.tr is None:
        log.info("%s does not say which TR it was trained on: the TR of scans is not compared", options.model)
    info = {"model": trained.source, "step": trained.step, "layers": embedding.widths, "per": options.per}
    plan = {"weights": fingerprint(trained), "layer": embedding.layers, "per": options.per, "batch": options.batch}
    plan |= {"device": embedding.device.type, "tr": [options.tr, options.other_tr], "mask": str(options.mask)}
    parts = Parts(options.out, plan, scans)
    if options.out.exists():
        if not parts.written():
            raise UserError(f"--out {options.out}: exists already")
        log.info("%s is complete: nothing is left for part %s", options.out, part)
        return 0
    parts.open()
    todo = parts.todo(part.of(len(scans)))
    if len(todo) < len(part.of(len(scans))):
        log.info("%d of %d scans are embedded already", len(part.of(len(scans))) - len(todo), len(part.of(len(scans))))
    failed = embed_places(scans, todo, embedding, parts, options.quiet, ahead)
    done = parts.finish(options.per, info)
    seconds = time.monotonic() - began
    if done is None:
        _say_part(options, part, len(todo), {scans[place].scan_id: reason for place, reason in failed.items()}, seconds)
        return 1 if failed else 0
    rows, failed = done
    reasons = [{"scan": scans[place].scan_id, "reason": reason} for place, reason in sorted(failed.items())]
    if options.fingerprint and rows:
        from swift.evaluate.fingerprint import fingerprint as known_again

        subjects, features = read_features(options.out)
        info["fingerprint"] = {layer: known_again(values, subjects) for layer, values in features.items()}
    _say(options, info, rows, len(scans), reasons, seconds)
    return 1 if failed else 0


def _say_part(options: argparse.Namespace, part: Part, scans: int, failed: dict[str, str], seconds: float) -> None:
    reasons = [{"scan": scan, "reason": reason} for scan, reason in failed.items()]
    figures = {"out": None, "part": str(part), "scans": scans - len(failed), "failed": reasons}
    if options.json:
        print(json.dumps(figures | {"seconds": round(seconds, 2)}, indent=2))
        return
    print(f"part {part}: {scans - len(failed)} scans, {seconds:.1f} s; the last part to end writes {options.out}")
    if failed:
        print(f"{len(failed)} of {scans} scans failed", file=sys.stderr)


def _say(
    options: argparse.Namespace,
    info: dict[str, Any],
    rows: int,
    scans: int,
    failed: list[dict[str, str]],
    seconds: float,
) -> None:
    out = str(options.out) if rows else None
    figures = {"out": out, **info, "rows": rows, "scans": scans - len(failed), "failed": failed}
    if options.json:
        print(json.dumps(figures | {"seconds": round(seconds, 2)}, indent=2))
        return
    if out:
        widths = ", ".join(f"{name} ({width})" for name, width in info["layers"].items())
        print(f"{out}: {rows} rows, one a {info['per']}; {widths}; {scans - len(failed)} scans, {seconds:.1f} s")
    if found := info.get("fingerprint"):
        from swift.evaluate.fingerprint import text

        print("\n".join(text(of_layer, layer) for layer, of_layer in found.items()))
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
    parser.add_argument(
        "--fingerprint",
        action="store_true",
        help="also say whether scans of one subject are known again, and the test-retest ICC (--per scan)",
    )
    parser.add_argument("--part", metavar="I/N", help=parts_of.HELP)
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="clips at once (default: 4)")
    parser.add_argument(
        "--ahead",
        type=int,
        metavar="N",
        help=f"scans made ready by threads while one is encoded (default: {AHEAD_OF_A_GPU} with a GPU, else 0)",
    )
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
