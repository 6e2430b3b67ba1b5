"""The experts' layer of few tokens, as in small decode steps, in three Triton kernels: bound by reading the weights of
the experts picked once.

Rows and blocks are those of `fused_moe`. One program picks experts and lists rows, and whoever reads the result adds up
a token's choices, so that of the five kernels two remain besides the products. The products are spread over more
programs, with weights as the taller operand. Every kernel starts before the one in front is over (`launch`); the second
product then fetches its first weights, for which it needs no more than the list of rows, from two kernels before.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from superinfer.kernels.fused_moe import Tile, fit, shared_memory_of
from superinfer.kernels.launch import begin, overlap, prefetch

MOST_ROWS = 32  # tokens times experts of a token
ROWS = 16  # of a block: an expert has at most as many rows as there are tokens
PREFETCHED = 2  # tiles of each program of the second product


class Tiles(NamedTuple):
    """gate_up: so many columns of either. splits: of the second product's depth, each a part of the sum."""

    gate_up: Tile
    down: Tile
    splits: int


FLOAT32_TILES = Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), 2)
# Guesses by counting, to be measured by `benchmarks/gpu_moe_few.py`. Wide experts: programs enough that the last ones
# are a small part of all; with two experts in use, 4,096 columns are 128 programs for an H200's 132 multiprocessors.
WIDE = Tiles(Tile(32, 128, 4, 4), Tile(64, 128, 4, 5), 1)
WIDE_ALONE = Tiles(Tile(32, 128, 4, 4), Tile(64, 256, 8, 4), 1)
# Narrow ones are short: all programs run at the same time.
NARROW = Tiles(Tile(16, 128, 4, 6), Tile(32, 128, 4, 4), 1)
WIDE_FROM = 2048  # an expert's width


def takes(tokens: int, top_k: int) -> bool:
    """Whether these kernels are made for so many."""
    return 0 < tokens * top_k <= MOST_ROWS


@functools.cache
def choose_tiles(blocks: int, size: int, dtype: torch.dtype, shared_memory: int = 1 << 30) -> Tiles:
    """By how many blocks there may be and how wide an expert is. shared_memory: bytes that a program may have."""
    if dtype.itemsize == 4:
        return FLOAT32_TILES
    chosen = NARROW if size < WIDE_FROM else WIDE_ALONE if blocks <= 2 else WIDE
    return Tiles(
        fit(chosen.gate_up, ROWS + 2 * chosen.gate_up.columns, shared_memory),
        fit(chosen.down, ROWS + chosen.down.columns, shared_memory),
        chosen.splits,
    )


@triton.jit(do_not_specialize=["tokens", "blocks"])  # see `fused_moe.ANY_COUNT`
def _route_few(
    logits, weights, rows, block_expert, tokens, blocks, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, TOKENS_2: tl.constexpr, BLOCKS_2: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`fused_moe._route` and `_align` of all tokens in one program. *_2: padded to powers of two."""
    begin(PDL)
    token = tl.arange(0, TOKENS_2)[:, None]
    expert = tl.arange(0, EXPERTS_2)[None, :]
    inside = (token < tokens) & (expert < EXPERTS)
    # Rows beyond the last token are zeros: -inf alone would be NaN.
    value = tl.load(logits + token * EXPERTS + expert, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(expert < EXPERTS, value, float("-inf"))
    value = tl.exp(value - tl.max(value, axis=1)[:, None])
    probability = value / tl.sum(value, axis=1)[:, None]
    value = tl.where(expert < EXPERTS, tl.where(value == value, value, 0.0), -2.0)  # see `_route`
    choice = tl.arange(0, TOP_K_2)[None, :]
    weight = tl.zeros((TOKENS_2, TOP_K_2), tl.float32)
    chosen = tl.full((TOKENS_2, TOP_K_2), EXPERTS, tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(value, axis=1)[:, None]
        weight = tl.where(choice == k, tl.sum(tl.where(expert == best, probability, 0.0), axis=1)[:, None], weight)
        chosen = tl.where((choice == k) & (token < tokens), best, chosen)
        value = tl.where(expert == best, -1.0, value)
    if NORMALIZE:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    tl.store(weights + token * TOP_K + choice, weight, mask=(token < tokens) & (choice < TOP_K))

    # All rows against all, me [·, 1] against other [1, ·]. Those that are none have the expert EXPERTS and come last.
    ALL: tl.constexpr = TOKENS_2 * TOP_K_2
    mine = tl.reshape(chosen, (ALL,))
    index = tl.arange(0, ALL)
    me, other = mine[:, None], mine[None, :]
    same = me == other
    rank = tl.sum((same & (index[None, :] < index[:, None])).to(tl.int32), axis=1)
    count = tl.sum(same.to(tl.int32), axis=1)
    known = mine < EXPERTS
    opens = known & (rank % BLOCK == 0)  # the first row of a block
    opened = opens.to(tl.int32)
    block = tl.sum(tl.where(other < me, opened[None, :], 0), axis=1) + rank // BLOCK
    row = index // TOP_K_2 * TOP_K + index % TOP_K_2
    tl.store(rows + block * BLOCK + rank % BLOCK, row, mask=known)
    slot = tl.arange(0, BLOCK)[None, :]
    padding = opens[:, None] & (slot >= (count - rank)[:, None])
    tl.store(rows + block[:, None] * BLOCK + slot, tokens * TOP_K + tl.zeros_like(slot), mask=padding)
    tl.store(block_expert + block, mine, mask=opens)
    unused = tl.arange(0, BLOCKS_2)
    tl.store(block_expert + unused, -1, mask=(unused >= tl.sum(opened, axis=0)) & (unused < blocks))


@triton.jit
def _some(at, left, EVEN: tl.constexpr):
    """What lies at `at`; without EVEN zeros where nothing is left of the depth."""
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=left, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_few(
    x, weight, out, rows, block_expert, tokens, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(x gateᵀ) · (x upᵀ) for one block of rows and one tile of columns, whose gates and ups are one product."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: the next kernel is to find the list of rows.
        tl.extra.cuda.gdc_launch_dependents()
    TILES: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    total = tokens * TOP_K
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))
    line, step = tl.arange(0, 2 * COLUMNS), tl.arange(0, DEPTH)
    # What lies outside is computed from what lies inside, and not stored: loads need no masks.
    column = tl.minimum(tile * COLUMNS + line % COLUMNS, SIZE - 1) + line // COLUMNS * SIZE
    token = tl.minimum(row, total - 1) // TOP_K
    a = weight + expert * (2 * SIZE * HIDDEN) + column.to(tl.int64)[:, None] * HIDDEN + step[None, :]
    b = x + token.to(tl.int64)[None, :] * HIDDEN + step[:, None]
    EVEN: tl.constexpr = HIDDEN % DEPTH == 0
    both = tl.zeros((2 * COLUMNS, ROWS), tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        left = step < HIDDEN - start
        matrix = _some(a + start, left[None, :], EVEN)
        both = tl.dot(matrix, _some(b + start, left[:, None], EVEN), both, input_precision="ieee")
    gate, up = tl.split(tl.permute(tl.reshape(both, (2, COLUMNS, ROWS)), (1, 2, 0)))
    value = gate / (1.0 + tl.exp(-gate)) * up
    inside = tile * COLUMNS + tl.arange(0, COLUMNS)
    to = out + row.to(tl.int64)[None, :] * SIZE + inside[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(row < total)[None, :] & (inside < SIZE)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _down_few(
    x, weight, scales, out, rows, block_expert, tokens, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SPLITS: tl.constexpr, PREFETCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x downᵀ, times the weight of the choice, for one block of rows, one tile of columns and one part of the depth."""
    TILES: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    PART: tl.constexpr = ((SIZE + DEPTH - 1) // DEPTH + SPLITS - 1) // SPLITS * DEPTH
    program, split = tl.program_id(0), tl.program_id(1)
    block, tile = program // TILES, program % TILES
    inside = tile * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.minimum(inside, HIDDEN - 1).to(tl.int64)[:, None] * SIZE  # see `_gate_up_few`
    first = split * PART
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # A guess, past the first-level cache, which may hold an earlier list: it is read again below.
        guess = tl.minimum(tl.load(block_expert + block, cache_modifier=".cg"), EXPERTS - 1).to(tl.int64)
        if guess >= 0:
            LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
            lines = first + tl.arange(0, DEPTH // LINE) * LINE
            for ahead in tl.static_range(PREFETCHED):
                depth = tl.minimum(lines + ahead * DEPTH, SIZE - 1)
                prefetch(weight + guess * (SIZE * HIDDEN) + column + depth[None, :])
        tl.extra.cuda.gdc_wait()
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    total = tokens * TOP_K
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))
    known = row < total
    step = tl.arange(0, DEPTH)
    a = weight + expert * (SIZE * HIDDEN) + column + step[None, :]
    b = x + tl.minimum(row, total - 1).to(tl.int64)[None, :] * SIZE + step[:, None]
    EVEN: tl.constexpr = SIZE % DEPTH == 0
    result = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(first, tl.minimum(first + PART, SIZE), DEPTH):
        left = step < SIZE - start
        matrix = _some(a + start, left[None, :], EVEN)
        result = tl.dot(matrix, _some(b + start, left[:, None], EVEN), result, input_precision="ieee")
    result = result * tl.load(scales + row, mask=known, other=0.0)[None, :]
    part = (row % TOP_K * SPLITS + split).to(tl.int64) * tokens + row // TOP_K
    tl.store(out + part[None, :] * HIDDEN + inside[:, None], result, mask=known[None, :] & (inside < HIDDEN)[:, None])


def route_few(
    logits: torch.Tensor, top_k: int, normalize: bool, block: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fused_moe.route` and `align` in one: (weights [tokens, top_k] float32, rows [blocks · block] int32, expert of
    each block [blocks] int32). logits: contiguous [tokens, experts], of few tokens: all rows are compared
    with all."""
    tokens, experts = logits.shape
    top_k_2, tokens_2 = triton.next_power_of_2(top_k), triton.next_power_of_2(tokens)
    # As in `fused_moe.align`; and the most there are with as many tokens as the kernel is compiled for.
    blocks, most = (count // block + min(count, experts) for count in (tokens * top_k, tokens_2 * top_k))
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    rows = torch.empty(blocks * block, dtype=torch.int32, device=logits.device)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=logits.device)
    _route_few[(1,)](
        logits, weights, rows, block_expert, tokens, blocks, EXPERTS=experts, EXPERTS_2=triton.next_power_of_2(experts),
        TOP_K=top_k, TOP_K_2=top_k_2, TOKENS_2=tokens_2, BLOCKS_2=triton.next_power_of_2(most), NORMALIZE=normalize,
        BLOCK=block, num_warps=1 if tokens_2 * top_k_2 <= 4 else 4, **overlap(logits),
    )  # fmt: skip
    return weights, rows, block_expert


def moe_parts(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """What `moe.moe_mlp` sums up, as float32 [parts, tokens, hidden], parts a multiple of top_k. All contiguous, one
    token at least. tiles: others than those `choose_tiles` picks.

    Each choice is scaled in float32 and not rounded before the sum, as it is in `fused_moe.moe_mlp`.
    """
    tokens, hidden = x.shape
    experts, _, size = down.shape
    weights, rows, block_expert = route_few(logits, top_k, normalize)
    blocks = len(block_expert)
    tiles = tiles or choose_tiles(blocks, size, x.dtype, shared_memory_of(x.device))
    activated = x.new_empty(tokens * top_k, size)
    parts = torch.empty(top_k * tiles.splits, tokens, hidden, dtype=torch.float32, device=x.device)
    shared = dict(TOP_K=top_k, HIDDEN=hidden, SIZE=size, ROWS=ROWS, **overlap(x))
    columns, depth, warps, stages = tiles.gate_up
    _gate_up_few[(blocks * triton.cdiv(size, columns),)](
        x, gate_up, activated, rows, block_expert, tokens,
        COLUMNS=columns, DEPTH=depth, **shared, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    columns, depth, warps, stages = tiles.down
    _down_few[(blocks * triton.cdiv(hidden, columns), tiles.splits)](
        activated, down, weights, parts, rows, block_expert, tokens,
        EXPERTS=experts, COLUMNS=columns, DEPTH=depth, SPLITS=tiles.splits, PREFETCHED=PREFETCHED,
        **shared, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return parts
