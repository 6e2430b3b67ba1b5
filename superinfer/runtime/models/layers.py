"""Layers shared by all model definitions. Tokens of a step are flat: activations are [tokens, hidden].

Modules carry the names of the checkpoint's tensors, except that projections of one input are fused into one matrix;
`FusedLinear.parts` says which rows belong to which checkpoint tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from superinfer.kernels.activation import silu_and_mul
from superinfer.kernels.norm import add_rms_norm, rms_norm
from superinfer.kernels.rope import rope_angles
from superinfer.runtime.models.config import ModelConfig
from superinfer.runtime.models.rope import RopeConfig

if TYPE_CHECKING:
    from superinfer.kernels.tuned_linear import TunedLinear


class AttentionBackend(Protocol):
    """One step's attention, prepared by an executor: `superinfer.kernels.attention.PagedAttention` and the like."""

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, attend.

        qkv: [tokens, heads + 2 · kv_heads, head_dim], or as `Linear.in_parts`; cos, sin: see StepContext. Returns
        [tokens, heads · head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one step shares. cos, sin: [tokens, 1, head_dim]."""

    attention: AttentionBackend
    cos: torch.Tensor
    sin: torch.Tensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, of `size`; any number of rows."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.floor = nn.Buffer(torch.tensor(eps**0.5, dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.floor)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed sum, sum); `residual` is overwritten."""
        return add_rms_norm(x, residual, self.weight, self.floor)


class Linear(nn.Module):
    """[tokens, inputs] -> [tokens, outputs], by the kernel that is the quickest for so many tokens on the device."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.tuned: TunedLinear | None = None  # on a GPU, once its algorithms have been measured

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tuned is not None:
            product = self.tuned.run(x, self.weight, self.bias)
            if product is not None:
                return product
        return F.linear(x, self.weight, self.bias)

    def in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Like `forward`; or, on a GPU where that is quicker, float32 [parts, tokens, outputs] for who adds them up."""
        if x.is_cuda and self.bias is None:
            # These need triton, which comes with CUDA builds of torch.
            from superinfer.kernels import skinny, skinny_tma, wide_tma

            for kernel in (wide_tma, skinny_tma, skinny):
                parts = kernel.linear_parts(x, self.weight)
                if parts is not None:
                    return parts
        return self(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up, where gate and up are the two halves of `forward`: [tokens, outputs / 2]."""
        if x.is_cuda and self.bias is None:
            from superinfer.kernels import many_tma, skinny_tma, wide_tma

            for kernel in (many_tma, wide_tma, skinny_tma):
                product = kernel.gated(x, self.weight)
                if product is not None:
                    return product
        return silu_and_mul(self(x))


class FusedLinear(Linear):
    """Several projections of one input as one matrix. parts: checkpoint module name -> its rows, in order."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(inputs, sum(parts.values()), bias)
        self.parts = parts

    def checkpoint_parts(self, kind: str) -> dict[str, torch.Tensor]:
        """Checkpoint tensors, named beside this module, -> their slice of the parameter `kind`, "weight" or "bias"."""
        slices = self.get_parameter(kind).split(list(self.parts.values()))
        return {f"{part}.{kind}": rows for part, rows in zip(self.parts, slices, strict=True)}


class RotaryEmbedding(nn.Module):
    """positions [tokens] -> the angles' cos and sin, each as in StepContext."""

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        # float32 whatever the model's dtype: half precision cannot tell neighbouring positions apart.
        # Of numbers alone: computing with tensors on the meta device makes torch import sympy, for half a second.
        half = len(rope.inv_freq)
        amplitudes = [[rope.scaling] * 2 * half, [-rope.scaling] * half + [rope.scaling] * half]
        self.frequencies = nn.Buffer(torch.tensor(rope.inv_freq * 2, dtype=torch.float32), persistent=False)
        self.amplitudes = nn.Buffer(torch.tensor(amplitudes, dtype=torch.float32), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_angles(positions, self.frequencies, self.amplitudes, dtype)


class Attention(nn.Module):
    """Grouped-query attention over the paged cache. qk_norm: RMSNorm on every query and key head before rotation."""

    def __init__(
        self, config: ModelConfig, layer: int, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        q_size, kv_size = self.heads * self.head_dim, config.kv_row
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = FusedLinear(config.hidden_size, parts, qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None

    def forward(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """[tokens, heads · head_dim]: what `o_proj` takes, which is left to the layer."""
        normed = self.q_norm is not None
        qkv = self.qkv_proj(x) if normed else self.qkv_proj.in_parts(x)
        qkv = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        return step.attention.rotate_and_attend(self.layer, qkv, step.cos, step.sin, self.scale)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = FusedLinear(config.hidden_size, parts, bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden], or as `Linear.in_parts`."""
        return self.down_proj.in_parts(self.gate_up_proj.gated(x))
