"""Operands of the products that are written for Hopper, and what they are compared with."""

from __future__ import annotations

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
    gate, up = _gates(x, weight)
    return F.silu(gate) * up


def assert_activated(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """All together as exact as their type; and each as near to `activated` as sums in float32 let it be: where one lies
    between two numbers of the type, it may round to the other of them, and so may what its gate lets through."""
    gate, up = _gates(x, weight)
    exact = F.silu(gate) * up
    assert ((found.double() - exact).norm() / exact.norm()).item() < 4e-3
    open, info = torch.sigmoid(gate), torch.finfo(x.dtype)
    slope = open * (1.0 + gate * (1.0 - open))
    room = (slope * up).abs() * (_spacing(gate, info) + SUM_ERROR)
    room += F.silu(gate).abs() * (_spacing(up, info) + SUM_ERROR)
    room = 1.05 * room + _spacing(exact, info)  # twice what rounding it costs, as it may be of the next binade
    beyond = (found.double() - exact).abs() / room
    worst = int(beyond.argmax())  # a NaN, if there is one
    assert bool((beyond <= 1.0).all()), (
        f"{int((~(beyond <= 1.0)).sum())} of {beyond.numel()} elements are further off than rounding explains; the "
        f"worst, {divmod(worst, beyond.shape[1])}, is {found.flatten()[worst].item()} rather than "
        f"{exact.flatten()[worst].item()}: {beyond.flatten()[worst].item():.3f} of what there is room for"
    )


def _gates(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and what they gate in float64, rounded once to x's type."""
    gate, up = (x.double() @ weight.double().T).to(x.dtype).double().chunk(2, dim=-1)
    return gate, up


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
