"""Measuring memory where a CPU can tell: what autograd keeps, and every storage that lives, byte by byte.

Fake tensors (torch's own) have shapes, devices and storages but no memory, so 14.5B parameters can be measured here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swift.config.schema import ModelConfig
from swift.models.autoencoder import MaskedAutoencoder, reconstruction_loss, rows_loss
from swift.models.visible import VisibleAutoencoder, hidden_loss
from swift.models.visible_frames import FrameAutoencoder, frames_loss
from swift.parallel.recompute import recomputing

Volume = tuple[int, int, int, int]


class Live(TorchDispatchMode):
    """Bytes of all storages made under this mode that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now)
        return out


class Storages(TorchDispatchMode):
    """As Live, with the sizes that storages have now: fully_shard empties and fills those of gathered weights."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def bytes(self) -> int:
        """Of all storages that are alive."""
        there = [storage for ref in self._held.values() if (storage := ref()) is not None]
        return sum(storage.nbytes() for storage in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
                storage = local.untyped_storage()
                self._held[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.bytes())
        return out


def on_meta(cfg: ModelConfig, volume: Volume) -> MaskedAutoencoder:
    """The model without memory; not to be called under FakeTensorMode, which refuses numbers read from tensors."""
    with torch.device("meta"):
        return MaskedAutoencoder(cfg, volume[:3], volume[3])


def fill(model: MaskedAutoencoder, device: str, dtype: torch.dtype) -> MaskedAutoencoder:
    """Give a model on the meta device empty weights; under FakeTensorMode still no memory."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                module._parameters[name] = nn.Parameter(empty)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device=device)
    return model


def inputs(model: MaskedAutoencoder, volume: Volume, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A clip, its token mask and which voxels count."""
    x = torch.empty(1, 1, *volume, device=device, dtype=dtype)
    mask = torch.empty(1, *model.encoder.grids[0], device=device, dtype=torch.bool)
    return x, mask, torch.empty(1, *volume, device=device, dtype=torch.bool)


def checkpoint_blocks(model: MaskedAutoencoder, how: str) -> None:
    """Recompute blocks as training does; `how` is none, selective or block."""
    for block in model.encoder.blocks():
        if how != "none":
            block.forward = recomputing(block.forward, how)


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps of `run`, each once, without weights and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # or an address might be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(run())
    return sum(sizes.values())


def kept_by(
    cfg: ModelConfig,
    volume: Volume,
    dtype: torch.dtype,
    loss: str = "l1",
    brain: Tensor | None = None,
    rows: int | None = None,
) -> int:
    """What a real forward pass on this CPU keeps. rows: Predict so many patches alone, as training on brain tokens."""
    model = fill(on_meta(cfg, volume), "cpu", dtype)
    x, mask, counted = inputs(model, volume, "cpu", dtype)
    if rows is None:
        return saved_bytes(lambda: reconstruction_loss(model(x, mask, brain), x, counted, loss), model)
    chosen, where = torch.arange(rows), model.encoder.token_sets(brain, x)
    assert brain is not None
    assert where is not None

    def run() -> Tensor:
        return rows_loss(model(x, mask, brain, None, chosen), x, brain, chosen, where[0], cfg.patch_size, loss)

    return saved_bytes(run, model)


def kept_by_visible(model: VisibleAutoencoder, loss: str = "l1") -> int:
    """What a real forward pass of task.hidden=drop on this CPU keeps of one clip."""
    units = model.units
    x = torch.zeros(1, 1, *units.volume, dtype=next(model.parameters()).dtype)
    brain = torch.ones(1, *units.volume[:3], dtype=torch.bool)
    shown = torch.arange(units.shown).unsqueeze(0)
    return saved_bytes(lambda: hidden_loss(units, model(x, shown), x, brain, shown, loss), model)


def kept_by_frames(model: FrameAutoencoder, loss: str = "l1") -> int:
    """What a real forward pass of task.hidden=drop task.mask_kind=frames on this CPU keeps of one clip."""
    units = model.units
    x = torch.zeros(1, 1, *units.volume, dtype=next(model.parameters()).dtype)
    brain = torch.ones(1, *units.volume[:3], dtype=torch.bool)
    shown = torch.arange(units.shown).unsqueeze(0)
    return saved_bytes(lambda: frames_loss(units, model(x, shown), x, brain, shown, loss), model)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    assert mask is None, "this kernel takes none"
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False, False, scale=scale)[0]


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """bf16 autocast of CUDA with its flash attention, for fake tensors on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", _flash):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
        torch.clear_autocast_cache()


def kept_by_gpu_autocast(cfg: ModelConfig, volume: Volume) -> int:
    """What a forward pass under Lightning's bf16-mixed on a GPU keeps, weights' bf16 copies included."""
    model = on_meta(cfg, volume)
    with FakeTensorMode():
        fill(model, "cuda", torch.float32)
        x, mask, counted = inputs(model, volume, "cuda", torch.float32)
        with gpu_autocast():
            return saved_bytes(lambda: reconstruction_loss(model(x, mask), x, counted, "l1"), model)


def peak_of_step(cfg: ModelConfig, volume: Volume, dtype: torch.dtype, checkpointing: str) -> int:
    """Peak bytes of a forward and backward pass above weights, buffers and batch: activations and gradients.

    Layers take all rows at once, as on a GPU.
    """
    model = on_meta(cfg, volume)
    with FakeTensorMode(), mock.patch("swift.models.pieces.PIECE_BYTES", 1 << 60):
        live = Live()
        with live:
            fill(model, "cpu", dtype)
            checkpoint_blocks(model, checkpointing)
            x, mask, counted = inputs(model, volume, "cpu", dtype)
            before = live.now - counted.untyped_storage().nbytes()
            reconstruction_loss(model(x, mask), x, counted, "l1").backward()
            return live.peak - before
