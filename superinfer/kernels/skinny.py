"""Matrix products of few rows, as in decode steps: bound by reading the weights once.

cuBLAS reads the smaller matrices of a layer at two thirds of the memory's speed there (one H200, Llama-3-8B's
4096 x 4096 with one row: 12.7 µs against 7.9 for the bytes; seen once, in no file). Here rows of weights and parts of
the sum are spread so that every multiprocessor has the same share, weights are fetched before the kernel in front is
over (`launch`), and whoever consumes the product adds the parts up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from superinfer.kernels.launch import overlap, prefetch

MOST_ROWS = 64  # above, cuBLAS is as quick or quicker
COLUMNS = 64
EVEN = 1.1  # how much more than its share the busiest multiprocessor may have
SHARED_MEMORY = 220 << 10  # of a multiprocessor, for tiles on their way
SPLITS = (1, 2, 4, 8)
MOST_TOGETHER = 3  # programs on one multiprocessor: each has tiles on their way
PREFETCHED = 2  # tiles of each program


class Tiles(NamedTuple):
    """rows, columns, depth of a tile; parts of the sum; how many tiles are on their way; warps."""

    rows: int
    columns: int
    depth: int
    parts: int
    stages: int
    warps: int


@functools.cache
def choose_tiles(rows: int, columns: int, depth: int, multiprocessors: int) -> Tiles | None:
    """Of a product [rows, depth] x [depth, columns]; None where it is not for this kernel."""
    if rows > MOST_ROWS or columns % COLUMNS or depth % 128 or columns > 8192:
        return None
    padded = max(16, triton.next_power_of_2(rows))
    even = []
    for parts in SPLITS:
        programs = columns // COLUMNS * parts
        busiest = -(-programs // multiprocessors)
        if depth % (parts * 128) == 0 and busiest <= MOST_TOGETHER and busiest * multiprocessors <= EVEN * programs:
            even.append((parts, busiest))
    if not even:
        return None
    parts, together = even[0]
    if together > 1 and padded > 32:
        return None
    deep = together == 1 and padded == 16 and depth % (parts * 256) == 0
    tile_depth = 256 if deep else 64 if together > 1 and padded > 16 else 128
    stage = (COLUMNS + padded) * tile_depth * 2
    stages = max(2, min(4 if padded == 16 else 6, SHARED_MEMORY // together // stage))
    return Tiles(padded, COLUMNS, tile_depth, parts, stages, 8 if deep and depth >= 8192 else 4)


@triton.jit
def _skinny(
    x, weight, out, count, outputs, depth, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs of all rows, over `part` of the depth. Weights are the taller operand: rows here are few."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * part
    row, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    start = weight + column.to(tl.int64)[:, None] * depth + first
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        lines = tl.arange(0, DEPTH // 64) * 64
        for tile in tl.static_range(PREFETCHED):
            prefetch(start + (tile * DEPTH + lines)[None, :])
        tl.extra.cuda.gdc_wait()
    weights = start + d[None, :]
    inputs = x + row[None, :] * depth + first + d[:, None]
    there = (row < count)[None, :]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for at in tl.range(0, part, DEPTH, num_stages=STAGES):
        total = tl.dot(tl.load(weights + at), tl.load(inputs + at, mask=there, other=0.0), total)
    to = out + (tl.program_id(1) * count + row)[None, :].to(tl.int64) * outputs + column[:, None]
    tl.store(to, total, mask=there)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """x · weightᵀ as [parts, rows, outputs] float32, to be added up by who reads it; None where this kernel is not the
    one to take. x: contiguous [rows, depth]; weight: contiguous [outputs, depth], both bfloat16 or float16."""
    if not x.is_cuda or x.element_size() != 2 or len(x) > MOST_ROWS:
        return None
    rows, depth = x.shape
    tiles = choose_tiles(rows, len(weight), depth, _multiprocessors(x.device.index or 0))
    return None if tiles is None or not rows else run(x, weight, tiles)


def run(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The product with the tiles given."""
    (rows, depth), outputs = x.shape, len(weight)
    out = torch.empty(tiles.parts, rows, outputs, dtype=torch.float32, device=x.device)
    part = depth // tiles.parts
    _skinny[(outputs // tiles.columns, tiles.parts)](
        x, weight, out, rows, outputs, depth, part,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, STAGES=tiles.stages,
        PREFETCHED=min(PREFETCHED, part // tiles.depth),
        num_warps=tiles.warps, num_stages=tiles.stages, **overlap(x),
    )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: int) -> int:
    if torch.cuda.get_device_capability(device)[0] < 9:
        return 1 << 20  # not measured there: no product has programs for half as many
    return torch.cuda.get_device_properties(device).multi_processor_count
