"""Products of few rows on Hopper and later: `skinny_hopper.cu`, and how each is cut."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from superinfer.kernels.nvrtc import SHARED_BYTES, Arguments, CudaKernel

GROUP = 16  # rows of a weight that a program computes together
WARPS = 8
MOST_DEPTH = 1024  # of a tile: copies of 2 KB
BARRIERS = 128  # bytes
SUMS = 20 * 4  # bytes for a row of x in a warp's sums


class Cut(NamedTuple):
    """parts: of the depth, added up by who reads the product. programs: of one part. depth: of a tile. stages: tiles on
    their way."""

    parts: int
    programs: int
    depth: int
    stages: int

    def shared_bytes(self, rows: int, depth: int) -> int:
        """Of a program, for a product of so many rows and such depth."""
        tiles = self.stages * GROUP * (self.depth * 2 + 16)
        return BARRIERS + tiles + WARPS * 8 * eighths(rows) * SUMS + rows * (depth // self.parts * 2 + 16)


def eighths(rows: int) -> int:
    """Of rows, as the kernel has them: 1, 2, 4 or 8 times 8."""
    return 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 else 8


def tile_depth(part: int) -> int:
    """The deepest tile that a part of the depth is a multiple of; 0: none."""
    return next((deep for deep in range(MOST_DEPTH, 0, -128) if part % deep == 0), 0)


class SkinnyKernel:
    """Compiled for one number of eighths, depth of tiles, number of stages."""

    def __init__(self, eighths: int, depth: int, stages: int, gated: bool, half: bool) -> None:
        constants = dict(EIGHTS=eighths, DEPTH=depth, STAGES=stages, GATED=int(gated), HALF=int(half))
        self._kernel = CudaKernel("skinny_hopper.cu", "few_rows", constants, 32 * (WARPS + 1), SHARED_BYTES)
        self._arguments = Arguments(7)

    def launch(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: Cut) -> None:
        """x: contiguous [rows, depth]; weight: contiguous [outputs, depth]; out: as `run` makes it."""
        rows, depth = x.shape
        self._arguments.words[:] = (
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, depth, out.shape[-1], depth // cut.parts,
        )  # fmt: skip
        self._kernel.launch((cut.programs, cut.parts), cut.shared_bytes(rows, depth), self._arguments.places)


@functools.cache
def _kernel(device: int, eighths: int, depth: int, stages: int, gated: bool, half: bool) -> SkinnyKernel:
    with torch.cuda.device(device):
        return SkinnyKernel(eighths, depth, stages, gated, half)


def run(x: torch.Tensor, weight: torch.Tensor, cut: Cut, gated: bool = False) -> torch.Tensor:
    """float32 [parts, rows, outputs]; gated: [rows, outputs / 2] in x's type."""
    rows, outputs = len(x), len(weight)
    shape = (rows, outputs // 2) if gated else (cut.parts, rows, outputs)
    out = torch.empty(shape, dtype=x.dtype if gated else torch.float32, device=x.device)
    if rows:
        kernel = _kernel(x.device.index, eighths(rows), cut.depth, cut.stages, gated, x.dtype == torch.float16)
        kernel.launch(x, weight, out, cut)
    return out
