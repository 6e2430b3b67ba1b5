"""Drawing tokens by temperature alone: two passes over the logits, and no array of the vocabulary's size.

`sampling.temper` and `sampling.draw` are what this computes, but for rounding: weights are summed in float32 within a
part of a row and in float64 beyond.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from superinfer.kernels.sampling import NO_TOKEN

PARTS = 16  # that a row is looked through in
_NOWHERE = tl.constexpr(1 << 30)  # behind any token id
_NO_TOKEN = tl.constexpr(NO_TOKEN)


@triton.jit
def _weight(value, maximum, temperature):
    """exp((value − maximum) / temperature); 0 where the value is −inf, whatever the maximum."""
    return tl.where(value == float("-inf"), 0.0, tl.exp((value - maximum) / temperature))


@triton.jit
def _sum_up(logits, temperatures, best, total, vocab, row_step, part, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    first = piece * part
    end = tl.minimum(first + part, vocab)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_step + column, mask=column < end, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)  # of the numbers; the sum of weights is NaN where one was none, or inf
        weights = weights * _weight(top, higher, temperature) + _weight(value, higher, temperature)
        top = higher
    maximum = tl.max(top, axis=0)
    to = row * tl.num_programs(1) + piece
    tl.store(best + to, maximum)
    tl.store(total + to, tl.sum(weights * _weight(top, maximum, temperature), axis=0))


@triton.jit
def _draw(
    logits, temperatures, uniforms, best, total, tokens, told, vocab, row_step, part, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the part where the sum of weights passes its target, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    pieces = tl.arange(0, PARTS)
    tops = tl.load(best + row * PARTS + pieces)
    maximum = tl.max(tops, axis=0)
    weights = (tl.load(total + row * PARTS + pieces) * _weight(tops, maximum, temperature)).to(tl.float64)
    whole = tl.sum(weights, axis=0)
    target = tl.load(uniforms + row) * whole
    passed = tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)
    # Rounding may leave the target behind all there is: then it is the last that has any weight, of parts and tokens.
    piece = tl.minimum(passed, tl.max(tl.where(weights > 0, pieces, 0), axis=0))
    rest = target - tl.sum(tl.where(pieces < piece, weights, 0.0), axis=0)
    first = piece * part
    end = tl.minimum(first + part, vocab)
    found = first * 0 + _NOWHERE
    last = first
    before = rest * 0.0
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_step + column, mask=column < end, other=float("-inf")).to(tl.float32)
        here = _weight(value, maximum, temperature).to(tl.float64)
        beyond = (before + tl.cumsum(here, axis=0) > rest) & (here > 0)
        found = tl.minimum(found, tl.min(tl.where(beyond, column, _NOWHERE), axis=0))
        last = tl.maximum(last, tl.max(tl.where(here > 0, column, 0), axis=0))
        before += tl.sum(here, axis=0)
    token = tl.where(found < _NOWHERE, found, last).to(tl.int64)
    token = tl.where(whole > 0, token, _NO_TOKEN)  # NaN is not above 0; where all are -inf nothing has weight
    tl.store(tokens + row, tl.maximum(token, 0))
    tl.store(told + row, token)


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, told: torch.Tensor | None = None
) -> torch.Tensor:
    """The first id whose cumulative weight exp(logit / temperature) exceeds the uniform share of the total.

    logits: [rows, vocab], any float type, rows contiguous. temperature: [rows] float32, above 0. uniforms: [rows]
    float64 in [0, 1). told: [rows] int64, may be pinned: gets the ids too, but NO_TOKEN of a row with NaN, or whose
    largest is infinite. Returns [rows] int64, all of them ids.
    """
    rows, vocab = logits.shape
    best, total = torch.empty(2, rows, PARTS, dtype=torch.float32, device=logits.device).unbind()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    told = torch.empty_like(tokens) if told is None else told
    part = triton.cdiv(triton.cdiv(vocab, PARTS), 16) * 16
    block = min(2048, triton.next_power_of_2(part))
    if rows:
        _sum_up[(rows, PARTS)](
            logits, temperature, best, total, vocab, logits.stride(0), part, BLOCK=block, num_warps=4
        )
        _draw[(rows,)](
            logits, temperature, uniforms, best, total, tokens, told, vocab, logits.stride(0), part, PARTS=PARTS,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return tokens
