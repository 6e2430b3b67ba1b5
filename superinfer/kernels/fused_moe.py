"""The feed-forward layer of mixture-of-experts models in five Triton kernels, without asking the device anything.
For very many rows torch's grouped product takes the place of two of them.

Rows are (token, choice) pairs, row = token · top_k + choice. `_route` picks experts, `_align` lists the rows of each
expert in blocks of its own, two grouped matrix products run over the blocks, `_combine` sums a token's choices. How
many blocks there are depends on the routing, which only the device knows; the grids have room for the most there can
be, and programs without a block end at once. So shapes follow from the number of tokens alone, as CUDA graphs need it.

The reference is `moe.moe_mlp`. Products are summed in float32; in half precision the activations between the two
products and a token's choices before their sum are rounded to it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from superinfer.kernels.activation import silu_and_mul

# Arguments that change from step to step: Triton would compile a kernel anew for those that 16 divides, while a request
# waits.
ANY_COUNT = ["total", "blocks"]


class Tile(NamedTuple):
    """How one product is computed: columns and depth of a tile, warps, and how many tiles are on their way."""

    columns: int
    depth: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """rows: of a block, in both products."""

    rows: int
    gate_up: Tile
    down: Tile


# Rows an expert has on average, up to which tiles are taken. Decodes read each expert's weights once, whatever the
# rows: a block must be tall enough for most experts' rows, and deep tiles keep the memory busy. The quickest of 722 for
# Mixtral 8x7B's and Qwen3-30B-A3B's layers on one H200 (seen once, in no file; `benchmarks/gpu_moe.py` measures them).
TILES = (
    (8, Tiles(16, Tile(64, 128, 4, 4), Tile(128, 128, 4, 3))),
    (16, Tiles(32, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3))),
    (32, Tiles(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 4))),
    (48, Tiles(64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))),
)
TALLEST = Tiles(128, Tile(128, 64, 8, 4), Tile(256, 64, 8, 4))
# For tests and small models: float32 products run without tensor cores.
FLOAT32_TILES = Tiles(16, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))
# From so many rows an expert, torch's grouped product is quicker (one H200: 5.3 ms against 7.1 for Mixtral's gate and
# up, 2,048 rows an expert), by more than gathering the rows and a kernel for the activation take.
GROUPED_FROM = 512
GROUPED_LEAST = 2048  # an expert's width; narrower ones are quicker here


def choose_tiles(rows: int, experts: int, dtype: torch.dtype, shared_memory: int = 1 << 30) -> Tiles:
    """By the rows an expert has on average. shared_memory: bytes that a program may have."""
    if dtype.itemsize == 4:
        return FLOAT32_TILES
    chosen = next((tiles for most, tiles in TILES if rows <= most * experts), TALLEST)
    return Tiles(
        chosen.rows,
        _fit(chosen.gate_up, chosen.rows + 2 * chosen.gate_up.columns, shared_memory),
        _fit(chosen.down, chosen.rows + chosen.down.columns, shared_memory),
    )


def _fit(tile: Tile, lines: int, shared_memory: int) -> Tile:
    """The same with fewer or shallower tiles on their way, for GPUs with less shared memory. lines: rows and columns of
    a tile together, two bytes a number."""
    depth = tile.depth
    while depth > 32 and 2 * lines * depth * 2 > shared_memory:
        depth //= 2
    stages = max(2, min(tile.stages, shared_memory // (lines * depth * 2)))
    return Tile(tile.columns, depth, tile.warps, stages)


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
def _combine(
    parts, places, scales, out, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, SORTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of a token's choices. SORTED: their rows lie at `places` and are still to be scaled by `scales`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        place = tl.load(places + row).to(tl.int64) if SORTED else row
        part = tl.load(parts + place * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
        if SORTED:
            part *= tl.load(scales + row)
        total += part
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
    weights, chosen = route(logits, top_k, normalize)
    if total >= GROUPED_FROM * experts and size >= GROUPED_LEAST and takes_grouped(x):
        return _grouped(x, weights, chosen, gate_up, down)
    tiles = choose_tiles(total, experts, x.dtype, _shared_memory(x.device))
    rows, block_expert = align(chosen, experts, tiles.rows)
    blocks = len(block_expert)
    activated = x.new_empty(total, size)
    parts = x.new_empty(total, hidden)
    shared = dict(HIDDEN=hidden, SIZE=size, ROWS=tiles.rows)
    columns, depth, warps, stages = tiles.gate_up
    _gate_up[(blocks * triton.cdiv(size, columns),)](
        x, gate_up, activated, rows, block_expert, total, blocks,
        TOP_K=top_k, COLUMNS=columns, DEPTH=depth, **shared, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    columns, depth, warps, stages = tiles.down
    _down[(blocks * triton.cdiv(hidden, columns),)](
        activated, down, weights, parts, rows, block_expert, total, blocks,
        COLUMNS=columns, DEPTH=depth, **shared, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return combine(parts, out, top_k)


def combine(
    parts: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    places: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each token's rows. parts: [tokens · top_k, hidden], scaled and in the tokens' order; or with places
    [tokens · top_k], where each row lies, and scales [tokens, top_k]. out: [tokens, hidden], which is returned."""
    tokens, hidden = out.shape
    block = min(2048, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, block))](
        parts, places, scales, out, HIDDEN=hidden, TOP_K=top_k, SORTED=places is not None, BLOCK=block, num_warps=4
    )
    return out


def takes_grouped(x: torch.Tensor) -> bool:
    """Whether torch's grouped product is made for this: bfloat16, its kernels on Hopper."""
    return x.dtype == torch.bfloat16 and (not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9)


def _grouped(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """For many rows: sorted by expert, each expert's rows are one slice, whose bounds stay on the device."""
    experts, top_k = len(down), chosen.shape[1]
    sorted_experts, order = chosen.flatten().sort(stable=True)
    every = torch.arange(experts, dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
    rows = x.index_select(0, order // top_k)
    activated = silu_and_mul(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    parts = F.grouped_mm(activated, down.transpose(1, 2), offs=ends)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
    return combine(parts, torch.empty_like(x), top_k, places, weights)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
