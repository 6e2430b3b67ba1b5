"""Rotary position embedding (Su et al. 2021), halves layout: dimension i is paired with i + head_dim / 2."""

from __future__ import annotations

import torch


def rope_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, amplitudes: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of one step, shared by all its layers.

    positions: [tokens] int64. frequencies: [head_dim] float32 in radians per position, both halves alike.
    amplitudes: [2, head_dim] float32, YaRN's attention factor (else 1) for cos and for sin, there negative in the
    first half, so that `apply_rope` needs no negation.
    Returns (cos, sin), each [tokens, 1, head_dim] of `dtype`. Angles are computed in float32, as transformers does.
    """
    angles = positions[:, None, None] * frequencies
    cos, sin = amplitudes
    return angles.cos().mul_(cos).to(dtype), angles.sin().mul_(sin).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head of every token.

    x: [tokens, heads, head_dim], may be a strided view; cos, sin: [tokens, 1, head_dim] from `rope_angles`.
    Returns a new contiguous [tokens, heads, head_dim] in x's dtype.
    """
    # Rolling by half the head swaps the halves: of four ways measured on CPU, the one with the least overhead.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
