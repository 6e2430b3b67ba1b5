"""RMSNorm (Zhang and Sennrich 2019), alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    x: [..., n], float32 or a half type (the mean is taken in float32). weight: [n]. Returns [..., n] in x's dtype.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + residual, normed, and the sum itself, which is the next residual.

    x, residual: [tokens, n]; `residual` is overwritten with the sum. weight: [n]. Returns ([tokens, n], [tokens, n]).
    """
    if x.is_cuda:
        from superinfer.kernels import fused  # needs triton, which comes with CUDA builds of torch

        return fused.add_rms_norm(x, residual, weight, eps)
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps), residual
