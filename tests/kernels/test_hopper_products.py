"""What the GPU tests of products with gates hold each element to: rounding passes, a little more does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hopper_products import SUM_ERROR, assert_activated

ROWS, DEPTH, ANSWERS = 256, 512, 1024


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, and what their gates let through, of float32 sums that are off by a tenth of what they may be."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, DEPTH, generator=generator).to(dtype) for n in (ROWS, 2 * ANSWERS))
    weight = weight * DEPTH**-0.5
    sums = x.float() @ weight.float().T
    sums += SUM_ERROR / 10 * torch.randn(sums.shape, generator=generator)
    gate, up = sums.to(dtype).float().chunk(2, dim=-1)
    return x, weight, (F.silu(gate) * up).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_differs_by_rounding_alone_passes(dtype):
    x, weight, found = product(dtype)
    assert_activated(found, x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_element_that_is_a_little_off_is_seen_and_told(dtype):
    x, weight, found = product(dtype)
    row, column = divmod(int((found.abs() - 0.05).abs().argmin()), ANSWERS)
    found[row, column] *= 1.02
    with pytest.raises(AssertionError, match=rf"^1 of {ROWS * ANSWERS} elements .* \({row}, {column}\)"):
        assert_activated(found, x, weight)


def test_an_element_that_was_not_written_is_seen():
    x, weight, found = product(torch.bfloat16)
    found[7, 9] = float("nan")
    with pytest.raises(AssertionError):
        assert_activated(found, x, weight)
