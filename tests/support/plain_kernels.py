"""Plain torch in place of the kernels that the CUDA executor's host side runs through Triton's interpreter on a CPU.

For tests of what is around them. The interpreter takes most of a step; the kernels themselves are compared with plain
torch in tests/kernels, and run within steps in tests/runtime/engine/test_cuda_executor.py.
"""

from __future__ import annotations

import pytest
import torch

from superinfer.kernels import decode_step, fused, host_memory
from superinfer.kernels.rope import apply_rope
from superinfer.kernels.sampling import NO_TOKEN


def rope_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    kv: torch.Tensor,
    kv_heads: int,
    out: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """See fused.rope_and_store."""
    whole = qkv.sum(0).to(kv.dtype) if qkv.dim() == 4 else qkv
    q, k, v = whole.split((whole.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    blocks, offsets = places.long() // kv.shape[2], places.long() % kv.shape[2]
    k = apply_rope(k, cos, sin)
    kv[blocks, 0, offsets] = k
    kv[blocks, 1, offsets] = v
    if kept is not None:
        kept[0], kept[1] = k, v
    rotated = apply_rope(q, cos, sin)
    return rotated if out is None else out.copy_(rotated)


def copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """See host_memory.copy."""
    dst.view(-1).view(torch.uint8).copy_(src.view(-1).view(torch.uint8))


def keep_largest(
    logits: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor, host: torch.Tensor, turn: torch.Tensor
) -> None:
    """See decode_step.keep_largest."""
    largest, tokens = logits.max(dim=1)
    tokens = torch.where(largest.isfinite(), tokens, NO_TOKEN)
    last_tokens[slots.long()] = tokens.clamp(min=0)
    told = host if host.dim() == 1 else host[(int(turn) + 1) % 2]
    told[: len(tokens)] = tokens


def look_through(logits: torch.Tensor, best: torch.Tensor, at_best: torch.Tensor) -> None:
    """See decode_step.look_through; the first part is the whole row."""
    largest, ids = logits.max(dim=1)
    best[:], at_best[:] = -torch.inf, 0
    best[:, 0], at_best[:, 0] = largest.nan_to_num(0.0, torch.inf, -torch.inf), torch.where(largest.isnan(), -1, ids)


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of a test."""
    monkeypatch.setattr(fused, "rope_and_store", rope_and_store)
    monkeypatch.setattr(host_memory, "copy", copy)
    monkeypatch.setattr(decode_step, "keep_largest", keep_largest)
    monkeypatch.setattr(decode_step, "look_through", look_through)
