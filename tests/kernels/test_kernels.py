"""Norm, activation, rope and paged attention against their textbook definitions."""

from __future__ import annotations

import math

import pytest
import torch

from superinfer.kernels.activation import silu_and_mul
from superinfer.kernels.attention import AttentionGroup, PagedAttention, layer_views
from superinfer.kernels.norm import add_rms_norm, rms_norm
from superinfer.kernels.rope import apply_rope, rope_angles


def root(eps: float) -> torch.Tensor:
    return torch.tensor(eps).sqrt()


@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (3, 4, 16)])
def test_rms_norm_divides_by_the_root_mean_square(shape):
    x, weight = torch.randn(shape) * 3, torch.rand(shape[-1])
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, root(1e-5)).double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_tiny_values_is_damped_by_eps():
    x = torch.full((1, 8), 1e-4)
    assert rms_norm(x, torch.ones(8), root(1e-6))[0, 0].item() == pytest.approx(1e-4 / math.sqrt(1e-8 + 1e-6), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_norms_the_sum_and_keeps_it(dtype):
    x, residual, weight = torch.randn(4, 32).to(dtype), torch.randn(4, 32).to(dtype), torch.rand(32).to(dtype)
    total = x + residual
    normed, kept = add_rms_norm(x, residual, weight, root(1e-6))
    assert kept.data_ptr() == residual.data_ptr() and torch.equal(kept, total) and normed.dtype == dtype
    expected = total.float() / (total.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.float()
    torch.testing.assert_close(normed.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_silu_and_mul_gates_the_second_half_by_the_first():
    x = torch.randn(3, 14)
    expected = x[:, :7] / (1 + torch.exp(-x[:, :7])) * x[:, 7:]
    torch.testing.assert_close(silu_and_mul(x), expected)


def test_rope_rotates_each_pair_by_position_times_frequency():
    inv_freq, positions, half = [1.0, 0.1, 0.01], torch.tensor([0, 3, 1000]), 3
    frequencies = torch.tensor(inv_freq * 2)
    amplitudes = torch.full((2, 6), 1.5)
    amplitudes[1, :half] *= -1
    x = torch.randn(3, 4, 6)
    cos, sin = rope_angles(positions, frequencies, amplitudes, torch.float32)
    found = apply_rope(x, cos, sin)
    for token, position in enumerate(positions.tolist()):
        for head in range(4):
            for i in range(half):
                pair = complex(x[token, head, i], x[token, head, i + half])
                angle = position * inv_freq[i]
                turned = 1.5 * pair * complex(math.cos(angle), math.sin(angle))
                assert found[token, head, i].item() == pytest.approx(turned.real, abs=2e-4)
                assert found[token, head, i + half].item() == pytest.approx(turned.imag, abs=2e-4)


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 8), (6, 2, 8), (7, 1, 64), (2, 1, 128)])
def test_paged_attention_equals_dense_attention_on_every_layer(heads, kv_heads, head_dim):
    """Two decodes of unlike length and a chunk in the middle of a prompt, on scattered pages of a NaN-filled cache."""
    torch.manual_seed(0)
    page, layers, stride = 4, 2, 2 * 2 * 4
    cache = torch.full((20, layers, 2, page, kv_heads, head_dim), float("nan"))
    tables = {"a": [7, 3], "b": [1, 12, 5], "c": [0, 19, 4]}
    lengths, chunk = {"a": 6, "b": 11, "c": 10}, 5  # tokens in all; the chunk is c's last five
    dense = {s: torch.randn(2, layers, n, kv_heads, head_dim) for s, n in lengths.items()}

    def key_rows(s: str, start: int, end: int) -> list[int]:
        return [tables[s][p // page] * stride + p % page for p in range(start, end)]

    def index(rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows + [r + page for r in rows])

    new = {"a": (5, 6), "b": (10, 11), "c": (5, 10)}
    for s, (start, _) in new.items():
        for p in range(start):
            for kv in range(2):
                cache[tables[s][p // page], :, kv, p % page] = dense[s][kv, :, p]

    padded = key_rows("a", 0, 6) + key_rows("a", 0, 1) * 5 + key_rows("b", 0, 11)
    decode_mask = torch.zeros(2, 1, 1, 11)
    decode_mask[0, ..., 6:] = -torch.inf
    chunk_mask = torch.full((chunk, 10), -torch.inf).triu(6)
    groups = [
        AttentionGroup(2, 1, 11, index(padded), decode_mask),
        AttentionGroup(1, chunk, 10, index(key_rows("c", 0, 10)), chunk_mask),
    ]
    written = torch.tensor([row for s, span in new.items() for row in key_rows(s, *span)])
    attention = PagedAttention(layer_views(cache), kv_heads, written, written + page, [groups] * layers)

    for layer in range(layers):
        q = torch.randn(7, heads, head_dim)
        k, v = (torch.cat([dense[s][kv, layer, a:b] for s, (a, b) in new.items()]).flatten(1) for kv in range(2))
        found = attention.attend(layer, q, k, v, 0.3).view(7, heads, head_dim)
        row = 0
        for s, (start, end) in new.items():
            for position in range(start, end):
                for head in range(heads):
                    keys, values = dense[s][:, layer, : position + 1, head * kv_heads // heads]
                    expected = (keys @ q[row, head] * 0.3).softmax(0) @ values
                    torch.testing.assert_close(found[row, head], expected, rtol=1e-4, atol=1e-5)
                row += 1
