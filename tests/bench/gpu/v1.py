"""SwiFT v1's own encoder, from a folder that --v1 names, beside model=v1 with the same weights.

The folder holds swin4d_transformer_ver7.py and patchembedding.py of Transconnectome/SwiFT at 0b07cb1 (in that
repository: project/module/models). Their code is imported from there, never copied; it needs monai and einops.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.encoder import SwinEncoder
from swift.models.v1 import load_v1
from swift.utils.errors import UserError
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import settings
from tests.bench.gpu.measure import kernels, milliseconds, peak_gib

FILES = ("swin4d_transformer_ver7.py", "patchembedding.py")
PACKAGE = "swift_v1_files"
COLUMNS = (
    ("v1_ms", "9.1f"),
    ("swift_ms", "9.1f"),
    ("faster", "7.2f"),
    ("v1_gib", "7.2f"),
    ("swift_gib", "7.2f"),
    ("v1_kernels", "7d"),
    ("swift_kernels", "7d"),
    ("difference", "9.1e"),
)


def check(folder: Path | None) -> Path:
    """The folder, if both files are there.

    Raises:
        UserError: it is not given, or a file is missing.
    """
    if folder is None:
        raise UserError("part v1 needs --v1 FOLDER with SwiFT v1's model files: " + " and ".join(FILES))
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {' and '.join(missing)} is not there; SwiFT v1 has it in project/module/models")
    return folder


def load(folder: Path) -> Any:
    """The module with SwiFT v1's encoder."""
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{Path(FILES[0]).stem}")


@contextlib.contextmanager
def quiet(gpu: bool) -> Iterator[None]:
    """Its prints are kept back; on a CPU its marks for NVIDIA's profiler, which needs CUDA, do nothing."""
    nvtx: Any = torch.cuda.nvtx
    before = nvtx.range_push, nvtx.range_pop
    if not gpu:
        nvtx.range_push = nvtx.range_pop = lambda *_: 0
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nvtx.range_push, nvtx.range_pop = before


def pair(folder: Path | None, model: ModelConfig, grid: Sequence[int], frames: int) -> tuple[nn.Module, SwinEncoder]:
    """Both encoders with the same weights, on the CPU: SwiFT v1's own, and ours."""
    with quiet(gpu=False):
        theirs = load(check(folder)).SwinTransformer4D(
            img_size=(*grid, frames),
            in_chans=1,
            embed_dim=model.embed_dim,
            window_size=tuple(model.window),
            first_window_size=tuple(model.window),
            patch_size=tuple(model.patch_size),
            depths=list(model.depths),
            num_heads=list(model.num_heads),
            # As in its published training: the last stage is never shifted.
            last_layer_full_MSA=True,
        )
    ours = SwinEncoder(model, grid, frames)
    load_v1(ours, theirs.state_dict())
    return theirs.train(), ours.train()


def works(bench: Bench, model: nn.Module, x: Tensor, last: Callable[[Any], Tensor], narrow: bool) -> dict[str, Any]:
    """A forward pass without gradients, and a step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def out() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=narrow):
            return last(model(x))

    def forward() -> Tensor:
        with torch.no_grad():
            return out()

    def step() -> None:
        out().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"forward": forward, "step": step}


def one(bench: Bench, clips: int, kind: str, narrow: bool) -> Row:
    """A row."""
    cfg = settings(bench, "v1")
    theirs, ours = (m.to(bench.device) for m in pair(bench.v1, cfg.model, cfg.data.grid, cfg.data.frames))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clips, 1, *cfg.data.grid, cfg.data.frames, generator=generator).to(bench.device)
    row: Row = {}
    with quiet(bench.gpu):
        both = {
            "v1": works(bench, theirs, x, lambda y: y, narrow),
            # (B, x, y, z, t, C) -> as v1 has it: (B, C, x, y, z, t)
            "swift": works(bench, ours, x, lambda y: y[-1].movedim(-1, 1), narrow),
        }
        a, b = (found["forward"]().float() for found in both.values())
        row["difference"] = float((a - b).norm() / a.norm())
        for name, found in both.items():
            row[f"{name}_ms"] = milliseconds(found[kind], bench.device, 0.05 if bench.small else 1.0)
            row[f"{name}_gib"] = peak_gib(found[kind], bench.device)
            row[f"{name}_kernels"] = kernels(found[kind], bench.device).count
    row["faster"] = row["v1_ms"] / row["swift_ms"]
    return row


def cases(bench: Bench) -> list[Case]:
    """8 clips first: that is the target.

    Raises:
        UserError: --v1 is missing, or a file in it.
    """
    check(bench.v1)
    return [
        Case(
            f"{clips} clips {kind} {'bf16 autocast' if narrow else 'fp32'}",
            lambda k=(clips, kind, narrow): one(bench, *k),  # type: ignore[misc]
        )
        for narrow in ((False,) if bench.small else (True, False))
        for clips in ((1,) if bench.small else (8, 1))
        for kind in ("step", "forward")
    ]


PART = Part("SwiFT v1's own code (--v1 FOLDER) beside model=v1, the same weights", cases, COLUMNS)
