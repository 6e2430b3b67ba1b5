"""The elementwise work between matrix products, each as one Triton kernel: a pass over memory instead of several.

References are the torch functions of the same names in `norm`, `activation` and `rope`, which call these on CUDA.
Arithmetic is float32 and rounded once, so half-precision results differ from the references by that rounding only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from superinfer.kernels.launch import begin, overlap


@triton.jit
def _rms_norm(
    x, residual, weight, floor, out, heads, size, token_step, head_step, part_step,
    ADD: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. ADD: `residual` is added first, and holds the sum afterwards. PARTS: of x, to be
    added up; 0: it is one piece."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    at = (row // heads).to(tl.int64) * token_step + (row % heads) * head_step + columns
    dense = row.to(tl.int64) * size + columns
    scaled_by = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(floor)
    begin(PDL)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            value += tl.load(x + part * part_step + at, mask=inside, other=0.0)
        value = value.to(out.dtype.element_ty).to(tl.float32)  # as if it had been written in one piece
    if ADD:
        total = (value + tl.load(residual + dense, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + dense, total, mask=inside)
        value = total.to(tl.float32)  # the norm is of the sum as the next layer will see it
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / size + root * root)
    tl.store(out + dense, (value * scale * scaled_by).to(out.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """See `norm.rms_norm`. x: [tokens, n], or [tokens, heads, n] with any strides of tokens and heads."""
    out = x.new_empty(x.shape)
    size = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    head_step = x.stride(1) if x.dim() == 3 else 0
    block = triton.next_power_of_2(size)
    if x.numel():
        _rms_norm[(x.shape[0] * heads,)](
            x, x, weight, floor, out, heads, size, x.stride(0), head_step, 0, ADD=False, PARTS=0, BLOCK=block,
            num_warps=_warps(block), **overlap(x),
        )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `norm.add_rms_norm`. x, residual: contiguous [tokens, n]; or x: float32 [parts, tokens, n], their sum."""
    out = torch.empty_like(residual)
    tokens, size = residual.shape
    parts = len(x) if x.dim() == 3 else 0
    block = triton.next_power_of_2(size)
    if tokens:
        _rms_norm[(tokens,)](
            x, residual, weight, floor, out, 1, size, size, 0, tokens * size, ADD=True, PARTS=parts,
            BLOCK=block, num_warps=_warps(block), **overlap(x),
        )  # fmt: skip
    return out, residual


@triton.jit
def _silu_and_mul(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + columns, value.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `activation.silu_and_mul`. gate_up: contiguous [tokens, 2 n]."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    if tokens:
        block = min(2048, triton.next_power_of_2(size))
        _silu_and_mul[(tokens, triton.cdiv(size, block))](
            gate_up, out, size, BLOCK=block, num_warps=4, **overlap(gate_up)
        )
    return out


@triton.jit
def _whole(at, inside, part_step, element: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the parts, rounded once, as if it had been written in one piece."""
    value = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(at + part * part_step, mask=inside, other=0.0)
    return value.to(element)


@triton.jit(do_not_specialize=["tokens"])
def _rope_and_store(
    qkv, cos, sin, places, q_out, cache, rows_out, tokens, page, qkv_row, block_step, value_step, offset_step,
    part_step, SHARED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_2: tl.constexpr,
    HALF_2: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and one KV head with the SHARED query heads that belong to it. *_2: padded to powers of two. PARTS:
    of qkv, to be added up. KEEP: keys and values are written to `rows_out`, too."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, HALF_2)
    there = token < tokens
    inside = there[:, None] & (d < HALF)[None, :]
    angle = token[:, None] * HEAD_DIM + d[None, :]
    cos_1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)  # negative, see rope_angles
    sin_2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)

    heads = tl.arange(0, HEADS_2)
    head = (group * SHARED + heads)[None, :, None]
    here = inside[:, None, :] & (heads < SHARED)[None, :, None]
    row = token[:, None, None]
    at = qkv + row * qkv_row + head * HEAD_DIM + d[None, None, :]
    element = q_out.dtype.element_ty
    first = _whole(at, here, part_step, element, PARTS).to(tl.float32)
    second = _whole(at + HALF, here, part_step, element, PARTS).to(tl.float32)
    to = q_out + (row * KV_HEADS * SHARED + head) * HEAD_DIM + d[None, None, :]
    tl.store(to, (first * cos_1[:, None, :] + second * sin_1[:, None, :]).to(element), mask=here)
    tl.store(to + HALF, (second * cos_2[:, None, :] + first * sin_2[:, None, :]).to(element), mask=here)

    place = tl.load(places + token, mask=there, other=0)
    stored = (place // page).to(tl.int64) * block_step + (place % page) * offset_step
    target = cache + stored[:, None] + group * HEAD_DIM + d[None, :]
    key = qkv + token[:, None] * qkv_row + (KV_HEADS * SHARED + group) * HEAD_DIM + d[None, :]
    k_1 = _whole(key, inside, part_step, element, PARTS).to(tl.float32)
    k_2 = _whole(key + HALF, inside, part_step, element, PARTS).to(tl.float32)
    rotated_1 = (k_1 * cos_1 + k_2 * sin_1).to(element)
    rotated_2 = (k_2 * cos_2 + k_1 * sin_2).to(element)
    tl.store(target, rotated_1, mask=inside)
    tl.store(target + HALF, rotated_2, mask=inside)
    value = key + KV_HEADS * HEAD_DIM
    v_1 = _whole(value, inside, part_step, element, PARTS)
    v_2 = _whole(value + HALF, inside, part_step, element, PARTS)
    tl.store(target + value_step, v_1, mask=inside)
    tl.store(target + value_step + HALF, v_2, mask=inside)
    if KEEP:
        kept = rows_out + (token[:, None] * KV_HEADS + group) * HEAD_DIM + d[None, :]
        values = kept + tokens.to(tl.int64) * KV_HEADS * HEAD_DIM
        tl.store(kept, rotated_1, mask=inside)
        tl.store(kept + HALF, rotated_2, mask=inside)
        tl.store(values, v_1, mask=inside)
        tl.store(values + HALF, v_2, mask=inside)


def rope_tile(tokens: int) -> tuple[int, int]:
    """Tokens of a program and its warps: of ten tried on an H200 at 128 to 8,192 tokens, the quickest."""
    return (1, 1) if tokens <= 64 else (8, 2) if tokens <= 2048 else (2, 1)


def rope_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor, kv: torch.Tensor, kv_heads: int,
    out: torch.Tensor | None = None, kept: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotate queries and keys, and write keys and values to where the cache keeps them.

    qkv: [tokens, heads + 2 · kv_heads, head_dim], heads and dimensions contiguous; or contiguous float32
    [parts, tokens, heads + 2 · kv_heads, head_dim], their sum. cos, sin: [tokens, 1, head_dim] from `rope_angles`.
    places: [tokens] int32, block · page + offset. kv: one layer's view of a block-first cache, [blocks, 2, page,
    kv_heads, head_dim], any block stride. kept: contiguous [2, tokens, kv_heads, head_dim], for the same keys and
    values in the order of the tokens. Returns the queries, [tokens, heads, head_dim], in kv's dtype; in `out` where
    that is given.
    """
    tokens, all_heads, head_dim = qkv.shape[-3:]
    parts = len(qkv) if qkv.dim() == 4 else 1
    heads = all_heads - 2 * kv_heads
    q = kv.new_empty(tokens, heads, head_dim) if out is None else out
    if tokens:
        shared = heads // kv_heads
        together, warps = rope_tile(tokens)
        _rope_and_store[(triton.cdiv(tokens, together), kv_heads)](
            qkv, cos, sin, places, q, kv, kv if kept is None else kept, tokens, kv.shape[2], qkv.stride(-3),
            kv.stride(0), kv.stride(1), kv.stride(2), qkv.stride(0), PARTS=parts, TOKENS=together,
            KEEP=kept is not None, **overlap(qkv),
            SHARED=shared, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            HEADS_2=triton.next_power_of_2(shared), HALF_2=triton.next_power_of_2(head_dim // 2), num_warps=warps,
        )  # fmt: skip
    return q
