"""Products of up to eight rows on Hopper and later: `skinny_hopper.cu`, and how each is cut.

A decode step of a few sequences is as long as its weights take to be read. Kernels that follow each other without a gap
come closest: here gate, up and what they gate are one, so that nothing between attention and the next layer's waits
for a launch. From some rows on the Triton products (`skinny`) and cuBLAS are as quick or quicker.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from superinfer.kernels.nvrtc import SHARED_BYTES, Arguments, CudaKernel

MOST_ROWS = 8
GROUP = 16  # rows of a weight that a program computes together
WARPS = 8
DEEPEST, SHALLOWEST = 1024, 768  # tiles: copies of a row are 1.5 to 2 KB
LONGEST_PART = 4096  # of the depth, where it may be cut
MOST_STAGES = 5
LEAST_STAGES = 3
EVEN = 1.1  # how much more than its share the busiest multiprocessor may have
_BARRIERS = 128  # bytes
_SUMS = 20 * 4  # bytes for a row of x in a warp's sums


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
        return _BARRIERS + tiles + WARPS * 8 * _eighths(rows) * _SUMS + rows * (depth // self.parts * 2 + 16)


def _eighths(rows: int) -> int:
    """Of rows, as the kernel is compiled for."""
    return -(-rows // 8)


@functools.cache
def choose_cut(rows: int, outputs: int, depth: int, multiprocessors: int, gated: bool = False) -> Cut | None:
    """Of a product [rows, depth] x [depth, outputs]; None where it is not for this kernel. gated: of all outputs half
    are gates; then the depth is not cut."""
    if rows > MOST_ROWS or outputs % (GROUP * 2 if gated else GROUP):
        return None
    groups = outputs // GROUP
    for parts in (1,) if gated else range(1, 17):
        part = depth // parts
        deep = next((deep for deep in range(DEEPEST, SHALLOWEST - 1, -128) if part % deep == 0), 0)
        if depth % parts or not deep or (part > LONGEST_PART and not gated):
            continue
        share = -(-groups // (multiprocessors // parts))
        if share * multiprocessors > EVEN * groups * parts:
            continue
        programs = -(-groups // share)
        for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
            cut = Cut(parts, programs, deep, stages)
            if cut.shared_bytes(rows, depth) <= SHARED_BYTES:
                return cut
    return None


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """x · weightᵀ as [parts, rows, outputs] float32, to be added up by who reads it; None where this kernel is not the
    one to take. x: contiguous [rows, depth]; weight: contiguous [outputs, depth], both bfloat16 or float16."""
    cut = _cut_for(x, weight, gated=False)
    return None if cut is None else run(x, weight, cut)


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) · up of x · weightᵀ = [gate, up] as [rows, outputs / 2] in x's type; None as for `linear_parts`."""
    cut = _cut_for(x, weight, gated=True)
    return None if cut is None else run(x, weight, cut, gated=True)


def run(x: torch.Tensor, weight: torch.Tensor, cut: Cut, gated: bool = False) -> torch.Tensor:
    """The product cut as given: see `linear_parts`, or `gated`."""
    rows, outputs = len(x), len(weight)
    shape = (rows, outputs // 2) if gated else (cut.parts, rows, outputs)
    out = torch.empty(shape, dtype=x.dtype if gated else torch.float32, device=x.device)
    kernel = _kernel(x.device.index, _eighths(rows), cut.depth, cut.stages, gated, x.dtype == torch.float16)
    kernel.launch(x, weight, out, cut)
    return out


class SkinnyKernel:
    """Compiled for a number of eighths of rows, and of stages, and for a depth of tiles. One stream at a time."""

    def __init__(self, eighths: int, depth: int, stages: int, gated: bool, half: bool) -> None:
        """half: float16, else bfloat16. Raises CudaFailure where it cannot be compiled or loaded."""
        constants = dict(EIGHTHS=eighths, DEPTH=depth, STAGES=stages, GATED=int(gated), HALF=int(half))
        self._kernel = CudaKernel("skinny_hopper.cu", "few_rows", constants, 32 * (WARPS + 1), SHARED_BYTES)
        self._arguments = Arguments(7)

    def launch(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: Cut) -> None:
        """In the current stream; may be captured. out: as `run` makes it."""
        assert x.is_contiguous() and weight.is_contiguous()
        rows, depth = x.shape
        self._arguments.words[:] = (
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, depth, out.shape[-1], depth // cut.parts,
        )  # fmt: skip
        self._kernel.launch((cut.programs, cut.parts), cut.shared_bytes(rows, depth), self._arguments.places)


@functools.cache
def _kernel(device: int, eighths: int, depth: int, stages: int, gated: bool, half: bool) -> SkinnyKernel:
    with torch.cuda.device(device):
        return SkinnyKernel(eighths, depth, stages, gated, half)


def _cut_for(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> Cut | None:
    if not 0 < len(x) <= MOST_ROWS or x.element_size() != 2 or not x.is_cuda:
        return None
    multiprocessors = _multiprocessors(x.device.index)
    return choose_cut(len(x), *weight.shape, multiprocessors, gated) if multiprocessors else None


@functools.cache
def _multiprocessors(device: int) -> int:
    """0: not a Hopper, for which alone the kernel is compiled."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
