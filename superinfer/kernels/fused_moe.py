"""The feed-forward layer of mixture-of-experts models in five Triton kernels, without asking the device anything.

Rows are (token, choice) pairs, row = token · top_k + choice. `_route` picks experts, `_align` lists the rows of each
expert in blocks of its own, two grouped matrix products run over the blocks, `_combine` sums a token's choices. How
many blocks there are depends on the routing, which only the device knows; the grids have room for the most there can
be, and programs without a block end at once. So shapes follow from the number of tokens alone, as CUDA graphs need it.

The reference is `moe.moe_mlp`. Products are summed in float32; in half precision the activations between the two
products and a token's choices before their sum are rounded to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Arguments that change from step to step: Triton would compile a kernel anew for those that 16 divides, while a request
# waits.
ANY_COUNT = ["total", "blocks"]


class Tiles(NamedTuple):
    """Sizes of the matrix products' tiles: rows of a block, columns of either product, depth of a step."""

    rows: int
    gate_up_columns: int
    down_columns: int
    depth: int
    warps: int
    stages: int


def choose_tiles(rows: int, experts: int, dtype: torch.dtype) -> Tiles:
    """By the rows an expert has on average: decodes read weights for few rows, prefills compute. Not tuned on a GPU."""
    if dtype.itemsize == 4:  # for tests and small models: float32 products run without tensor cores
        return Tiles(16, 32, 32, 32, 4, 2)
    if rows <= 32 * experts:
        return Tiles(16, 64, 64, 64, 4, 4)
    if rows <= 128 * experts:
        return Tiles(64, 64, 128, 64, 4, 3)
    return Tiles(128, 64, 128, 64, 8, 3)


@triton.jit
def _route(
    logits, weights, experts, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_2: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_2)
    inside = expert < EXPERTS
    value = tl.load(logits + token * EXPERTS + expert, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, axis=0))
    probability = tl.where(inside, value / tl.sum(value, axis=0), -2.0)
    choice = tl.arange(0, TOP_K_2)
    weight = tl.zeros((TOP_K_2,), tl.float32)
    chosen = tl.zeros((TOP_K_2,), tl.int32)
    for k in tl.static_range(TOP_K):
        # Of NaN probabilities any may come out best; one outside would be an address outside.
        best = tl.minimum(tl.argmax(probability, axis=0), EXPERTS - 1)
        weight = tl.where(choice == k, tl.sum(tl.where(expert == best, probability, 0.0), axis=0), weight)
        chosen = tl.where(choice == k, best, chosen)
        probability = tl.where(expert == best, -1.0, probability)
    if NORMALIZE:
        weight = weight / tl.sum(weight, axis=0)
    here = token * TOP_K + choice
    tl.store(weights + here, weight, mask=choice < TOP_K)
    tl.store(experts + here, chosen, mask=choice < TOP_K)


@triton.jit(do_not_specialize=ANY_COUNT)
def _align(
    experts, rows, block_expert, total, blocks, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert: its rows in ascending order, filled up with `total` to whole blocks, behind those of the experts
    before it. Every program counts all experts' rows, which costs less than a kernel before this one."""
    me = tl.program_id(0)
    expert = tl.arange(0, BINS)  # at least one more than there are experts, for what lies beyond the last row
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, total, CHUNK):
        row = start + tl.arange(0, CHUNK)
        counts += tl.histogram(tl.load(experts + row, mask=row < total, other=EXPERTS), BINS)
    needed = tl.where(expert < EXPERTS, (counts + BLOCK - 1) // BLOCK, 0)
    first = tl.sum(tl.where(expert < me, needed, 0), axis=0)
    last = first + tl.sum(tl.where(expert == me, needed, 0), axis=0)

    place = first * BLOCK
    for start in range(0, total, CHUNK):
        row = start + tl.arange(0, CHUNK)
        mine = tl.load(experts + row, mask=row < total, other=EXPERTS) == me
        count = mine.to(tl.int32)
        tl.store(rows + place + tl.cumsum(count, axis=0) - 1, row, mask=mine)
        place += tl.sum(count, axis=0)
    padding = place + tl.arange(0, BLOCK)
    tl.store(rows + padding, total, mask=padding < last * BLOCK)
    for block in range(first, last):
        tl.store(block_expert + block, me)
    if me == EXPERTS - 1:
        for block in range(last, blocks):
            tl.store(block_expert + block, -1)


@triton.jit
def _tile(program, blocks, TILES: tl.constexpr, GROUP: tl.constexpr):
    """(block, column tile) of a program, in an order in which programs that run at the same time share their inputs."""
    first = program // (GROUP * TILES) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * TILES)
    return first + within % height, within // height


@triton.jit(do_not_specialize=ANY_COUNT)
def _gate_up(
    x, weight, out, rows, block_expert, total, blocks, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """silu(x gateᵀ) · (x upᵀ) for one block of rows and one tile of columns."""
    block, tile = _tile(tl.program_id(0), blocks, (SIZE + COLUMNS - 1) // COLUMNS, 8)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))
    known = row < total
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    step = tl.arange(0, DEPTH)
    a = x + (row // TOP_K).to(tl.int64)[:, None] * HIDDEN + step[None, :]
    gate = weight + expert * (2 * SIZE * HIDDEN) + column[None, :] * HIDDEN + step[:, None]
    up = gate + SIZE * HIDDEN
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        left = step < HIDDEN - start
        tokens = tl.load(a + start, mask=known[:, None] & left[None, :], other=0.0)
        here = inside[None, :] & left[:, None]
        gates = tl.dot(tokens, tl.load(gate + start, mask=here, other=0.0), gates, input_precision="ieee")
        ups = tl.dot(tokens, tl.load(up + start, mask=here, other=0.0), ups, input_precision="ieee")
    value = gates / (1.0 + tl.exp(-gates)) * ups
    to = out + row.to(tl.int64)[:, None] * SIZE + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit(do_not_specialize=ANY_COUNT)
def _down(
    x, weight, scales, out, rows, block_expert, total, blocks, HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x downᵀ, times the weight of the choice, for one block of rows and one tile of columns."""
    block, tile = _tile(tl.program_id(0), blocks, (HIDDEN + COLUMNS - 1) // COLUMNS, 8)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))
    known = row < total
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    step = tl.arange(0, DEPTH)
    a = x + row.to(tl.int64)[:, None] * SIZE + step[None, :]
    b = weight + expert * (SIZE * HIDDEN) + column[None, :] * SIZE + step[:, None]
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        left = step < SIZE - start
        tokens = tl.load(a + start, mask=known[:, None] & left[None, :], other=0.0)
        matrix = tl.load(b + start, mask=inside[None, :] & left[:, None], other=0.0)
        result = tl.dot(tokens, matrix, result, input_precision="ieee")
    result = result * tl.load(scales + row, mask=known, other=0.0)[:, None]
    to = out + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit
def _combine(parts, out, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(parts + (token * TOP_K + k) * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=inside)


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe.route`, but for the experts, which are int32, and of equals the first. logits: contiguous."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    _route[(tokens,)](
        logits, weights, chosen, EXPERTS=experts, EXPERTS_2=triton.next_power_of_2(experts), TOP_K=top_k,
        TOP_K_2=triton.next_power_of_2(top_k), NORMALIZE=normalize, num_warps=1,
    )  # fmt: skip
    return weights, chosen


def align(chosen: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by expert, in blocks of `block` rows that each belong to one.

    chosen: [tokens, top_k] int32 experts. Returns (rows [blocks · block] int32, with the number of rows where a block
    is not full; expert of each block [blocks] int32, -1 for those not in use). blocks is the most that any routing
    could need.
    """
    total = chosen.numel()
    # An expert's last block may be partly empty, and at most every expert, or every row, has one such.
    blocks = total // block + min(total, experts)
    rows = torch.empty(blocks * block, dtype=torch.int32, device=chosen.device)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=chosen.device)
    _align[(experts,)](
        chosen, rows, block_expert, total, blocks, EXPERTS=experts, BINS=triton.next_power_of_2(experts + 1),
        CHUNK=256 if total <= 1024 else 4096, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return rows, block_expert


def moe_mlp(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, normalize: bool
) -> torch.Tensor:
    """See `moe.moe_mlp`. All contiguous."""
    tokens, hidden = x.shape
    experts, _, size = down.shape
    out = torch.empty_like(x)
    if not tokens:
        return out
    total = tokens * top_k
    tiles = choose_tiles(total, experts, x.dtype)
    weights, chosen = route(logits, top_k, normalize)
    rows, block_expert = align(chosen, experts, tiles.rows)
    blocks = len(block_expert)
    activated = x.new_empty(total, size)
    parts = x.new_empty(total, hidden)
    shared = dict(HIDDEN=hidden, SIZE=size, ROWS=tiles.rows, DEPTH=tiles.depth)
    launch = dict(num_warps=tiles.warps, num_stages=tiles.stages)
    _gate_up[(blocks * triton.cdiv(size, tiles.gate_up_columns),)](
        x, gate_up, activated, rows, block_expert, total, blocks,
        TOP_K=top_k, COLUMNS=tiles.gate_up_columns, **shared, **launch,
    )  # fmt: skip
    _down[(blocks * triton.cdiv(hidden, tiles.down_columns),)](
        activated, down, weights, parts, rows, block_expert, total, blocks,
        COLUMNS=tiles.down_columns, **shared, **launch,
    )  # fmt: skip
    block = min(2048, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, block))](parts, out, HIDDEN=hidden, TOP_K=top_k, BLOCK=block, num_warps=4)
    return out
