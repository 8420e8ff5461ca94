"""Kernels and bytes of a training step, counted without a GPU: `python -m tests.bench.counting`.

The step runs on the meta device, which has shapes and no values: nothing is computed, and a step that reads a value on
the host (and would wait for a GPU there) raises. The rules:

- every operator that reaches the dispatcher and whose result is not a view of an input is one kernel; making memory
  without filling it is none; an operator on host tensors is none;
- fused attention is one kernel forward and three backward (the sums of gradient times output, the main one, and the one
  that converts the gradient of the queries), as PyTorch's CUDA flash attention launches them;
- an operator over a list of tensors (foreach, fused) is as many launches as CUDA's multi_tensor_apply makes: a launch
  takes up to 110, 64, 48, 36 or 30 tensors for 1 to 5 lists and up to 320 chunks of 65,536 elements;
- bytes are what an operator reads and writes, each element once (an expanded tensor by its own elements); those of
  matrix products and of fused attention are left out.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.compose import composed
from swift.config.schema import Config
from swift.models.attention import METHODS, WindowAttention
from swift.models.autoencoder import reconstruction_loss
from swift.parallel.recompute import prepare_blocks
from swift.train import optim
from swift.train.optim import build_optimizer
from swift.train.pretrain import PretrainModule
from swift.utils.entry import reported

MAX_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
MAX_CHUNKS, CHUNK = 320, 65536
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_local_scalar_dense",
}
WRITES_ONLY = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
"""In place, without reading what was there."""


@dataclass
class Count:
    """What a piece of work launches and moves.

    Attributes:
        kernels: By operator.
        bytes: By operator, those of matrix products and attention under their names in `products`.
        products: Bytes of matrix products and attention.
        most_rows: Most batch rows (product of all dimensions before heads) of one call of fused attention.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    most_rows: int = 0

    def copy(self) -> Count:
        """As it is now."""
        return Count(Counter(self.kernels), Counter(self.bytes), Counter(self.products), self.most_rows)

    def __sub__(self, before: Count) -> Count:
        """What came after `before`."""
        parts = zip((self.kernels, self.bytes, self.products), (before.kernels, before.bytes, before.products))
        return Count(*(now - then for now, then in parts), self.most_rows)

    @property
    def launches(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())

    @property
    def moved(self) -> int:
        """Bytes outside matrix products."""
        return sum(self.bytes.values())


def launches(sizes: Iterable[int], lists: int) -> int:
    """Launches of multi_tensor_apply over tensors of these sizes, in `lists` lists of the same shapes.

    As in ATen's MultiTensorApply.cuh: chunks are added one by one, and a launch is made when its table of tensors is
    full (with the last chunk of its last tensor), when its table of chunks is full, and at the end. A tensor of which
    chunks are left over takes the first place of the next table.
    """
    most = MAX_TENSORS[lists]
    made, tensors, chunks = 0, 0, 0
    for size in (size for size in sizes if size):
        tensors += 1
        parts = math.ceil(size / CHUNK)
        for part in range(parts):
            chunks += 1
            last = part == parts - 1
            if (tensors == most and last) or chunks == MAX_CHUNKS:
                made, chunks = made + 1, 0
                tensors = 0 if last else 1
    return made + (chunks > 0)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors among arguments, lists looked into."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    return []


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has, expanded axes once."""
    count = math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride) if tensor.dim() else 1
    return count * tensor.element_size() if tensor.numel() else 0


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Operators(TorchDispatchMode):
    """Counts every operator below autograd."""

    def __init__(self, count: Count, device: str = "meta") -> None:
        super().__init__()
        self.count, self.device = count, device

    def on_device(self, tensor: Tensor) -> bool:
        """Whether a kernel of the device is needed for it."""
        return tensor.device.type == self.device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs, results = tensors_in([args, kwargs]), tensors_in(out)
        if name in NOTHING or not any(map(self.on_device, inputs + results)):
            return out
        mutable = func._schema.is_mutable
        known = {_storage(tensor) for tensor in inputs}
        if not mutable and results and all(_storage(tensor) in known for tensor in results):
            return out  # a view
        if name.startswith(("_foreach", "_fused")):
            self._lists(name, args, kwargs, results)
            return out
        moved = sum(nbytes(tensor) for tensor in inputs if self.on_device(tensor))
        moved += sum(nbytes(tensor) for tensor in results if self.on_device(tensor))
        if name in WRITES_ONLY:
            moved -= nbytes(args[0])
        self.count.kernels[name] += 1
        fused = name in PRODUCTS or func.namespace == "swift"
        (self.count.products if fused else self.count.bytes)[name] += moved
        return out

    def _lists(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """An operator over lists."""
        lists = [
            value
            for value in (*args, *(kwargs or {}).values())
            if isinstance(value, (list, tuple)) and tensors_in(value)
        ]
        first = tensors_in(lists[0])
        if not any(map(self.on_device, first)):
            return
        mutable = name.endswith("_")
        depth = len(lists) + (0 if mutable else 1)
        written = first
        if name == "_foreach_norm":
            depth = 1
        elif name.startswith("_fused"):
            # Weights, gradients and two moments; the steps go along with them. Gradients are only read.
            depth, written = 4, tensors_in([*lists[:1], *lists[2:4]])
        self.count.kernels[name] += launches([tensor.numel() for tensor in first], depth)
        if name == "_foreach_norm":
            self.count.kernels[name] += math.ceil(len(first) / MAX_TENSORS[1])  # the partial sums of its chunks
        moved = sum(nbytes(tensor) for tensor in tensors_in(lists))
        moved += sum(map(nbytes, written if mutable else results))
        if name in WRITES_ONLY:
            moved -= sum(map(nbytes, first))
        self.count.bytes[name] += moved


class _Attention(torch.autograd.Function):
    """Shapes of fused attention; what it launches is noted, not computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Count) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.count = count
        count.kernels["attention"] += 1
        count.products["attention"] += sum(map(nbytes, (q, k, v, q)))
        return _like(q, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        ctx.count.kernels["attention backward"] += 3
        ctx.count.products["attention backward"] += sum(map(nbytes, (q, k, v, q, q, q, k, v)))
        return _like(q, q), _like(k, k), _like(v, v), None


def _like(q: Tensor, v: Tensor) -> Tensor:
    """Memory of (rows, heads, tokens, head_dim) as CUDA's flash attention lays it out: heads inside tokens."""
    rows, heads, tokens, _ = q.shape
    return q.new_empty(rows, tokens, heads, v.shape[-1]).transpose(1, 2)


class FusedAttention(TorchFunctionMode):
    """Takes the place of scaled_dot_product_attention, which has no fused form on the meta device."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.count.most_rows = max(self.count.most_rows, math.prod(args[0].shape[:-3]))
            return _Attention.apply(*args[:3], self.count)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it, torch takes the meta device for one with foreach and fused kernels, as a GPU is."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    names = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    before = [(module, name, getattr(module, name)) for module in (_foreach_utils, optimizer) for name in names]
    for module, name, _ in before:
        setattr(module, name, lambda: ["cuda", "meta"])
    # The product's own list of devices with a fused AdamW.
    before.append((optim, "FUSED_ON", optim.FUSED_ON))
    if "cuda" in optim.FUSED_ON:
        optim.FUSED_ON = (*optim.FUSED_ON, "meta")
    try:
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)


def counted(work: Callable[[], Any]) -> Count:
    """Run a piece of work on the meta device."""
    count = Count()
    with as_on_a_gpu(), FusedAttention(count), Operators(count):
        work()
    return count


def count_step(cfg: Config, clips: int) -> dict[str, Count]:
    """A training step with bf16 weights and stream, by phase: forward (mask and loss with it), backward, clip, step."""
    meta = torch.device("meta")
    module = PretrainModule(cfg, empty=True)
    module.model.bfloat16()
    grid = cfg.data.grid
    batch = {
        "bold": torch.empty(clips, 1, *grid, cfg.data.frames, device=meta),
        "brain": torch.empty(clips, *grid, dtype=torch.bool, device=meta),
        "sample_id": torch.empty(clips, dtype=torch.int64, device=meta),
        "valid": torch.empty(clips, dtype=torch.bool, device=meta),
    }
    prepare_blocks(module.model, cfg.parallel)
    with as_on_a_gpu():
        optimizer = build_optimizer(module.model, cfg.optimizer, module.widths)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss: list[Tensor] = []

    def forward() -> None:
        prediction, mask = module.reconstruct(batch)
        counted_voxels = module.counted_voxels(batch, mask)
        loss.append(reconstruction_loss(prediction, batch["bold"], counted_voxels, cfg.task.loss))

    found = Count()
    with as_on_a_gpu(), FusedAttention(found), Operators(found):
        forward()
        forward_only = found.copy()
        loss[0].backward()
    phases = {"forward": forward_only, "backward": found - forward_only}
    phases["clip"] = counted(lambda: torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.clip_norm))
    with as_on_a_gpu():
        optimizer.step()  # makes its moments
    phases["step"] = counted(optimizer.step)
    return phases


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.counting", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="806m")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--top", type=int, default=12, help="operators shown of each phase")
    parser.add_argument("--method", choices=METHODS, default="kernel", help="of attention; on a GPU the kernel")
    parser.add_argument("overrides", nargs="*", help="settings, as of swift.train")
    options = parser.parse_args()
    WindowAttention.method = options.method
    base = [f"model={options.model}", "data=store", "data.path=none", "parallel=zero1"]
    cfg = composed([*base, *options.overrides])[0]
    phases = count_step(cfg, options.clips)
    for name, count in phases.items():
        print(f"{name:<9} {count.launches:6} kernels {count.moved / 1e9:8.1f} GB outside products")
        for operator, number in count.kernels.most_common(options.top):
            print(f"            {number:6} {operator:<40} {count.bytes[operator] / 1e9:8.1f} GB")
    total, passes = sum(c.launches for c in phases.values()), [phases["forward"], phases["backward"]]
    print(f"a step: {total} kernels, {sum(c.launches for c in passes)} of them in the passes")
    print(f"bytes outside products: {sum(c.moved for c in phases.values()) / 1e9:.1f} GB,", end=" ")
    print(f"{sum(c.moved for c in passes) / 1e9:.1f} of them in the passes")
    print(f"most rows of one attention: {phases['forward'].most_rows}")


if __name__ == "__main__":
    reported(main)
