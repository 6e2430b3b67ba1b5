"""The gated activation of a SwiGLU feed-forward layer (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, where gate and up are the two halves of the last dimension.

    gate_up: [tokens, 2 n], any float type. Returns [tokens, n] in the same dtype.
    """
    if gate_up.is_cuda:
        from superinfer.kernels import fused  # needs triton, which comes with CUDA builds of torch

        return fused.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
