"""Products of up to 64 rows on Hopper: `skinny_tma.cu`, and how each is cut.

A decode step of few sequences is as long as its weights take to be read. Kernels that follow each other without a gap
come closest: here weights are on their way before the kernel in front is over, and gate, up and what they gate are one
kernel, so that nothing between attention and the next layer's waits for a launch. A program has its rows of the weight
for a whole part of the depth, so that it reads that part of x once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from superinfer.kernels.hopper import RESERVED_BYTES, SHARED_BYTES, early_stages, multiprocessors_of
from superinfer.kernels.tensor_map import BOX, tensor_map

MOST_ROWS = 64
MOST_WARPS, LEAST_WARPS = 8, 4  # that compute
LEAST_STAGES = 4  # where a stage is two boxes
MOST_PARTS = 8  # of the depth: more are more sums to add up, fewer more reads of x
BEST_SHARE = 7  # tiles of a program: 6 for qkv and 8 for o and down of Llama-3-8B are the quickest (h200-skinny.json)
EVEN = 1.1  # how much more than its share the busiest multiprocessor may have
MOST_TOGETHER = 2  # programs on one multiprocessor, where one cannot have its whole share
MOST_ROWS_TOGETHER = 32  # above, two have not enough registers
EARLY_BYTES = 48 << 10  # of weights on their way before the kernel in front is over
_BARRIERS = 24  # bytes for each stage
_LINE = BOX * 2  # bytes of a box's row


class Cut(NamedTuple):
    """parts: of the depth, added up by who reads the product. warps: of a program, each with `tiles` times 16 rows of
    the weight for itself. boxes: of 64 of the depth, that are a stage. stages: on their way."""

    parts: int
    warps: int
    tiles: int
    boxes: int
    stages: int

    @property
    def share(self) -> int:
        """Of a program: tiles of 16 rows of the weight."""
        return self.warps * self.tiles

    def shared_bytes(self, rows: int) -> int:
        """Of a program, for a product of so many rows."""
        return self.stages * (self.boxes * (self.share * 16 + 8 * _eighths(rows)) * _LINE + _BARRIERS)

    def programs(self, outputs: int) -> int:
        """Of one part. outputs: rows of the weight, gates too."""
        return -(-outputs // (self.share * 16))

    def with_most_stages(self, rows: int, together: int = 1) -> Cut:
        """As many as shared memory has room for, 0 where it has none. together: programs on one multiprocessor."""
        room = (SHARED_BYTES + RESERVED_BYTES) // together - RESERVED_BYTES
        return self._replace(stages=room // self._replace(stages=1).shared_bytes(rows))


class Routed(NamedTuple):
    """One row that goes through several of many matrices. experts: [choices] int32, which of them, each in their
    range; scales: [choices] float32, by which the products are multiplied if they are not gated."""

    experts: torch.Tensor
    scales: torch.Tensor


def _eighths(rows: int) -> int:
    """Of rows, as the kernel is compiled for."""
    return -(-rows // 8)


@functools.cache
def choose_cut(rows: int, outputs: int, depth: int, multiprocessors: int, gated: bool = False) -> Cut | None:
    """Of a product [rows, depth] x [depth, outputs]; None where no cut gives all multiprocessors about the same share.
    gated: of all outputs half are gates; then the depth is not cut."""
    if not 0 < rows <= MOST_ROWS or not depth or outputs % (32 if gated else 16):
        return None
    for together in range(1, MOST_TOGETHER + 1 if rows <= MOST_ROWS_TOGETHER else 2):
        found = list(_even_cuts(outputs, depth, multiprocessors * together, gated))
        if found:
            best = min(found, key=lambda cut: (abs(cut.share - BEST_SHARE), cut.parts))
            return _with_boxes(best, rows, depth, together)
    return None


def _even_cuts(outputs: int, depth: int, places: int, gated: bool) -> Iterator[Cut]:
    """Those with a program for nearly each of the places. Boxes and stages are still to be found."""
    tiles = outputs // 16
    for parts, tall in itertools.product((1,) if gated else range(1, MOST_PARTS + 1), (2,) if gated else (2, 1)):
        if depth % (parts * BOX):
            continue
        for warps in range(LEAST_WARPS, MOST_WARPS + 1):
            cut = Cut(parts, warps, tall, 1, 0)
            if cut.programs(outputs) * parts <= places and cut.share * places <= EVEN * tiles * parts:
                yield cut


def _with_boxes(cut: Cut, rows: int, depth: int, together: int) -> Cut:
    """With stages of two boxes where enough of them have room: then 256 bytes of a weight's row follow each other."""
    two = cut._replace(boxes=2).with_most_stages(rows, together)
    if depth % (cut.parts * 2 * BOX) == 0 and two.stages >= LEAST_STAGES:
        return two
    return cut.with_most_stages(rows, together)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """x · weightᵀ as [parts, rows, outputs] float32, to be added up by who reads it; None where this kernel is not the
    one to take. x: contiguous [rows, depth]; weight: contiguous [outputs, depth], both bfloat16 or float16."""
    cut = cut_for(x, weight, gated=False)
    return None if cut is None else run(x, weight, cut)


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) · up of x · weightᵀ = [gate, up] as [rows, outputs / 2] in x's type; None as for `linear_parts`."""
    cut = cut_for(x, weight, gated=True)
    return None if cut is None else run(x, weight, cut, gated=True)


def run(
    x: torch.Tensor, weight: torch.Tensor, cut: Cut, gated: bool = False, routed: Routed | None = None
) -> torch.Tensor:
    """The product of 1 to 64 rows cut as given: see `linear_parts`, or `gated`. Raises ValueError for a cut that the
    kernel cannot take.

    routed: weight is [experts, outputs, depth]; x has one row, or one for each choice. Returns [choices, outputs / 2]
    if gated, else [choices · parts, 1, outputs].
    """
    outputs, depth = weight.shape[-2:]
    rows, choices = (1, len(routed.experts)) if routed is not None else (len(x), 1)
    _check(cut, rows, outputs, depth, gated)
    if routed is not None and len(x) not in (1, choices):
        raise ValueError(f"{len(x)} rows for {choices} choices: there must be one, or one for each")
    shape = (rows * choices, outputs // 2) if gated else (choices * cut.parts, rows, outputs)
    out = torch.empty(shape, dtype=x.dtype if gated else torch.float32, device=x.device)
    is_half, is_routed = x.dtype == torch.float16, routed is not None
    _kernel(x.device.index, _eighths(rows), *cut[1:], gated, is_routed, is_half).launch(x, weight, out, cut, routed)
    return out


def _check(cut: Cut, rows: int, outputs: int, depth: int, gated: bool) -> None:
    if not 0 < rows <= MOST_ROWS:
        raise ValueError(f"{rows} rows: the kernel takes 1 to {MOST_ROWS}")
    if outputs % (32 if gated else 16):
        raise ValueError(f"{outputs} outputs are no multiple of {32 if gated else 16}")
    if min(cut) < 1 or cut.warps > MOST_WARPS or cut.tiles > 2 or (gated and (cut.parts, cut.tiles) != (1, 2)):
        raise ValueError(
            f"{cut} is none of the kernel's: 1 to {MOST_WARPS} warps, 1 or 2 tiles; gated: 1 part, 2 tiles"
        )
    if depth % (cut.parts * cut.boxes * BOX):
        raise ValueError(f"a depth of {depth} has no {cut.parts} parts of a multiple of {cut.boxes * BOX}")
    if cut.shared_bytes(rows) > SHARED_BYTES:
        raise ValueError(f"{cut} needs {cut.shared_bytes(rows)} bytes of shared memory, there are {SHARED_BYTES}")


class SkinnyKernel:
    """Compiled for a number of eighths of rows and a cut. One stream at a time."""

    def __init__(
        self, eighths: int, warps: int, tiles: int, boxes: int, stages: int, gated: bool, routed: bool, half: bool
    ) -> None:
        """half: float16, else bfloat16. Raises CudaFailure where it cannot be compiled or loaded."""
        from superinfer.kernels.nvrtc import Arguments, CudaKernel  # needs cuda-bindings, which come with `cuda`

        constants = compile_constants(eighths, Cut(1, warps, tiles, boxes, stages), gated, half, routed)
        self._kernel = CudaKernel("skinny_tma.cu", "few_rows", constants, 32 * (warps + 1), SHARED_BYTES)
        self._arguments = Arguments(7, maps=2)
        self._gated = gated

    def launch(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: Cut, routed: Routed | None = None
    ) -> None:
        """In the current stream; may be captured. out: as `run` makes it. Raises CudaFailure for tensors that cannot be
        copied by boxes: those not at a multiple of 16 bytes."""
        assert x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
        assert x.shape[1] == weight.shape[-1]
        depth, (outputs, rows) = x.shape[1], (out.shape[-1], len(x) if routed is None else 1)
        matrices = weight.numel() // depth  # rows of all
        tall = cut.warps * 16 * (1 if self._gated else cut.tiles)
        self._arguments.maps[0] = tensor_map(x.data_ptr(), len(x), depth, 8 * _eighths(rows))
        self._arguments.maps[1] = tensor_map(weight.data_ptr(), matrices, depth, tall)
        choice = (0, 0, 0) if routed is None else (routed.experts.data_ptr(), routed.scales.data_ptr(), int(len(x) > 1))
        self._arguments.words[:] = out.data_ptr(), rows, outputs, depth // cut.parts, *choice
        grid = cut.programs(weight.shape[-2]), cut.parts, 1 if routed is None else len(routed.experts)
        self._kernel.launch(grid, cut.shared_bytes(rows), self._arguments.places)


def compile_constants(eighths: int, cut: Cut, gated: bool, half: bool, routed: bool = False) -> dict[str, int]:
    """What `skinny_tma.cu` is compiled with."""
    early = early_stages(EARLY_BYTES, cut.boxes * cut.share * 16 * _LINE, cut.stages)
    return dict(
        EIGHTHS=eighths, WARPS=cut.warps, TILES=cut.tiles, BOXES=cut.boxes, STAGES=cut.stages, EARLY=early,
        GATED=int(gated), ROUTED=int(routed), HALF=int(half),
    )  # fmt: skip


@functools.cache
def _kernel(
    device: int, eighths: int, warps: int, tiles: int, boxes: int, stages: int, gated: bool, routed: bool, half: bool
) -> SkinnyKernel:
    with torch.cuda.device(device):
        return SkinnyKernel(eighths, warps, tiles, boxes, stages, gated, routed, half)


def cut_for(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> Cut | None:
    """How a product of as many rows, of x's type, is cut; None where this kernel is not the one to take. weight:
    [outputs, depth], or [experts, outputs, depth]."""
    if not 0 < len(x) <= MOST_ROWS or x.element_size() != 2 or not x.is_cuda:
        return None
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    multiprocessors = multiprocessors_of(x.device.index)
    return choose_cut(len(x), *weight.shape[-2:], multiprocessors, gated) if multiprocessors else None
