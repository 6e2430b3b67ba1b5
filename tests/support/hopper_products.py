"""Operands of the products that are written for Hopper, and what they are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

CUDA = torch.device("cuda")
# (outputs, depth) of products in Llama-3-8B, Qwen2.5-32B and smaller models.
SHAPES = [(6144, 4096), (4096, 4096), (4096, 14336), (7168, 5120), (5120, 27648), (3072, 2048)]
# Of an output of about 1 that a tensor core sums up: up to 512 sums, each cut off at 2^-23 of a partial one of up to 3.
SUM_ERROR = 2e-4


def operands(
    rows: int, outputs: int, depth: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight of a size that makes outputs of about 1."""
    generator = torch.Generator(CUDA).manual_seed(rows * outputs + depth)
    x, weight = (torch.randn(n, depth, dtype=dtype, device=CUDA, generator=generator) for n in (rows, outputs))
    return x, weight * depth**-0.5


def activated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float64 of gates that were rounded once, as in the other paths."""
    return _let_through(_sums(x, weight), x.dtype)


def assert_activated(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """All together as exact as their type; and each, but for its own rounding, what rounded sums make that are at most
    SUM_ERROR off: of most but one gate and one `up`, of those between two numbers of the type either of them."""
    sums = _sums(x, weight)
    exact = _let_through(sums, x.dtype)
    assert ((found.double() - exact).norm() / exact.norm()).item() < 4e-3
    least, most = exact, exact
    for off in itertools.product((-SUM_ERROR, SUM_ERROR), repeat=2):
        may_be = _let_through(sums, x.dtype, *off)
        least, most = torch.minimum(least, may_be), torch.maximum(most, may_be)
    room = 0.51 * _spacing(torch.maximum(least.abs(), most.abs()), torch.finfo(x.dtype))  # silu is computed in float32
    beyond = torch.maximum(least - room - found, found - most - room)
    wrong = ~(beyond <= 0.0)  # NaNs, too
    worst = int(beyond.argmax())
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are further off than rounding explains; the worst, "
        f"{divmod(worst, found.shape[1])}, is {found.flatten()[worst].item()} rather than "
        f"{least.flatten()[worst].item()} to {most.flatten()[worst].item()}"
    )


def _sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T


def _let_through(
    sums: torch.Tensor, dtype: torch.dtype, gate_error: float = 0.0, up_error: float = 0.0
) -> torch.Tensor:
    """silu(gate) · up in float64, of sums in float64 that are so far off and then rounded to a type."""
    gate, up = sums.chunk(2, dim=-1)
    return F.silu((gate + gate_error).to(dtype).double()) * (up + up_error).to(dtype).double()


def _spacing(x: torch.Tensor, info: torch.finfo) -> torch.Tensor:
    """From each number to the next one of a type."""
    spacing = info.eps * torch.exp2(torch.frexp(x).exponent.double() - 1.0)
    return spacing.clamp(min=info.eps * info.smallest_normal)


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Memory that the next product's output is likely to get is NaN, so that what is not written is seen."""
    torch.full(shape, float("nan"), dtype=dtype, device=CUDA)


def assert_each_reads_the_one_before(
    gated: Callable[[torch.Tensor, int], torch.Tensor], first: torch.Tensor, weight: torch.Tensor
) -> None:
    """Eight products of gates, each of what the one before wrote, eagerly and in a graph. gated: of x, in a turn."""
    written: list[torch.Tensor] = []

    def step() -> None:
        written.clear()
        x = first
        for turn in range(8):
            x = gated(x, turn)
            written.append(x)

    step()
    x = first
    for found in written:
        torch.testing.assert_close(found.double(), activated(x, weight), rtol=2e-2, atol=1e-2)
        x = found.clone()
    assert_replays_write(x, written, -1, step)


def assert_replays_write(
    expected: torch.Tensor, written: list[torch.Tensor], at: int, step: Callable[[], None]
) -> None:
    """Each replay of a graph of `step`, which fills `written` anew, leaves `expected` at that place of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(50):
        for tensor in written:
            tensor.fill_(float("nan"))
        graph.replay()
        assert torch.equal(written[at], expected)
