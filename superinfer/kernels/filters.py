"""top_k, top_p and min_p on a GPU without sorting, and without asking the device how far a sort would have to go.

The threshold is found by bisection over the bit patterns of the logits, which are at most 0 and so are ordered as
their magnitudes' integers are: 31 halvings find exactly the value that a sort would have found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INFINITY_BITS = 0x7F800000


@triton.jit
def _magnitudes(row, start, vocab, BLOCK: tl.constexpr):
    """Bits of −x for BLOCK logits x of the row; beyond its end, more than infinity has."""
    column = start + tl.arange(0, BLOCK)
    value = tl.load(row + column, mask=column < vocab, other=float("-inf"))
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    return tl.where(column < vocab, bits, 0x7FFFFFFF), value


@triton.jit
def _filter_threshold(
    scaled, top_k, top_p, out, vocab, top_k_step, top_p_step, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0)
    row = scaled + at.to(tl.int64) * vocab
    k = tl.load(top_k + at * top_k_step)
    p = tl.load(top_p + at * top_p_step)
    limit = tl.full((), INFINITY, tl.int32)  # keep what has at most this magnitude
    if (k > 0) & (k < vocab):
        low = tl.full((), 0, tl.int32)
        while low < limit:
            middle = low + (limit - low) // 2
            count = tl.full((), 0, tl.int32)
            for start in range(0, vocab, BLOCK):
                bits, _ = _magnitudes(row, start, vocab, BLOCK)
                count += tl.sum((bits <= middle).to(tl.int32), axis=0)
            if count >= k:
                limit = middle
            else:
                low = middle + 1
    if p < 1.0:
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, vocab, BLOCK):
            bits, value = _magnitudes(row, start, vocab, BLOCK)
            total += tl.sum(tl.where(bits <= limit, tl.exp(value), 0.0), axis=0).to(tl.float64)
        low = tl.full((), 0, tl.int32)
        while low < limit:
            middle = low + (limit - low) // 2
            mass = tl.full((), 0.0, tl.float64)
            for start in range(0, vocab, BLOCK):
                bits, value = _magnitudes(row, start, vocab, BLOCK)
                mass += tl.sum(tl.where(bits <= middle, tl.exp(value), 0.0), axis=0).to(tl.float64)
            if mass >= p * total:
                limit = middle
            else:
                low = middle + 1
    tl.store(out + at, -limit.to(tl.float32, bitcast=True))


def filter_threshold(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See `sampling.filter_threshold`. scaled: contiguous [rows, vocab] float32, at most 0; the others with any stride.
    Returns [rows] float32."""
    rows, vocab = scaled.shape
    out = scaled.new_empty(rows)
    block = min(4096, triton.next_power_of_2(vocab))
    _filter_threshold[(rows,)](
        scaled, top_k, top_p, out, vocab, top_k.stride(0), top_p.stride(0),
        INFINITY=INFINITY_BITS, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return torch.maximum(out, min_p.log().to(scaled.dtype))
