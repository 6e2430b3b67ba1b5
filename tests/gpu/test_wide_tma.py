"""Products of 33 to 128 rows by warpgroups, whose weights are copied by boxes, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hopper_products import CUDA, SHAPES, activated, assert_each_reads_the_one_before, operands, poison

GATED = [(28672, 4096), (16384, 2048), (55296, 5120), (14336, 4096)]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [49, 64, 65, 100, 127, 128])
@pytest.mark.parametrize("outputs,depth", GATED)
def test_what_gates_let_through(outputs, depth, rows, dtype):
    from superinfer.kernels import wide_tma

    x, weight = operands(rows, outputs, depth, dtype)
    poison(rows, outputs // 2, dtype=dtype)
    found = wide_tma.gated(x, weight)
    assert found is not None and found.shape == (rows, outputs // 2) and found.dtype == dtype
    torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [33, 48, 64, 65, 96, 112])
@pytest.mark.parametrize("outputs,depth", SHAPES)
def test_parts_add_up_to_the_product(outputs, depth, rows, dtype):
    from superinfer.kernels import wide_tma

    x, weight = operands(rows, outputs, depth, dtype)
    cut = wide_tma.choose_cut(rows, outputs, depth, torch.cuda.get_device_properties(0).multi_processor_count)
    parts = wide_tma.linear_parts(x, weight)
    if cut is None:
        assert parts is None
        return
    poison(cut.parts, rows, outputs, dtype=torch.float32)
    parts = wide_tma.linear_parts(x, weight)
    assert parts.shape == (cut.parts, rows, outputs) and parts.dtype == torch.float32
    torch.testing.assert_close(parts.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 100, 128])
@pytest.mark.parametrize(
    "cut",
    [(1, 256, 2), (1, 256, 3), (2, 96, 4), (3, 128, 2), (4, 8, 5), (4, 200, 3), (8, 256, 4)],
)
def test_any_cut_of_any_rows(rows, cut):
    """2,064 outputs: a last tile that reaches beyond them, programs with several tiles, and stages more and fewer than
    are on their way."""
    from superinfer.kernels import wide_tma

    x, weight = operands(rows, 2064, 3072)
    poison(cut[0], rows, 2064, dtype=torch.float32)
    found = wide_tma.run(x, weight, wide_tma.Cut(*cut))
    torch.testing.assert_close(found.double().sum(0), x.double() @ weight.double().T, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("rows", [9, 64, 65, 128])
@pytest.mark.parametrize("cut", [(1, 16, 3), (1, 32, 9), (1, 208, 2), (1, 256, 4), (1, 224, 5)])
def test_any_cut_of_gates(rows, cut):
    """130 tiles of 16, fewer of the others: the last tile's gates reach into what they gate, and that beyond."""
    from superinfer.kernels import wide_tma

    x, weight = operands(rows, 2080, 1536)
    poison(rows, 1040, dtype=x.dtype)
    found = wide_tma.run(x, weight, wide_tma.Cut(*cut), gated=True)
    torch.testing.assert_close(found.double(), activated(x, weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("outputs", [8192, 40000])
def test_a_program_computes_one_tile_after_another(outputs):
    from superinfer.kernels import wide_tma

    x, weight = operands(100, outputs, 640)
    poison(1, 100, outputs, dtype=torch.float32)
    found = wide_tma.run(x, weight, wide_tma.Cut(1, 64, 4))
    torch.testing.assert_close(found[0].double(), x.double() @ weight.double().T, rtol=1e-4, atol=5e-5)


def test_each_row_of_x_and_of_the_weight_is_where_it_belongs():
    """With numbers that are exact in bfloat16: one wrong element of a box is seen."""
    from superinfer.kernels import wide_tma

    x = torch.zeros(93, 2048, dtype=torch.bfloat16, device=CUDA)
    x[torch.arange(93), torch.arange(93) * 22] = 1.0
    weight = (torch.arange(544 * 2048, device=CUDA) * 7919 % 251 - 125).view(544, 2048).bfloat16()
    found = wide_tma.run(x, weight, wide_tma.Cut(2, 128, 3)).sum(0)
    assert torch.equal(found, x.float() @ weight.float().T)


def test_rows_that_the_kernel_in_front_writes_are_read():
    """In a graph, where a kernel starts while the one in front runs: what one product writes is the next one's input,
    and a memory's reuse by a third is not seen by the first."""
    from superinfer.kernels import wide_tma

    first, weight = operands(77, 8192, 4096)
    cut = wide_tma.Cut(1, 64, 6)
    assert_each_reads_the_one_before(lambda x, turn: wide_tma.run(x, weight, cut, gated=True), first, weight)


def test_the_same_product_has_the_same_bits():
    from superinfer.kernels import wide_tma

    x, weight = operands(128, 28672, 4096)
    first = wide_tma.gated(x, weight)
    for _ in range(20):
        assert torch.equal(wide_tma.gated(x, weight), first)


def test_products_that_are_not_for_it():
    from superinfer.kernels import wide_tma

    for rows, outputs, depth in (
        (129, 28672, 4096),
        (32, 28672, 4096),
        (120, 512, 4096),
        (96, 512, 4096),
        (120, 28672, 4100),
    ):
        x, weight = operands(rows, outputs, depth)
        assert wide_tma.gated(x, weight) is None and wide_tma.linear_parts(x, weight) is None
    x, weight = operands(120, 28672, 4096, torch.float32)
    assert wide_tma.gated(x, weight) is None
    at_no_multiple_of_16_bytes = torch.zeros(120 * 4096 + 1, dtype=torch.bfloat16, device=CUDA)[1:].view(120, 4096)
    assert wide_tma.gated(at_no_multiple_of_16_bytes, weight.bfloat16()) is None
