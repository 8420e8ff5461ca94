"""A counter-based hash on tensors: random numbers without a state, the same on every device and for every cut."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""The step of SplitMix64 (Steele et al. 2014)."""


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014) on int64, which wraps around; logical shifts by masking."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))
