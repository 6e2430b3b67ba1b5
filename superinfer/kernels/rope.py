"""Rotary position embedding (Su et al. 2021), halves layout: dimension i is paired with i + head_dim / 2."""

from __future__ import annotations

import torch


def rope_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of one step, shared by all its layers.

    positions: [tokens] int64. inv_freq: [head_dim / 2] float32. scaling: YaRN's attention factor, 1 without.
    Returns (cos, sin), each [tokens, 1, head_dim] of `dtype`; the first half of sin is negated, so that
    `apply_rope` needs no negation. Angles are computed in float32, as transformers does.
    """
    angles = positions.to(torch.float32).unsqueeze(1) * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head of every token.

    x: [tokens, heads, head_dim], may be a strided view; cos, sin: [tokens, 1, head_dim] from `rope_angles`.
    Returns a new contiguous [tokens, heads, head_dim] in x's dtype.
    """
    # Rolling by half the head swaps the halves: of four ways measured on CPU, the one with the least overhead.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
