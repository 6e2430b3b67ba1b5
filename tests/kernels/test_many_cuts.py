"""How gates of a thousand rows and more are cut over a GPU's multiprocessors, without one."""

from __future__ import annotations

import itertools

import pytest
import torch

from superinfer.kernels.hopper import SHARED_BYTES
from superinfer.kernels.many_tma import CUTS, LEAST_FULL, Cut, choose_cut, run


@pytest.mark.parametrize("cut", CUTS)
def test_stages_and_answers_fit(cut):
    assert cut.shared_bytes() <= SHARED_BYTES < cut._replace(stages=cut.stages + 1).shared_bytes()


@pytest.mark.parametrize("outputs,depth", [(28672, 4096), (55296, 5120)])
@pytest.mark.parametrize("rows", [1024, 2048, 4096, 8000, 8192])
def test_prompts_of_llama_3_8b_and_qwen_2_5_32b_are_for_it(rows, outputs, depth):
    cut = choose_cut(rows, outputs, depth, 132)
    assert cut in CUTS and cut.full(rows, outputs // 2, 132) >= LEAST_FULL


@pytest.mark.parametrize("rows,columns", [(1024, 160), (2048, 160), (4096, 192), (8000, 192), (8192, 192)])
def test_llama_3_8b_has_the_tiles_that_were_the_quickest(rows, columns):
    """On an H200 at its power limit: docs/performance.md."""
    assert choose_cut(rows, 28672, 4096, 132).columns == columns


@pytest.mark.parametrize("rows,answers", itertools.product([1, 128, 129, 300, 1408], [16, 80, 96, 1000]))
def test_no_more_is_wanted_than_is_computed(rows, answers):
    """By hand: pairs of tiles, a last row of tiles two by two, and as many turns of all clusters as that takes."""
    for cut in CUTS:
        down, across = -(-rows // 128), -(-answers // (cut.columns // 2))
        pairs = down // 2 * across + (-(-across // 2) if down % 2 else 0)
        turns = -(-pairs // 66)
        assert cut.full(rows, answers, 132) == pytest.approx(rows * answers / (turns * 132 * 128 * cut.columns / 2))


@pytest.mark.parametrize(
    "rows,outputs,depth,why",
    [
        (1023, 28672, 4096, "fewer rows"),
        (1025, 28672, 4096, "a ninth row of tiles for one row"),
        (1024, 28672, 4100, "no boxes of the depth"),
        (1024, 28680, 4096, "rows of answers that no box begins at"),
        (1024, 2048, 4096, "too few tiles"),
    ],
)
def test_what_it_is_not_for(rows, outputs, depth, why):
    assert choose_cut(rows, outputs, depth, 132) is None, why


@pytest.mark.parametrize(
    "rows,outputs,depth,cut,why",
    [
        (0, 64, 128, Cut(64, 2), "0 rows"),
        (9, 40, 128, Cut(64, 2), "40 outputs"),
        (9, 64, 100, Cut(64, 2), "depth of 100"),
        (9, 64, 128, Cut(80, 2), "none of the kernel's"),
        (9, 64, 128, Cut(224, 2), "none of the kernel's"),
        (9, 64, 128, Cut(64, 1), "none of the kernel's"),
        (9, 64, 128, Cut(192, 5), "bytes of shared memory"),
    ],
)
def test_a_cut_that_the_kernel_cannot_take_is_refused(rows, outputs, depth, cut, why):
    x, weight = torch.zeros(rows, depth, dtype=torch.bfloat16), torch.zeros(outputs, depth, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        run(x, weight, cut)
