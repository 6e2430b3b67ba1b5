"""Products of few rows whose weights are streamed, against the same in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.device("cuda")
SHAPES = [(6144, 4096), (4096, 4096), (4096, 14336), (7168, 5120), (5120, 27648), (3072, 2048), (6144, 1536)]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)


def operands(rows: int, outputs: int, depth: int, dtype: torch.dtype = torch.bfloat16):
    """x and a weight of a size that makes outputs of about 1."""
    generator = torch.Generator(CUDA).manual_seed(rows * outputs + depth)
    x, weight = (torch.randn(n, depth, dtype=dtype, device=CUDA, generator=generator) for n in (rows, outputs))
    return x, weight * depth**-0.5


def activated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float64 of gates that were rounded once, as in the other paths."""
    gate, up = (x.double() @ weight.double().T).to(x.dtype).double().chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("outputs,depth", SHAPES)
def test_parts_add_up_to_the_product(outputs, depth, rows, dtype):
    from superinfer.kernels import skinny_hopper

    x, weight = operands(rows, outputs, depth, dtype)
    parts = skinny_hopper.linear_parts(x, weight)
    assert parts is not None and parts.shape[1:] == (rows, outputs) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("outputs,depth", [(28672, 4096), (55296, 5120)])
def test_what_gates_let_through(outputs, depth, rows, dtype):
    from superinfer.kernels import skinny_hopper

    x, weight = operands(rows, outputs, depth, dtype)
    found = skinny_hopper.gated(x, weight)
    assert found is not None and found.shape == (rows, outputs // 2) and found.dtype == dtype
    torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [3, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("cut", [(1, 128, 768, 2), (2, 64, 768, 3), (4, 7, 768, 3), (3, 1, 1024, 2), (1, 132, 1024, 2)])
def test_any_cut_of_any_rows(rows, cut):
    """Programs with more groups than others, with none, and tiles more or fewer than are on their way."""
    from superinfer.kernels import skinny_hopper

    x, weight = operands(rows, 2064, 3072)
    cut = skinny_hopper.Cut(*cut)
    if cut.shared_bytes(rows, 3072) > skinny_hopper.SHARED_BYTES:
        cut = cut._replace(parts=4, depth=768, programs=min(cut.programs, 33))
    found = skinny_hopper.run(x, weight, cut)
    torch.testing.assert_close(found.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=1e-5)


def test_rows_that_the_kernel_in_front_writes_are_read():
    """In a graph, where a kernel starts while the one in front runs: what norms write is the next product's input."""
    from superinfer.kernels import fused, skinny_hopper

    size, turns = 4096, 8
    first, weight = operands(1, size, size)
    scale, floor = torch.ones(size, dtype=first.dtype, device=CUDA), torch.tensor(0.0, device=CUDA)
    written: list[torch.Tensor] = []

    def step() -> None:
        written.clear()
        x = first
        for _ in range(turns):
            parts = skinny_hopper.linear_parts(x, weight)
            x, total = fused.add_rms_norm(parts, torch.zeros_like(x), scale, floor)
            written.extend((parts, x, total))

    step()
    expected = first
    for turn in range(turns):
        product = expected.double() @ weight.double().T
        torch.testing.assert_close(written[3 * turn].double().sum(0), product, rtol=2e-2, atol=2e-2)
        expected = written[3 * turn + 1].clone()
    answer = expected
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(50):
        for tensor in written:
            tensor.fill_(float("nan"))
        graph.replay()
        assert torch.equal(written[-2], answer)


def test_the_same_product_has_the_same_bits():
    from superinfer.kernels import skinny_hopper

    x, weight = operands(2, 28672, 4096)
    first, parts = skinny_hopper.gated(x, weight), skinny_hopper.linear_parts(x, weight)
    for _ in range(20):
        assert torch.equal(skinny_hopper.gated(x, weight), first)
        assert torch.equal(skinny_hopper.linear_parts(x, weight), parts)


def test_products_that_are_not_for_it():
    from superinfer.kernels import skinny_hopper

    for rows, outputs, depth in (
        (skinny_hopper.MOST_ROWS + 1, 4096, 4096),
        (0, 4096, 4096),
        (1, 128, 4096),
        (1, 4100, 4096),
        (1, 4096, 100),
    ):
        x, weight = operands(rows, outputs, depth)
        assert skinny_hopper.linear_parts(x, weight) is None
    x, weight = operands(1, 4096, 4096, torch.float32)
    assert skinny_hopper.linear_parts(x, weight) is None and skinny_hopper.gated(x, weight) is None


def test_shares_are_even():
    from superinfer.kernels.skinny_hopper import EVEN, choose_cut

    for outputs, depth in SHAPES:
        cut = choose_cut(1, outputs, depth, 132)
        assert cut is not None and cut.parts * cut.programs <= 132 and depth % (cut.parts * cut.depth) == 0
        share = -(-outputs // 16 // cut.programs)
        assert share * 132 <= EVEN * (outputs // 16) * cut.parts
