"""Mixtures of experts in plain torch, against every expert on every token."""

from __future__ import annotations

import pytest
import torch
from moe_cases import case, dense_answer

from superinfer.kernels import moe


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens,experts,top_k", [(1, 3, 1), (9, 8, 2), (30, 5, 5), (4, 40, 3)])
def test_the_reference_sums_the_chosen_experts(tokens, experts, top_k, normalize):
    inputs = case(tokens, experts, 24, 16)
    expected = dense_answer(*inputs, top_k, normalize)
    torch.testing.assert_close(moe.moe_mlp(*inputs, top_k, normalize).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_token_gets_the_same_in_any_batch():
    x, logits, gate_up, down = case(17, 6, 32, 24)
    together = moe.moe_mlp(x, logits, gate_up, down, 2, True)
    for i in range(17):
        alone = moe.moe_mlp(x[i : i + 1], logits[i : i + 1], gate_up, down, 2, True)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
