"""How much of a pre-trained encoder a task changes: which parameters train, low-rank changes, rates by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from swift.config.schema import TaskConfig
from swift.models.init import ZERO, Init

if TYPE_CHECKING:
    from swift.models.encoder import SwinEncoder

LORA_TARGETS = r".*\.fn\.(qkv|proj)"
"""The linear maps of the attentions; those of an MLP are named fc1 and fc2."""
_BASE = ".base_layer."
_LORA = re.compile(r"\.lora_[AB]\.default\.")


def adapt(encoder: SwinEncoder, task: TaskConfig) -> None:
    """Freeze what `task.adapt` leaves as it is, in place; lora puts low-rank changes beside the attentions' maps."""
    if task.adapt in ("scratch", "full"):
        encoder.norm.requires_grad_(encoder.cfg.final_norm)
        return
    if task.adapt == "lora":
        _add_lora(encoder, task)
        return
    encoder.requires_grad_(False)
    if task.adapt == "last_block":
        encoder.blocks()[-1].requires_grad_(True)
        # It exists for v1's checkpoints too, where no loss reaches it.
        encoder.norm.requires_grad_(encoder.cfg.final_norm)


def _add_lora(encoder: SwinEncoder, task: TaskConfig) -> None:
    """Low-rank adaptation (Hu et al. 2021) by peft, which freezes the rest."""
    # Takes seconds: only where it is asked for.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=task.lora_rank, lora_alpha=task.lora_alpha, target_modules=LORA_TARGETS, lora_dropout=0.0)  # type: ignore[arg-type]  # peft takes any number
    inject_adapter_in_model(config, encoder)


def lora_initial_values(model: nn.Module) -> dict[str, Init]:
    """How the low-rank changes begin: A with the variance of torch's linear maps, B as zeros: nothing is changed."""
    found = {}
    for path, module in model.named_modules():
        # The shape of a weight is no help: under ZeRO 3 it is an empty vector.
        if isinstance(module, nn.Linear) and ".lora_A." in path:
            found[f"{path}.weight"] = Init(True, 1 / math.sqrt(3 * module.in_features))
        elif isinstance(module, nn.Linear) and ".lora_B." in path:
            found[f"{path}.weight"] = ZERO
    return found


def plain_name(name: str) -> str:
    """A parameter's name in a model without low-rank changes."""
    return name.replace(_BASE, ".")


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to a low-rank change."""
    return _LORA.search(name) is not None


def keep_frozen_still(encoder: SwinEncoder) -> None:
    """Put what trains nothing into eval mode: it drops nothing."""
    if not _trains(encoder):
        encoder.eval()
        return
    if not _trains(encoder.patch_embed):
        encoder.dropout.eval()
    for block in encoder.blocks():
        if not _trains(block):
            block.eval()


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def depth_rates(names: Iterable[str], encoder: SwinEncoder, decay: float) -> dict[str, float]:
    """Factor on the learning rate of every parameter: 1 for the head, `decay` for each step down (Clark et al. 2020).

    The steps are the head with the final norm, then the blocks from the last to the first (a merging and a position
    table count with the block before and after them), then the patch embedding.

    Args:
        names: Of the parameters of a model with the parts `encoder` and `head`.
        encoder: Which blocks there are.
        decay: In (0, 1].
    """
    depths = encoder.cfg.depths
    first = [sum(depths[:stage]) for stage in range(len(depths))]
    top = sum(depths) + 1

    def steps_up(name: str) -> int:
        if not name.startswith("encoder.") or name.startswith("encoder.norm."):
            return top
        if (match := re.match(r"encoder\.stages\.(\d+)\.(\w+)(?:\.(\d+))?", name)) is None:
            return 0
        stage, part, block = int(match[1]), match[2], match[3]
        if part == "blocks":
            return 1 + first[stage] + int(block)
        return 1 + first[stage] + (depths[stage] - 1 if part == "downsample" else 0)

    return {name: decay ** (top - steps_up(name)) for name in names}
