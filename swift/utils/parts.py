"""One part of a long list of scans: of a job array, of the ranks of a launcher, or as an option says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from swift.utils.errors import UserError

HELP = (
    "only part I of N of the scans (I from 1 to N), or `array`: by the place in a Slurm job array (default: all, "
    "shared out among the ranks that srun, torchrun or mpirun started)"
)


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0) of `count` parts of a list, which are as even as can be and keep its order."""

    number: int = 0
    count: int = 1

    def of(self, length: int) -> range:
        """Places in a list of `length` items."""
        return range(self.number * length // self.count, (self.number + 1) * length // self.count)

    def among(self, rank: int, world: int) -> Part:
        """The share of one of `world` ranks that work on this part together."""
        return Part(self.number * world + rank, self.count * world)

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.count}"


def parse_part(text: str | None, env: Mapping[str, str] = os.environ) -> Part:
    """The part that `--part` means; None: the whole.

    An array's variables count only when asked for: points of an array may as well be jobs of different lists.

    Raises:
        UserError: not I/N, or `array` outside of a Slurm job array.
    """
    if text is None:
        return Part()
    if text == "array":
        try:
            task, first, last, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
        except (KeyError, ValueError) as error:
            raise UserError("--part array: this is no point of a Slurm job array; give I/N, such as 1/4") from error
        step = (last - first) // (count - 1) if count > 1 else 1
        if step * (count - 1) != last - first or (task - first) % step:
            raise UserError("--part array: the array's points are not evenly numbered; use --array=1-N, or --part I/N")
        return Part((task - first) // step, count)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text}: legal are I/N with I from 1 to N, such as 1/4, and array")
    return Part(int(match[1]) - 1, int(match[2]))
