"""How products of a hundred rows are cut over a GPU's multiprocessors, without one."""

from __future__ import annotations

import pytest
import torch

from superinfer.kernels.hopper import SHARED_BYTES
from superinfer.kernels.wide_tma import Cut, choose_cut, run


@pytest.mark.parametrize("rows", [49, 64, 65, 128])
@pytest.mark.parametrize("outputs,depth", [(28672, 4096), (16384, 2048), (55296, 5120), (57344, 8192), (14336, 4096)])
def test_tiles_fill_the_multiprocessors(outputs, depth, rows):
    cut = choose_cut(rows, outputs, depth, 132, gated=True)
    assert cut is not None and cut.parts == 1 and cut.columns % 16 == 0
    tiles = cut.tiles(outputs)
    assert tiles * cut.columns >= outputs > (tiles - 1) * cut.columns
    assert tiles > 0.9 * -(-tiles // 132) * 132
    assert cut.shared_bytes(rows) <= SHARED_BYTES < cut._replace(stages=cut.stages + 1).shared_bytes(rows)


def test_llama_3_8b_and_qwen_2_5_32b_have_tiles_of_224():
    for outputs, depth in ((28672, 4096), (55296, 5120)):
        assert choose_cut(128, outputs, depth, 132, gated=True) == Cut(1, 224, 5)


@pytest.mark.parametrize(
    "rows,outputs,depth,parts,columns",
    [(96, 6144, 4096, 2, 96), (65, 4096, 14336, 4, 128), (64, 4096, 4096, 4, 128), (33, 12288, 4096, 1, 96)],
)
def test_the_depth_is_cut_as_seldom_as_fills_the_multiprocessors(rows, outputs, depth, parts, columns):
    cut = choose_cut(rows, outputs, depth, 132)
    assert cut is not None and cut[:2] == (parts, columns)
    assert 0.9 * 132 <= cut.tiles(outputs) * cut.parts <= 132


@pytest.mark.parametrize(
    "rows,outputs,depth,why",
    [
        (48, 28672, 4096, "fewer rows"),
        (129, 28672, 4096, "more rows"),
        (120, 1024, 4096, "programs for half the multiprocessors"),
        (120, 28672, 4100, "no boxes of the depth"),
        (120, 28688, 4096, "no whole tiles of gates"),
    ],
)
def test_what_it_is_not_for(rows, outputs, depth, why):
    assert choose_cut(rows, outputs, depth, 132, gated=True) is None, why


@pytest.mark.parametrize(
    "rows,outputs,depth,cut,gated,why",
    [
        (129, 64, 128, Cut(1, 64, 2), False, "129 rows"),
        (9, 40, 128, Cut(1, 64, 2), False, "40 outputs"),
        (9, 48, 128, Cut(1, 64, 2), True, "48 outputs"),
        (9, 64, 128, Cut(1, 264, 2), False, "none of the kernel's"),
        (9, 64, 128, Cut(1, 24, 2), True, "none of the kernel's"),
        (9, 64, 128, Cut(2, 64, 2), True, "none of the kernel's"),
        (9, 64, 192, Cut(2, 64, 2), False, "depth of 192"),
        (9, 64, 128, Cut(1, 256, 9), False, "bytes of shared memory"),
    ],
)
def test_a_cut_that_the_kernel_cannot_take_is_refused(rows, outputs, depth, cut, gated, why):
    x, weight = torch.zeros(rows, depth, dtype=torch.bfloat16), torch.zeros(outputs, depth, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        run(x, weight, cut, gated)
