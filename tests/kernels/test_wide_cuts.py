"""How products of a hundred rows are cut over a GPU's multiprocessors, without one."""

from __future__ import annotations

import pytest
import torch

from superinfer.kernels.hopper import SHARED_BYTES
from superinfer.kernels.wide_tma import Cut, choose_cut, run


@pytest.mark.parametrize("rows", [65, 96, 128])
@pytest.mark.parametrize("outputs,depth", [(28672, 4096), (16384, 2048), (55296, 5120), (57344, 8192), (14336, 4096)])
def test_tiles_fill_the_multiprocessors(outputs, depth, rows):
    cut = choose_cut(rows, outputs, depth, 132)
    assert cut is not None and (cut.parts, cut.cluster) == (1, 2) and cut.columns % 16 == 0
    assert cut.tiles(outputs) * cut.columns >= outputs > (cut.tiles(outputs) - 1) * cut.columns
    turns = -(-cut.tiles(outputs) // 132)
    assert cut.tiles(outputs) > 0.9 * turns * 132
    assert cut.shared_bytes(rows) <= SHARED_BYTES < cut._replace(stages=cut.stages + 1).shared_bytes(rows)


def test_llama_3_8b_and_qwen_2_5_32b_have_tiles_of_224():
    assert choose_cut(128, 28672, 4096, 132) == choose_cut(128, 55296, 5120, 132) == Cut(1, 224, 2, 5)


@pytest.mark.parametrize(
    "rows,outputs,depth,why",
    [
        (64, 28672, 4096, "fewer rows"),
        (129, 28672, 4096, "more rows"),
        (96, 1024, 4096, "programs for half the multiprocessors"),
        (96, 28672, 4100, "no boxes of the depth"),
        (96, 28688, 4096, "no whole tiles of gates"),
    ],
)
def test_what_it_is_not_for(rows, outputs, depth, why):
    assert choose_cut(rows, outputs, depth, 132) is None, why


@pytest.mark.parametrize(
    "rows,outputs,depth,cut,gated,why",
    [
        (129, 64, 128, Cut(1, 64, 1, 2), False, "129 rows"),
        (9, 40, 128, Cut(1, 64, 1, 2), False, "40 outputs"),
        (9, 48, 128, Cut(1, 64, 1, 2), True, "48 outputs"),
        (9, 64, 128, Cut(1, 264, 1, 2), False, "none of the kernel's"),
        (9, 64, 128, Cut(1, 24, 1, 2), True, "none of the kernel's"),
        (9, 64, 128, Cut(2, 64, 1, 2), True, "none of the kernel's"),
        (9, 64, 128, Cut(1, 64, 3, 2), False, "clusters of 3"),
        (9, 64, 192, Cut(2, 64, 1, 2), False, "depth of 192"),
        (9, 64, 128, Cut(1, 256, 1, 9), False, "bytes of shared memory"),
    ],
)
def test_a_cut_that_the_kernel_cannot_take_is_refused(rows, outputs, depth, cut, gated, why):
    x, weight = torch.zeros(rows, depth, dtype=torch.bfloat16), torch.zeros(outputs, depth, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        run(x, weight, cut, gated)
