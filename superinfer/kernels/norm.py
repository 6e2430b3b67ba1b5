"""RMSNorm (Zhang and Sennrich 2019), alone and fused with the residual addition before it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    x: [..., n], float32 or a half type (computed in float32). weight: [n]. floor: float32 scalar, sqrt(eps).
    Returns [..., n] in x's dtype.
    """
    if x.is_cuda:
        from superinfer.kernels import fused  # needs triton, which comes with CUDA builds of torch

        return fused.rms_norm(x, weight, floor)
    # hypot adds eps under the root in one operation; `F.rms_norm` takes ten, twice the time of this on CPU.
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).mul_(x.shape[-1] ** -0.5)
    return (x / mean.hypot_(floor)).mul_(weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + residual, normed, and the sum itself, which is the next residual.

    x, residual: [tokens, n]; `residual` is overwritten with the sum. On a GPU x may be float32 [parts, tokens, n],
    which are added up. weight, floor: as for `rms_norm`.
    Returns ([tokens, n], [tokens, n]).
    """
    if x.is_cuda:
        from superinfer.kernels import fused  # needs triton, which comes with CUDA builds of torch

        return fused.add_rms_norm(x, residual, weight, floor)
    residual.add_(x)
    return rms_norm(residual, weight, floor), residual
