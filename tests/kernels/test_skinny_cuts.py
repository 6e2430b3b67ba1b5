"""How products are cut over a GPU's multiprocessors, without one."""

from __future__ import annotations

import pytest
import torch
from hopper_products import SHAPES

from superinfer.kernels.hopper import RESERVED_BYTES, SHARED_BYTES
from superinfer.kernels.skinny_tma import EVEN, MOST_WARPS, Cut, choose_cut, run

GATED = [(28672, 4096), (16384, 2048)]


@pytest.mark.parametrize("rows", [1, 9, 17, 32, 64])
@pytest.mark.parametrize(
    "outputs,depth,gated", [*((*shape, False) for shape in SHAPES), *((*shape, True) for shape in GATED)]
)
def test_every_multiprocessor_has_one_program_and_about_its_share(outputs, depth, gated, rows):
    cut = choose_cut(rows, outputs, depth, 132, gated)
    assert cut is not None and 1 <= cut.warps <= MOST_WARPS and cut.stages >= 2
    program = cut.warps * cut.tiles * 16
    assert cut.programs(outputs) * program >= outputs > (cut.programs(outputs) - 1) * program
    assert cut.programs(outputs) * cut.parts <= 132 and program * 132 <= EVEN * outputs * cut.parts
    assert depth % (cut.parts * cut.boxes * 64) == 0
    assert cut.shared_bytes(rows) <= SHARED_BYTES < cut._replace(stages=cut.stages + 1).shared_bytes(rows)
    assert not gated or (cut.parts, cut.tiles) == (1, 2)


def test_llama_3_8b_is_cut_into_128_programs():
    assert choose_cut(32, 28672, 4096, 132, gated=True) == Cut(1, 7, 2, 1, 7)
    assert choose_cut(32, 6144, 4096, 132) == Cut(2, 6, 1, 2, 7)
    assert choose_cut(32, 4096, 4096, 132) == choose_cut(32, 4096, 14336, 132) == Cut(4, 4, 2, 2, 5)


@pytest.mark.parametrize("rows", [1, 8, 9, 32])
@pytest.mark.parametrize("outputs,depth", [(55296, 5120), (57344, 8192)])
def test_wide_products_have_two_programs_a_multiprocessor(outputs, depth, rows):
    cut = choose_cut(rows, outputs, depth, 132, gated=True)
    assert cut is not None and 132 < cut.programs(outputs) <= 264 and cut.stages >= 3
    assert 2 * (cut.shared_bytes(rows) + RESERVED_BYTES) <= SHARED_BYTES + RESERVED_BYTES
    assert choose_cut(33, outputs, depth, 132, gated=True) is None, "two would not have the registers"


def test_products_that_have_no_even_cut():
    for rows, outputs, depth, gated in (
        (0, 4096, 4096, False),
        (65, 4096, 4096, False),
        (16, 4100, 4096, False),
        (16, 4096, 100, False),
        (16, 128, 4096, False),
        (16, 128256, 4096, False),  # more than one program for each multiprocessor
        (16, 3 * 28672, 5120, True),
        (16, 28672 + 16, 4096, True),
    ):
        assert choose_cut(rows, outputs, depth, 132, gated) is None


@pytest.mark.parametrize(
    "rows,outputs,depth,cut,gated,why",
    [
        (65, 64, 128, Cut(1, 4, 1, 1, 2), False, "65 rows"),
        (9, 40, 128, Cut(1, 4, 1, 1, 2), False, "40 outputs"),
        (9, 48, 128, Cut(1, 4, 2, 1, 2), True, "48 outputs"),
        (9, 64, 128, Cut(1, 9, 1, 1, 2), False, "none of the kernel's"),
        (9, 64, 128, Cut(1, 4, 1, 1, 2), True, "none of the kernel's"),
        (9, 64, 128, Cut(1, 4, 1, 1, 0), False, "none of the kernel's"),
        (9, 64, 192, Cut(1, 4, 1, 2, 2), False, "depth of 192"),
        (9, 64, 128, Cut(1, 8, 2, 2, 9), False, "bytes of shared memory"),
    ],
)
def test_a_cut_that_the_kernel_cannot_take_is_refused(rows, outputs, depth, cut, gated, why):
    x, weight = torch.zeros(rows, depth, dtype=torch.bfloat16), torch.zeros(outputs, depth, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        run(x, weight, cut, gated)
