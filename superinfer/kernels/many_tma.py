"""What gates let through of 1,024 rows and more on Hopper: `many_tma.cu`, and how it is cut.

A product with gate, up and what they gate in one kernel need not write both, nor another kernel read them: 2 to 9 % of
the time that cuBLAS and the activation take, where a GPU's power is the limit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from superinfer.kernels.hopper import SHARED_BYTES, multiprocessors_of
from superinfer.kernels.tensor_map import BOX, tensor_map
from superinfer.kernels.warpgroup import made_for

LEAST_ROWS = 1024  # of fewer, cuBLAS has tiles that fill the multiprocessors better
LEAST_FULL = 0.95  # share of what all multiprocessors compute that is wanted: the same
ROWS = 128  # of a tile
GROUP = 8  # pairs of tiles that programs go down: 2,048 rows of x, which half of the second-level cache holds
_BARRIERS = 16  # bytes for each stage
_LINE = BOX * 2  # bytes of a box's row
_THREADS = 384


class Cut(NamedTuple):
    """columns: rows of the weight in a tile, gates and what they gate. stages: on their way."""

    columns: int
    stages: int

    @property
    def answers(self) -> int:
        """Outputs of a tile."""
        return self.columns // 2

    def shared_bytes(self) -> int:
        """Of a program: stages, and the answers of two tiles."""
        return self.stages * ((self.columns + ROWS) * _LINE + _BARRIERS) + 2 * ROWS * self.answers * 2

    def turns(self, rows: int, outputs: int, multiprocessors: int) -> int:
        """Pairs of tiles of the busiest cluster. outputs: without gates."""
        down, across = -(-rows // ROWS), -(-outputs // self.answers)
        pairs = down // 2 * across + down % 2 * -(-across // 2)
        return -(-pairs // (multiprocessors // 2))

    def full(self, rows: int, outputs: int, multiprocessors: int) -> float:
        """Which share of what all multiprocessors compute is wanted."""
        return rows * outputs / (self.turns(rows, outputs, multiprocessors) * multiprocessors * ROWS * self.answers)


CUTS = Cut(160, 5), Cut(192, 4)
EACH_TURN = 24  # columns that would take as long as what a turn takes whatever its columns: its rows of x


@functools.cache
def choose_cut(rows: int, outputs: int, depth: int, multiprocessors: int) -> Cut | None:
    """Of a product [rows, depth] x [depth, outputs], half of whose outputs are gates; None where it is not for this
    kernel."""
    if rows < LEAST_ROWS or not depth or depth % BOX or outputs % 16:
        return None
    size = rows, outputs // 2, multiprocessors
    best = min(CUTS, key=lambda cut: cut.turns(*size) * (cut.columns + EACH_TURN))
    return best if best.full(*size) >= LEAST_FULL else None


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) · up of x · weightᵀ = [gate, up] as [rows, outputs / 2] in x's type; None where this kernel is not the
    one to take. x: contiguous [rows, depth]; weight: contiguous [outputs, depth], both bfloat16 or float16."""
    if len(x) < LEAST_ROWS or x.element_size() != 2 or not x.is_cuda:
        return None
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    multiprocessors = multiprocessors_of(x.device.index)
    cut = choose_cut(len(x), *weight.shape, multiprocessors) if multiprocessors else None
    return None if cut is None else run(x, weight, cut)


def run(x: torch.Tensor, weight: torch.Tensor, cut: Cut) -> torch.Tensor:
    """`gated` of any number of rows cut as given. Raises ValueError for a cut that the kernel cannot take."""
    (rows, depth), outputs = x.shape, len(weight)
    if not rows or not depth or depth % BOX or outputs % 16:
        raise ValueError(f"{rows} rows, {outputs} outputs of which half are gates, and a depth of {depth}: the kernel "
                         f"takes any rows, outputs by 16 and depths by {BOX}")  # fmt: skip
    if cut.columns % 32 or not 32 <= cut.columns <= 192 or cut.stages < 2 or cut.shared_bytes() > SHARED_BYTES:
        raise ValueError(f"{cut} is none of the kernel's: columns are a multiple of 32, to 192, and stages at least 2, "
                         f"in {SHARED_BYTES} bytes of shared memory")  # fmt: skip
    out = torch.empty(rows, outputs // 2, dtype=x.dtype, device=x.device)
    _kernel(x.device.index, cut, x.dtype == torch.float16).launch(x, weight, out)
    return out


class ManyKernel:
    """Compiled for a cut. One stream at a time."""

    def __init__(self, cut: Cut, half: bool) -> None:
        """half: float16, else bfloat16. Raises CudaFailure where it cannot be compiled or loaded."""
        from superinfer.kernels.nvrtc import Arguments, CudaKernel  # needs cuda-bindings, which come with `cuda`

        constants, made = compile_constants(cut, half), made_for(cut.columns)
        self._kernel = CudaKernel("many_tma.cu", "many_rows", constants, _THREADS, SHARED_BYTES, made)
        self._arguments = Arguments(3, maps=3)
        self._cut = cut

    def launch(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """In the current stream; may be captured. out: as `run` makes it. Raises CudaFailure for tensors that cannot be
        copied by boxes: those not at a multiple of 16 bytes."""
        assert x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
        assert x.shape[1] == weight.shape[1]
        (rows, depth), outputs, answers = x.shape, out.shape[1], self._cut.answers
        self._arguments.maps[0] = tensor_map(x.data_ptr(), rows, depth, ROWS // 2)
        self._arguments.maps[1] = tensor_map(weight.data_ptr(), len(weight), depth, answers)
        self._arguments.maps[2] = tensor_map(out.data_ptr(), rows, outputs, ROWS, answers)
        self._arguments.words[:] = rows, outputs, depth
        programs = multiprocessors_of(x.device.index) // 2 * 2  # clusters of two
        self._kernel.launch((programs, 1), self._cut.shared_bytes(), self._arguments.places)


def compile_constants(cut: Cut, half: bool) -> dict[str, int]:
    """What `many_tma.cu` is compiled with."""
    return dict(COLUMNS=cut.columns, STAGES=cut.stages, GROUP=GROUP, HALF=int(half))


@functools.cache
def _kernel(device: int, cut: Cut, half: bool) -> ManyKernel:
    with torch.cuda.device(device):
        return ManyKernel(cut, half)
