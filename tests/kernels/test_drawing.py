"""Tokens drawn by the Triton kernels, against `sampling.draw`; through the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from superinfer.kernels import drawing, sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("vocab", [7, 211, 5003])
def test_tokens_are_those_of_inverse_transform_sampling(dtype, vocab):
    torch.manual_seed(vocab)
    rows = 8
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    logits[1, vocab // 2 :] = -torch.inf
    logits[2, : vocab - 1] = -torch.inf
    logits[3] = 3.0
    temperature = torch.linspace(0.01, 3, rows)
    weights = sampling.temper(logits.float(), temperature).exp().double()
    share = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    # Halfway between two tokens' shares, where rounding cannot move a draw to the next token; and the least there is.
    id_of = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(1))
    uniforms = (share.gather(1, id_of) - weights.gather(1, id_of) / weights.sum(-1, keepdim=True) / 2).squeeze(1)
    uniforms[4] = 0.0
    expected = sampling.draw(weights, uniforms)
    told = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    found = drawing.draw(logits.to(DEVICE), temperature.to(DEVICE), uniforms.to(DEVICE), told)
    assert told.tolist() == found.tolist()
    clear = weights.gather(1, expected[:, None]).squeeze(1) / weights.sum(-1) > 1e-4
    assert clear.sum() >= rows - 3
    assert found.cpu()[clear].tolist() == expected[clear].tolist()


def test_a_draw_never_leaves_what_has_weight_nor_the_vocabulary():
    rows, vocab = 8, 300
    logits = torch.full((rows, vocab), -torch.inf)  # row 5 stays so
    logits[0, 250] = 1.0
    logits[1, [3, 299]] = 0.0
    logits[2] = torch.nan
    logits[3, 17] = torch.nan
    logits[3, 18] = 0.0
    logits[4] = -1e30
    logits[6, [0, 1, 298]] = torch.tensor([1.0, torch.inf, 2.0])
    logits[7, [0, 299]] = torch.tensor([1.0, torch.nan])
    uniforms = torch.full((rows,), 1 - 2.0**-53, dtype=torch.float64)
    told = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    tokens = drawing.draw(logits.to(DEVICE), torch.ones(rows, device=DEVICE), uniforms.to(DEVICE), told).tolist()
    none = sampling.NO_TOKEN
    assert told.tolist() == [250, 299, none, none, 299, none, none, none]
    assert tokens == [250, 299, 0, 0, 299, 0, 0, 0]  # the next step looks them up


def test_even_shares_give_each_token_its_part_of_the_draws():
    draws, vocab = 24, 5
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    shares = (logits / 0.7).softmax(-1)
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    many = logits.expand(draws, vocab).contiguous().to(DEVICE)
    tokens = drawing.draw(many, torch.full((draws,), 0.7, device=DEVICE), uniforms.to(DEVICE)).cpu()
    assert tokens.tolist() == sorted(tokens.tolist())
    assert ((tokens.bincount(minlength=vocab) - draws * shares).abs() <= 1).all()
