"""Operands of the products that are written for Hopper, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

CUDA = torch.device("cuda")
# (outputs, depth) of products in Llama-3-8B, Qwen2.5-32B and smaller models.
SHAPES = [(6144, 4096), (4096, 4096), (4096, 14336), (7168, 5120), (5120, 27648), (3072, 2048)]


def operands(
    rows: int, outputs: int, depth: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight of a size that makes outputs of about 1."""
    generator = torch.Generator(CUDA).manual_seed(rows * outputs + depth)
    x, weight = (torch.randn(n, depth, dtype=dtype, device=CUDA, generator=generator) for n in (rows, outputs))
    return x, weight * depth**-0.5


def activated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float64 of gates that were rounded once, as in the other paths."""
    gate, up = (x.double() @ weight.double().T).to(x.dtype).double().chunk(2, dim=-1)
    return F.silu(gate) * up


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
