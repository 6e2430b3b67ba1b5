"""Products of 9 to 64 rows whose weights are copied by boxes, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hopper_products import CUDA, SHAPES, activated, assert_replays_write, operands, poison

from superinfer.kernels.hopper import SHARED_BYTES

GATED = [(28672, 4096), (16384, 2048), (55296, 5120)]
ROWS = [9, 16, 31, 32, 50, 64]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs,depth", SHAPES)
def test_parts_add_up_to_the_product(outputs, depth, rows, dtype):
    from superinfer.kernels import skinny_tma

    x, weight = operands(rows, outputs, depth, dtype)
    cut = skinny_tma.choose_cut(rows, outputs, depth, torch.cuda.get_device_properties(0).multi_processor_count)
    poison(cut.parts, rows, outputs, dtype=torch.float32)
    parts = skinny_tma.linear_parts(x, weight)
    assert parts is not None and parts.shape == (cut.parts, rows, outputs) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs,depth", GATED)
def test_what_gates_let_through(outputs, depth, rows, dtype):
    from superinfer.kernels import skinny_tma

    x, weight = operands(rows, outputs, depth, dtype)
    poison(rows, outputs // 2, dtype=dtype)
    found = skinny_tma.gated(x, weight)
    if found is None:
        assert outputs > 28672 and rows > skinny_tma.MOST_ROWS_TOGETHER, "two programs would not have the registers"
        return
    assert found.shape == (rows, outputs // 2) and found.dtype == dtype
    torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17, 24, 33, 41, 49, 57, 64])
@pytest.mark.parametrize(
    "cut",
    [
        (1, 8, 2, 1, 2),
        (2, 4, 2, 2, 3),
        (3, 5, 1, 1, 4),
        (4, 7, 2, 1, 2),
        (6, 3, 1, 2, 5),
        (8, 1, 2, 2, 2),
        (8, 6, 1, 1, 9),
    ],
)
def test_any_cut_of_any_rows(rows, cut):
    """2,064 outputs, an odd number of 16: a last program with warps that have nothing or half to do, and stages more
    and fewer than are on their way."""
    from superinfer.kernels import skinny_tma

    x, weight = operands(rows, 2064, 3072)
    cut = skinny_tma.Cut(*cut)
    if cut.shared_bytes(rows) > SHARED_BYTES:
        cut = cut.with_most_stages(rows)
    poison(cut.parts, rows, 2064, dtype=torch.float32)
    found = skinny_tma.run(x, weight, cut)
    torch.testing.assert_close(found.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("rows", [1, 9, 24, 40, 64])
@pytest.mark.parametrize("cut", [(1, 8, 2, 1, 2), (1, 7, 2, 1, 3), (1, 4, 2, 2, 2), (1, 5, 2, 1, 3), (1, 1, 2, 2, 5)])
def test_any_cut_of_gates(rows, cut):
    """65 pairs of tiles: the last program's box of gates reaches into what they gate, and that of these beyond."""
    from superinfer.kernels import skinny_tma

    x, weight = operands(rows, 2080, 1536)
    poison(rows, 1040, dtype=x.dtype)
    found = skinny_tma.run(x, weight, skinny_tma.Cut(*cut), gated=True)
    torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("is_gated", [False, True])
def test_each_row_of_x_and_of_the_weight_is_where_it_belongs(is_gated):
    """With numbers that are exact in bfloat16: one wrong element of a box is seen."""
    from superinfer.kernels import skinny_tma

    x = torch.zeros(23, 512, dtype=torch.bfloat16, device=CUDA)
    x[torch.arange(23), torch.arange(23) * 22] = 1.0
    weight = (torch.arange(544 * 512, device=CUDA) * 7919 % 251 - 125).view(544, 512).bfloat16()
    if is_gated:
        weight[:272] = weight[:272] / 64
        found = skinny_tma.run(x, weight, skinny_tma.Cut(1, 4, 2, 2, 3), gated=True)
        torch.testing.assert_close(found.double(), activated(x, weight), rtol=8e-3, atol=1e-6)
    else:
        found = skinny_tma.run(x, weight, skinny_tma.Cut(2, 4, 2, 2, 3)).sum(0)
        assert torch.equal(found, x.float() @ weight.float().T)


def test_rows_that_the_kernel_in_front_writes_are_read():
    """In a graph, where a kernel starts while the one in front runs: what norms write is the next product's input."""
    from superinfer.kernels import fused, skinny_tma

    size, turns, rows = 4096, 8, 20
    first, weight = operands(rows, size, size)
    scale, floor = torch.ones(size, dtype=first.dtype, device=CUDA), torch.tensor(0.0, device=CUDA)
    written: list[torch.Tensor] = []

    def step() -> None:
        written.clear()
        x = first
        for _ in range(turns):
            parts = skinny_tma.linear_parts(x, weight)
            x, total = fused.add_rms_norm(parts, torch.zeros_like(x), scale, floor)
            written.extend((parts, x, total))

    step()
    x = first
    for turn in range(turns):
        product = x.double() @ weight.double().T
        torch.testing.assert_close(written[3 * turn].double().sum(0), product, rtol=2e-2, atol=2e-2)
        x = written[3 * turn + 1].clone()
    assert_replays_write(x, written, -2, step)


def test_a_graph_reads_what_its_input_is_at_each_replay():
    from superinfer.kernels import skinny_tma

    x, weight = operands(32, 28672, 4096)
    skinny_tma.gated(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = skinny_tma.gated(x, weight)
    for turn in range(3):
        x.copy_(operands(32, turn + 1, 4096)[0])
        found.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


def test_the_same_product_has_the_same_bits():
    from superinfer.kernels import skinny_tma

    x, weight = operands(32, 28672, 4096)
    other = weight[:6144]
    first, parts = skinny_tma.gated(x, weight), skinny_tma.linear_parts(x, other)
    for _ in range(20):
        assert torch.equal(skinny_tma.gated(x, weight), first)
        assert torch.equal(skinny_tma.linear_parts(x, other), parts)


def test_products_that_are_not_for_it():
    from superinfer.kernels import skinny_tma

    for rows, outputs, depth in (
        (skinny_tma.MOST_ROWS + 1, 4096, 4096),
        (0, 4096, 4096),
        (16, 128, 4096),
        (16, 4100, 4096),
        (16, 4096, 100),
    ):
        x, weight = operands(rows, outputs, depth)
        assert skinny_tma.linear_parts(x, weight) is None
    x, weight = operands(16, 4096, 4096, torch.float32)
    assert skinny_tma.linear_parts(x, weight) is None and skinny_tma.gated(x, weight) is None
    at_no_multiple_of_16_bytes = torch.zeros(16 * 4096 + 1, dtype=torch.bfloat16, device=CUDA)[1:].view(16, 4096)
    assert skinny_tma.linear_parts(at_no_multiple_of_16_bytes, weight.bfloat16()) is None
