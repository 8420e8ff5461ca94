"""What the backward pass of masked pre-training keeps, in closed form: bytes of one clip.

Counted is every tensor autograd holds between forward and backward, once for each storage. Measured beside it by the
tests with `torch.autograd.graph.saved_tensors_hooks`.

Shapes: M tokens, C channels, H hidden channels of an MLP; all of one clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from swift.parallel.geometry import Block, Branch, Geometry, Stage

CHECKPOINTING = ("none", "selective", "block")


@dataclass(frozen=True)
class Widths:
    """Bytes an element of what is kept.

    Args:
        name: fp32 | bf16: weights and activations in bf16, as DeepSpeed and fully_shard run | autocast: weights in
            fp32, matrix products in bf16, norms in fp32, as Lightning's bf16-mixed runs on a GPU.
    """

    name: str

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
    total += elements * widths.stream if branch.scaled else 0
    if not branch.is_attention:
        return total + (elements + 2 * branch.tokens * branch.hidden) * widths.product
    # Input and result of the map to queries, keys and values; rotated queries and keys are new tensors while the values
    # keep the whole result; attention's output, and once more where the groups are concatenated.
    kept = 1 + 3 + (2 if branch.rotary else 0) + 1 + (1 if len(branch.windows) > 1 else 0)
    return total + kept * elements * widths.product + branch.tokens * branch.heads * 4


def block_bytes(block: Block, widths: Widths) -> int:
    """Everything a block keeps without checkpointing, its input included."""
    return sum(branch_bytes(branch, widths) for branch in block.branches)


def input_bytes(block: Block, widths: Widths) -> int:
    """The input of a block."""
    return block.tokens * block.width * widths.stream


def merging_bytes(stage: Stage, widths: Widths) -> int:
    """The norm over eight neighbours and the map after it."""
    rows, width = stage.merged_rows, 8 * stage.width
    return norm_bytes(rows, width, widths) + rows * width * widths.product if rows else 0


def embedding_bytes(geometry: Geometry, widths: Widths) -> int:
    """Patches, the norm of the patch embedding, and the mask."""
    total = geometry.padded_voxels * widths.product + geometry.tokens
    return total + (norm_bytes(geometry.tokens, geometry.stages[0].width, widths) if geometry.patch_norm else 0)


def decoder_bytes(geometry: Geometry, widths: Widths) -> int:
    """The decoder, with the final norm of the encoder and the features of all stages."""
    last = geometry.stages[-1]
    total = norm_bytes(last.tokens, last.width, widths) if geometry.final_norm else 0
    if geometry.decoder == "linear":
        return total + last.tokens * (1 + geometry.patch[3]) * last.width * widths.product
    for stage in geometry.stages:
        total += norm_bytes(stage.tokens, stage.width, widths) + stage.tokens * stage.width * widths.product
    hidden = geometry.tokens * geometry.decoder_dim
    total += norm_bytes(geometry.tokens, geometry.decoder_dim, widths)
    return total + hidden * (widths.stream + widths.product)


def loss_bytes(geometry: Geometry) -> int:
    """Prediction and target in fp32 and which voxels count; the target is the batch itself."""
    return (geometry.padded_voxels + geometry.voxels) * 4 + geometry.voxels
