"""Products of 33 to 128 rows on Hopper: `wide_tma.cu`, and how each is cut.

Too many rows for warps that each read all of them from shared memory, as those of `skinny_tma` do: warpgroup products
read both operands there, once for 64 rows by up to 256 of the weight. As there, weights are on their way before the
kernel in front is over, and gate, up and what they gate are one kernel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from superinfer.kernels.hopper import SHARED_BYTES, early_stages, multiprocessors_of
from superinfer.kernels.tensor_map import BOX, tensor_map
from superinfer.kernels.warpgroup import made_for

MOST_ROWS = 128  # for more warpgroups sums over 224 columns have not enough registers
PARTS_ROWS = 33, 112  # of products that are added up: of more rows adding takes as long as is gained
GATED_ROWS = 49, 128  # of gates: of fewer, which fill the warpgroups less, `skinny_tma` is quicker
GROUP = 64  # rows of x of a warpgroup
LEAST_COLUMNS, MOST_COLUMNS = 96, 256  # of a tile; of fewer, x is read too often
LEAST_STAGES = 3
MOST_PARTS = 4  # of the depth: more are more sums to write and to add up
FULL = 0.9  # share of the multiprocessors that have to have a program
EARLY_BYTES = 64 << 10  # of weights on their way before the kernel in front is over
_BARRIERS = 24  # bytes for each stage
_LINE = BOX * 2  # bytes of a box's row


class Cut(NamedTuple):
    """parts: of the depth, added up by who reads the product. columns: rows of the weight in a tile, gates too.
    stages: on their way."""

    parts: int
    columns: int
    stages: int

    def shared_bytes(self, rows: int) -> int:
        """Of a program, for a product of so many rows."""
        return self.stages * ((self.columns + GROUP * _groups(rows)) * _LINE + _BARRIERS)

    def with_most_stages(self, rows: int) -> Cut:
        """As many as shared memory has room for, 0 where it has none."""
        return self._replace(stages=SHARED_BYTES // self._replace(stages=1).shared_bytes(rows))

    def tiles(self, outputs: int) -> int:
        """Of one part. outputs: rows of the weight, gates too."""
        return -(-outputs // self.columns)


def _groups(rows: int) -> int:
    """Warpgroups of a program."""
    return -(-rows // GROUP)


@functools.cache
def choose_cut(rows: int, outputs: int, depth: int, multiprocessors: int, gated: bool = False) -> Cut | None:
    """Of a product [rows, depth] x [depth, outputs]; None where it is not for this kernel. gated: of all outputs half
    are gates; then the depth is not cut. Otherwise it is cut as seldom as fills all multiprocessors at once."""
    (least, most), whole = (GATED_ROWS, 16) if gated else (PARTS_ROWS, 8)
    if not least <= rows <= most or not depth or outputs % (2 * whole):
        return None
    every = [Cut(1, columns, 0).with_most_stages(rows) for columns in range(LEAST_COLUMNS, MOST_COLUMNS + 1, whole)]
    every = [cut for cut in every if cut.stages >= LEAST_STAGES]

    def turns(cut: Cut) -> int:
        """Tiles of the busiest program."""
        return -(-cut.tiles(outputs) * cut.parts // multiprocessors)

    for parts in range(1, 2 if gated else MOST_PARTS + 1):
        cuts = [cut._replace(parts=parts) for cut in every] if depth % (parts * BOX) == 0 else []
        full = [cut for cut in cuts if cut.tiles(outputs) * parts >= FULL * turns(cut) * multiprocessors]
        if not gated:
            full = [cut for cut in full if turns(cut) == 1]
        if full:
            return min(full, key=lambda cut: turns(cut) * (cut.columns + GROUP * _groups(rows)))
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


def _cut_for(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> Cut | None:
    if len(x) > MOST_ROWS or x.element_size() != 2 or not x.is_cuda:
        return None
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    multiprocessors = multiprocessors_of(x.device.index)
    return choose_cut(len(x), *weight.shape, multiprocessors, gated) if multiprocessors else None


def run(x: torch.Tensor, weight: torch.Tensor, cut: Cut, gated: bool = False) -> torch.Tensor:
    """The product of 1 to 128 rows cut as given: see `linear_parts`, or `gated`. Raises ValueError for a cut that the
    kernel cannot take."""
    rows, (outputs, depth) = len(x), weight.shape
    _check(cut, rows, outputs, depth, gated)
    shape = (rows, outputs // 2) if gated else (cut.parts, rows, outputs)
    out = torch.empty(shape, dtype=x.dtype if gated else torch.float32, device=x.device)
    _kernel(x.device.index, _groups(rows), *cut[1:], gated, x.dtype == torch.float16).launch(x, weight, out, cut)
    return out


def _check(cut: Cut, rows: int, outputs: int, depth: int, gated: bool) -> None:
    whole = 16 if gated else 8
    if not 0 < rows <= MOST_ROWS:
        raise ValueError(f"{rows} rows: the kernel takes 1 to {MOST_ROWS}")
    if outputs % (2 * whole):
        raise ValueError(f"{outputs} outputs are no multiple of {2 * whole}")
    if min(cut) < 1 or cut.columns % whole or cut.columns > MOST_COLUMNS or (gated and cut.parts != 1):
        raise ValueError(
            f"{cut} is none of the kernel's: columns are a multiple of {whole}, to {MOST_COLUMNS}; gated: 1 part"
        )
    if depth % (cut.parts * BOX):
        raise ValueError(f"a depth of {depth} has no {cut.parts} parts of a multiple of {BOX}")
    if cut.shared_bytes(rows) > SHARED_BYTES:
        raise ValueError(f"{cut} needs {cut.shared_bytes(rows)} bytes of shared memory, there are {SHARED_BYTES}")


class WideKernel:
    """Compiled for a number of warpgroups and a cut. One stream at a time."""

    def __init__(self, groups: int, columns: int, stages: int, gated: bool, half: bool) -> None:
        """half: float16, else bfloat16. Raises CudaFailure where it cannot be compiled or loaded."""
        from superinfer.kernels.nvrtc import Arguments, CudaKernel  # needs cuda-bindings, which come with `cuda`

        constants = compile_constants(groups, Cut(1, columns, stages), gated, half)
        threads = 32 * (4 * groups + 1)
        self._kernel = CudaKernel("wide_tma.cu", "some_rows", constants, threads, SHARED_BYTES, made_for(columns))
        self._arguments = Arguments(4, maps=2)
        self._tall = columns // 2 if gated else columns
        self._input_rows = GROUP * groups

    def launch(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: Cut) -> None:
        """In the current stream; may be captured. out: as `run` makes it. Raises CudaFailure for tensors that cannot be
        copied by boxes: those not at a multiple of 16 bytes."""
        assert x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
        assert x.shape[1] == weight.shape[1]
        (rows, depth), outputs = x.shape, out.shape[-1]
        self._arguments.maps[0] = tensor_map(x.data_ptr(), rows, depth, self._input_rows)
        self._arguments.maps[1] = tensor_map(weight.data_ptr(), len(weight), depth, self._tall)
        self._arguments.words[:] = out.data_ptr(), rows, outputs, depth // cut.parts
        programs = min(cut.tiles(len(weight)), max(1, multiprocessors_of(x.device.index) // cut.parts))
        self._kernel.launch((programs, cut.parts), cut.shared_bytes(rows), self._arguments.places)


def compile_constants(groups: int, cut: Cut, gated: bool, half: bool) -> dict[str, int]:
    """What `wide_tma.cu` is compiled with."""
    early = early_stages(EARLY_BYTES, cut.columns * _LINE, cut.stages)
    return dict(GROUPS=groups, COLUMNS=cut.columns, STAGES=cut.stages, EARLY=early, GATED=int(gated), HALF=int(half))


@functools.cache
def _kernel(device: int, groups: int, columns: int, stages: int, gated: bool, half: bool) -> WideKernel:
    with torch.cuda.device(device):
        return WideKernel(groups, columns, stages, gated, half)
