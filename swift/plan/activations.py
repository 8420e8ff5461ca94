"""What the backward pass of masked pre-training keeps, in closed form: bytes of one clip.

Every tensor that autograd holds between forward and backward is counted, once for each storage. The tests measure the
same with `torch.autograd.graph.saved_tensors_hooks`.

Shapes: M tokens, C channels, H hidden channels of an MLP; all of one clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from swift.plan.geometry import Block, Branch, Geometry, Stage

CHECKPOINTING = ("none", "selective", "block")


@dataclass(frozen=True)
class Widths:
    """Bytes an element of what is kept.

    Args:
        name: fp32 | bf16: weights and activations in bf16, as DeepSpeed and fully_shard run | autocast: weights in
            fp32, matrix products in bf16, norms in fp32, as Lightning's bf16-mixed runs on a GPU.
        kernel: on CUDA and ROCm, where `swift.models.window_kernel` computes the windows that fit it.
    """

    name: str
    kernel: bool = False

    def __post_init__(self) -> None:
        assert self.name in ("fp32", "bf16", "autocast"), self.name

    @property
    def product(self) -> int:
        """Operands of matrix products."""
        return 4 if self.name == "fp32" else 2

    @property
    def stream(self) -> int:
        """The residual stream, what norms read and what LayerScale multiplies."""
        return 2 if self.name == "bf16" else 4

    @property
    def statistic(self) -> int:
        """Mean and deviation of a norm."""
        return 4


def norm_bytes(rows: int, width: int, widths: Widths) -> int:
    """Input and statistics of a LayerNorm."""
    return rows * (width * widths.stream + 2 * widths.statistic)


def branch_bytes(branch: Branch, widths: Widths) -> int:
    """Everything a residual branch keeps, its input included."""
    elements = branch.tokens * branch.width
    total = norm_bytes(branch.tokens, branch.width, widths)
    total += elements * widths.product if branch.scaled else 0
    if not branch.is_attention:
        return total + (elements + 2 * branch.tokens * branch.hidden) * widths.product
    # Input and result of the map to queries, keys and values, and attention's output.
    if widths.kernel and branch.fits_kernel:
        return total + 5 * elements * widths.product
    # Rotated queries and keys are new tensors while the values keep the whole result of the map; the output once more
    # where the groups are concatenated. The same is taken for larger windows on a GPU.
    kept = 1 + 3 + (2 if branch.rotary else 0) + 1 + (1 if len(branch.windows) > 1 else 0)
    return total + kept * elements * widths.product + branch.tokens * branch.heads * 4


def input_bytes(block: Block, widths: Widths) -> int:
    """The input of a block."""
    return block.tokens * block.width * widths.stream


def product_bytes(block: Block, widths: Widths) -> int:
    """What selective checkpointing keeps besides the input: results of matrix products and of attention."""
    total = 0
    for branch in block.branches:
        if branch.is_attention:
            total += 5 * branch.tokens * branch.width * widths.product
            total += 0 if widths.kernel and branch.fits_kernel else branch.tokens * branch.heads * 4
        else:
            total += branch.tokens * (branch.hidden + branch.width) * widths.product
    return total


def merging_bytes(stage: Stage, widths: Widths) -> int:
    """The norm over eight neighbours and the map after it."""
    rows, width = stage.merged_rows, 8 * stage.width
    return norm_bytes(rows, width, widths) + rows * width * widths.product if rows else 0


def embedding_bytes(geometry: Geometry, widths: Widths) -> int:
    """Patches, the norm of the patch embedding, and the mask."""
    # With task.hidden=drop there is no mask: hidden patches are left out.
    total = geometry.tokens * geometry.patch_voxels * widths.product
    total += geometry.tokens if geometry.cells is None else 0
    return total + (norm_bytes(geometry.tokens, geometry.stages[0].width, widths) if geometry.patch_norm else 0)


def decoder_bytes(geometry: Geometry, widths: Widths) -> int:
    """The decoder, with the final norm of the encoder and the features of all stages."""
    last = geometry.stages[-1]
    total = norm_bytes(last.tokens, last.width, widths) if geometry.final_norm else 0
    if geometry.decoder == "linear":
        return total + last.tokens * (1 + geometry.patch[3]) * last.width * widths.product
    cells = geometry.cells
    for stage in geometry.stages[0 if cells is None else cells.first :]:
        total += norm_bytes(stage.tokens, stage.width, widths) + stage.tokens * stage.width * widths.product
    rows = geometry.head_rows
    if cells is not None:
        total += sum(branch_bytes(branch, widths) for block in cells.blocks for branch in block.branches)
        rows = cells.rows
    total += norm_bytes(rows, geometry.decoder_dim, widths)
    return total + rows * geometry.decoder_dim * (widths.stream + widths.product)


def head_bytes(geometry: Geometry, widths: Widths) -> int:
    """A dense head with the final norm of the encoder, and the error of its prediction in fp32."""
    last, head = geometry.stages[-1], geometry.head
    assert head is not None
    total = norm_bytes(last.tokens, last.width, widths) if geometry.final_norm else 0
    total += head.stream * widths.stream + head.operands * widths.product + head.statistics * widths.statistic
    return total + 4 * head.outputs


def predicted_voxels(geometry: Geometry) -> int:
    """Voxels of a clip that are predicted, all frames."""
    cells = geometry.cells
    if geometry.hidden is not None:
        return geometry.head_rows * geometry.patch_voxels
    return geometry.voxels if cells is None else cells.predicted


def loss_bytes(geometry: Geometry, loss: str) -> int:
    """Which voxels count, and in fp32 the difference of prediction and target (l1), or both of them (others)."""
    kept = geometry.voxels if loss == "l1" else geometry.padded_voxels + geometry.voxels
    if geometry.cells is not None or geometry.hidden is not None:
        # Of the hidden cells or patches alone, their gradient.
        return predicted_voxels(geometry) * 4
    return kept * 4 + geometry.voxels


@dataclass(frozen=True)
class Part:
    """A part of the backward pass, in bytes of one clip."""

    name: str
    kept: int
    """Held since the forward pass, or for one branch of a block since the block was made again."""
    working: int
    """Gradients of activations inside the part at its worst moment."""
    parameters: int
    early: float = 0.0
    """How much of its own weights' gradients exists at that moment."""


@dataclass(frozen=True)
class Segment:
    """Parts that are checkpointed together: `kept` is held since the forward pass, the parts' bytes are made again."""

    parts: tuple[Part, ...]
    kept: int


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may peak."""

    name: str
    activations: int
    """Bytes of one clip."""
    gradients: int
    """Parameters whose gradients of this micro-batch exist."""
    casts: int
    """Parameters whose bf16 copies exist (autocast only)."""


def branch_part(name: str, branch: Branch, widths: Widths) -> Part:
    """A branch as a part. Seen in traces of backward passes: the gradient of the stream, and of the widest tensors."""
    elements = branch.tokens * branch.width
    if branch.is_attention:
        working, early = 4 * elements * widths.stream, 0.25
    else:
        working, early = elements * widths.stream + branch.tokens * branch.hidden * widths.product, 0.5
    return Part(name, branch_bytes(branch, widths), working, branch.parameters, early)


def maps_bytes(geometry: Geometry) -> int:
    """Trained maps, in float32: them by patch, the visible voxels, and each frame's Gram matrix twice."""
    if not geometry.maps_trained:
        return 0
    frames = geometry.volume[3]
    return 4 * (geometry.space * (geometry.maps + frames) + 2 * frames * geometry.maps**2)


def segments(geometry: Geometry, widths: Widths, checkpointing: str, loss: str) -> list[Segment]:
    """The forward pass in order, as what is kept of it."""

    def alone(part: Part) -> Segment:
        return Segment((part,), part.kept)

    first = geometry.stages[0]
    stream = first.tokens * first.width * widths.stream
    parameters = geometry.parameters
    before = parameters["patch embedding"] + parameters["mask token, positions"]
    found = [alone(Part("patch embedding", embedding_bytes(geometry, widths), 2 * stream, before))]
    for index, stage in enumerate(geometry.stages, start=1):
        for number, block in enumerate(stage.blocks, start=1):
            name = f"stage {index}, block {number}"
            parts = tuple(branch_part(name, branch, widths) for branch in block.branches)
            if checkpointing == "none":
                found += [alone(part) for part in parts]
            else:
                products = product_bytes(block, widths) if checkpointing == "selective" else 0
                found.append(Segment(parts, input_bytes(block, widths) + products))
        if stage.merged_rows:
            working = 2 * stage.merged_rows * 8 * stage.width * widths.stream
            part = Part(f"merging {index}", merging_bytes(stage, widths), working, stage.merging_parameters)
            found.append(alone(part))
    after = parameters["final norm"] + parameters.get("maps", 0)
    if geometry.head is not None:
        kept = head_bytes(geometry, widths) + maps_bytes(geometry)
        # The gradient of the cells' channels, before and after the widest convolution.
        working = 2 * geometry.head.stream // 4 * widths.stream
        found.append(alone(Part("head and loss", kept, working, after + parameters["head"])))
        return found
    kept = decoder_bytes(geometry, widths) + loss_bytes(geometry, loss) + maps_bytes(geometry)
    found.append(
        alone(Part("decoder and loss", kept, 2 * predicted_voxels(geometry) * 4, after + parameters["decoder"]))
    )
    return found


def moments(geometry: Geometry, widths: Widths, checkpointing: str, loss: str) -> list[Moment]:
    """The worst moment of every part of the backward pass, last part first.

    Gradients of weights grow while activations are let go, so the peak may lie anywhere.
    """
    assert checkpointing in CHECKPOINTING, checkpointing
    order = segments(geometry, widths, checkpointing, loss)
    held, done, casts = sum(segment.kept for segment in order), 0, geometry.total_parameters
    found = []
    for segment in reversed(order):
        again = sum(part.kept for part in segment.parts)
        checkpointed = len(segment.parts) > 1 or again != segment.kept
        now = held - segment.kept + again
        mine = sum(part.parameters for part in segment.parts)
        for part in reversed(segment.parts):
            early = round(part.early * part.parameters)
            found.append(Moment(part.name, now + part.working, done + early, mine if checkpointed else casts))
            now -= part.kept
            done += part.parameters
            casts -= part.parameters
            mine -= part.parameters
        held -= segment.kept
    assert held == 0
    assert done == geometry.total_parameters
    return found


def kept_bytes(geometry: Geometry, widths: Widths, checkpointing: str, loss: str) -> int:
    """What one clip keeps between its forward and its backward pass."""
    return sum(segment.kept for segment in segments(geometry, widths, checkpointing, loss))
