"""Frequencies of the rotary position embedding, as config.json asks for them: plain, linear, Llama-3's or YaRN's.

The same float32 operations in the same order as transformers', so that both models turn by the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from superinfer.errors import ModelLoadError, UnsupportedError


@dataclass(frozen=True)
class RopeConfig:
    """inv_freq: head_dim / 2 inverse frequencies in radians per position; scaling: factor on cos and sin (YaRN).
    positions: how many they are made for."""

    inv_freq: tuple[float, ...]
    scaling: float
    positions: int


class RopeParameters(msgspec.Struct, kw_only=True):
    """`rope_parameters` of a config, or `rope_scaling` as transformers 4 calls it. Absent numbers are the type's own.

    factor: how many times more positions than the model was first trained for. original_max_position_embeddings: those.
    """

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def need(self, name: str) -> float:
        """A number that this type cannot do without. Raises ModelLoadError."""
        value = getattr(self, name)
        if value is None:
            raise ModelLoadError(f"rope_type={self.kind!r} needs {name!r} in rope_parameters")
        if value <= 0:
            raise ModelLoadError(f"rope_type={self.kind!r} needs a {name!r} above 0, not {value:g}")
        return float(value)

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


def read_rope(parameters: dict[str, Any], head_dim: int, theta: float, max_positions: int) -> RopeConfig:
    """The frequencies of heads of `head_dim` numbers.

    theta, max_positions: what the rest of the config says, for parameters that do not say it themselves.
    Raises UnsupportedError (a type not implemented), ModelLoadError or msgspec.ValidationError (what cannot be).
    """
    if nested := [name for name, value in parameters.items() if isinstance(value, dict)]:
        raise UnsupportedError(f"rope_parameters by kind of layer ({', '.join(nested)}) are not supported")
    rope = msgspec.convert(parameters, RopeParameters)
    if rope.kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope_type={rope.kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if rope.partial_rotary_factor not in (None, 1.0):
        raise UnsupportedError(f"partial_rotary_factor={rope.partial_rotary_factor} is not supported; only 1 is")
    if head_dim % 2:
        raise ModelLoadError(f"head_dim={head_dim} must be even: positions turn pairs of its numbers")
    theta = theta if rope.rope_theta is None else rope.rope_theta
    if theta <= 1.0:
        raise ModelLoadError(f"rope_theta={theta:g} must be above 1")
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # over 2 pi
    inv_freq, scaling = ROPE_TYPES[rope.kind](wavelengths, rope, theta, max_positions)
    return RopeConfig(tuple(inv_freq.tolist()), scaling, _positions(rope, max_positions))


def _positions(rope: RopeParameters, max_positions: int) -> int:
    """`factor` times as many as before, as vLLM has it: configs are published with max_position_embeddings as it was
    (Qwen's, where its users are to add YaRN; Vicuna 16k), or as it has become. Llama 3.1 and later say the latter."""
    if rope.kind not in ("linear", "yarn") or rope.factor is None:
        return max_positions
    before = max_positions if rope.kind == "linear" else rope.original_max_position_embeddings or max_positions
    return max(max_positions, int(before * rope.factor))


def _default(
    wavelengths: torch.Tensor, rope: RopeParameters, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    return 1.0 / wavelengths, 1.0


def _linear(
    wavelengths: torch.Tensor, rope: RopeParameters, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    """Every position counts as position / factor."""
    return 1.0 / wavelengths / rope.need("factor"), 1.0


def _llama3(
    wavelengths: torch.Tensor, rope: RopeParameters, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    """Slow turns are slowed by factor, quick ones left, those between blended (Llama 3.1)."""
    original = rope.original_max_position_embeddings or max_positions
    factor, low, high = rope.need("factor"), rope.need("low_freq_factor"), rope.need("high_freq_factor")
    if high <= low:
        raise ModelLoadError(f"rope_type='llama3' needs high_freq_factor={high:g} above low_freq_factor={low:g}")
    inv_freq = 1.0 / wavelengths
    turn = 2 * math.pi / inv_freq  # positions of one whole turn
    share = (original / turn - low) / (high - low)
    blended = (1 - share) * inv_freq / factor + share * inv_freq
    slowed = torch.where(turn > original / low, inv_freq / factor, inv_freq)
    between = (turn >= original / high) & (turn <= original / low)
    return torch.where(between, blended, slowed), 1.0


def _yarn(
    wavelengths: torch.Tensor, rope: RopeParameters, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): as Llama-3's, blended by dimension, and cos and sin raised by the attention factor."""
    original = rope.original_max_position_embeddings or max_positions
    factor = max_positions / original if rope.factor is None else rope.factor
    half = len(wavelengths)

    def dimension(turns: float) -> float:
        """The one that makes `turns` turns within the original context."""
        return 2 * half * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - first) / width).clamp(0, 1)
    inv_freq = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    scaling = rope.attention_factor
    if scaling is None and rope.mscale and rope.mscale_all_dim:
        scaling = _magnitude(factor, rope.mscale) / _magnitude(factor, rope.mscale_all_dim)
    return inv_freq, _magnitude(factor, 1.0) if scaling is None else scaling


def _magnitude(factor: float, weight: float) -> float:
    """How much longer attention's vectors are made for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


ROPE_TYPES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
