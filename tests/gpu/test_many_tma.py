"""Gates of many rows by clusters of two programs, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hopper_products import CUDA, assert_activated, assert_each_reads_the_one_before, operands, poison

GATED = [(28672, 4096), (55296, 5120), (57344, 8192)]


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1024, 2048, 2500])
@pytest.mark.parametrize("outputs,depth", GATED)
def test_what_gates_let_through(outputs, depth, rows, dtype):
    from superinfer.kernels import many_tma

    x, weight = operands(rows, outputs, depth, dtype)
    cut = many_tma.choose_cut(rows, outputs, depth, torch.cuda.get_device_properties(0).multi_processor_count)
    poison(rows, outputs // 2, dtype=dtype)
    found = many_tma.gated(x, weight)
    if cut is None:
        assert found is None
        return
    assert found.shape == (rows, outputs // 2) and found.dtype == dtype
    assert_activated(found, x, weight)


@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 300, 1000])
@pytest.mark.parametrize("cut", [(160, 5), (192, 4), (32, 2), (96, 3), (128, 2)])
def test_any_cut_of_any_rows(rows, cut):
    """A last tile that reaches beyond the outputs, rows of tiles that are left over, clusters with several turns for
    both warpgroups, with one, and with none; steps that are no multiple of the stages."""
    from superinfer.kernels import many_tma

    for outputs, depth in ((2080, 1536), (2048, 64), (20000, 320)):
        x, weight = operands(rows, outputs, depth)
        poison(rows, outputs // 2, dtype=x.dtype)
        found = many_tma.run(x, weight, many_tma.Cut(*cut))
        assert_activated(found, x, weight)


def test_each_row_of_x_and_of_the_weight_is_where_it_belongs():
    """With numbers that are exact in bfloat16, where gates are so large that silu is their own value: one wrong element
    of a box is seen."""
    from superinfer.kernels import many_tma

    rows, outputs, depth = 333, 1040, 2048
    x = torch.zeros(rows, depth, dtype=torch.bfloat16, device=CUDA)
    x[torch.arange(rows), torch.arange(rows) * 6] = 1.0
    weight = (torch.arange(2 * outputs * depth, device=CUDA) * 7919 % 251 - 125).view(2 * outputs, depth).bfloat16()
    weight[:outputs] = weight[:outputs].abs() % 16 + 32
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    for cut in many_tma.CUTS:
        assert torch.equal(many_tma.run(x, weight, cut), (gate * up).bfloat16())


def test_rows_that_the_kernel_in_front_writes_are_read():
    """In a graph, where a kernel starts while the one in front runs: what one product writes is the next one's input,
    and a memory's reuse by a third is not seen by the first."""
    from superinfer.kernels import many_tma

    first, weight = operands(400, 8192, 4096)
    cuts = many_tma.CUTS
    assert_each_reads_the_one_before(lambda x, turn: many_tma.run(x, weight, cuts[turn % 2]), first, weight)


def test_the_same_product_has_the_same_bits():
    from superinfer.kernels import many_tma

    x, weight = operands(2048, 28672, 4096)
    first = many_tma.gated(x, weight)
    for _ in range(20):
        assert torch.equal(many_tma.gated(x, weight), first)


def test_a_row_of_no_numbers_spoils_no_other():
    from superinfer.kernels import many_tma

    x, weight = operands(1024, 28672, 4096)
    whole = many_tma.gated(x, weight)
    x[517] = float("nan")
    found = many_tma.gated(x, weight)
    assert found[517].isnan().all()
    others = torch.arange(1024, device=CUDA) != 517
    assert torch.equal(found[others], whole[others])


def test_products_that_are_not_for_it():
    from superinfer.kernels import many_tma

    for rows, outputs, depth in ((1023, 28672, 4096), (1025, 28672, 4096), (1024, 2048, 4096)):
        assert many_tma.gated(*operands(rows, outputs, depth)) is None
    x, weight = operands(1024, 28672, 4096, torch.float32)
    assert many_tma.gated(x, weight) is None
    at_no_multiple_of_16_bytes = torch.zeros(1024 * 4096 + 1, dtype=torch.bfloat16, device=CUDA)[1:].view(1024, 4096)
    assert many_tma.gated(at_no_multiple_of_16_bytes, weight.bfloat16()) is None
