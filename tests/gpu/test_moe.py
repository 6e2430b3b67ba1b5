"""The experts' kernels at sizes of real models, and in CUDA graphs; small sizes are in tests/kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moe_cases import case, dense_answer

CUDA = torch.device("cuda")
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def on_gpu(dtype: torch.dtype, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Router logits stay float32: rounded they would tie, and which expert of two is picked is nobody's promise."""
    x, logits, gate_up, down = (t.to(CUDA) for t in case(*shape, seed=seed))
    return [x.to(dtype), logits, gate_up.to(dtype), down.to(dtype)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("experts,top_k,hidden,size", [(8, 2, 1024, 3584), (128, 8, 512, 768)])
@pytest.mark.parametrize("tokens", [1, 33, 64, 128, 256, 1100])
def test_the_layer_equals_the_dense_answer_in_float64(tokens, experts, top_k, hidden, size, dtype):
    """From one token to a prefill: each number of tokens picks tiles of its own."""
    from superinfer.kernels import fused_moe

    inputs = on_gpu(dtype, tokens, experts, hidden, size)
    x, logits, gate_up, down = inputs
    found = fused_moe.moe_mlp(x, logits, gate_up, down, top_k, True)
    for start in range(0, tokens, 128):  # the dense answer takes every expert for every token
        here = slice(start, start + 128)
        expected = dense_answer(x[here], logits[here], gate_up, down, top_k, True)
        assert error(found[here], expected) < BOUND[dtype]


def test_a_graph_follows_the_routing_of_each_replay():
    from superinfer.kernels import fused_moe

    x, logits, gate_up, down = on_gpu(torch.bfloat16, 24, 8, 256, 512)
    fused_moe.moe_mlp(x, logits, gate_up, down, 2, True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe.moe_mlp(x, logits, gate_up, down, 2, True)
    for seed in (1, 2):
        fresh = on_gpu(torch.bfloat16, 24, 8, 256, 512, seed=seed)
        x.copy_(fresh[0])
        logits.copy_(fresh[1])
        if seed == 2:
            logits[:, 3] = 50.0  # everyone to one expert
        graph.replay()
        assert torch.equal(out, fused_moe.moe_mlp(x, logits, gate_up, down, 2, True))
        assert error(out, dense_answer(x, logits, gate_up, down, 2, True)) < BOUND[torch.bfloat16]


def test_the_same_inputs_give_the_same_bits_in_any_batch_of_one_tile_size():
    from superinfer.kernels import fused_moe

    x, logits, gate_up, down = on_gpu(torch.bfloat16, 32, 8, 256, 512)
    together = fused_moe.moe_mlp(x, logits, gate_up, down, 2, True)
    for i in (0, 13, 31):
        here = slice(i, i + 1)
        assert torch.equal(fused_moe.moe_mlp(x[here], logits[here], gate_up, down, 2, True), together[here])


def test_very_many_rows_are_grouped_products_without_waiting_for_the_device():
    from superinfer.kernels import fused_moe

    tokens, experts, size = 2200, 8, 2048
    x, logits, gate_up, down = on_gpu(torch.bfloat16, tokens, experts, 256, size)
    assert 2 * tokens >= fused_moe.GROUPED_FROM * experts
    assert size >= fused_moe.GROUPED_LEAST
    fused_moe.moe_mlp(x, logits, gate_up, down, 2, True)  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = fused_moe.moe_mlp(x, logits, gate_up, down, 2, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for start in range(0, tokens, 128):
        here = slice(start, start + 128)
        expected = dense_answer(x[here], logits[here], gate_up, down, 2, True)
        assert error(found[here], expected) < BOUND[torch.bfloat16]


WIDE = (6, 1024, 14336)  # experts, hidden, size: products wide enough for one token's own kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k,normalize", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_token_goes_through_its_experts_in_parts(dtype, top_k, normalize, seed):
    from superinfer.kernels import moe_token

    x, logits, gate_up, down = on_gpu(dtype, 1, *WIDE, seed=seed)
    stale = [
        torch.full((top_k, WIDE[2]), float("nan"), dtype=dtype, device=CUDA),
        torch.full((64, 1024), float("nan"), device=CUDA),
    ]
    del stale  # where what is computed may come to lie
    parts = moe_token.moe_parts(x, logits, gate_up, down, top_k, normalize)
    assert parts is not None and parts.shape[1:] == (1, WIDE[1]) and parts.shape[0] % top_k == 0
    expected = dense_answer(x, logits, gate_up, down, top_k, normalize)
    assert error(parts.sum(0), expected) < BOUND[dtype]


def test_one_tokens_experts_are_those_of_each_replay():
    """Behind kernels that write what is read, several layers in a row, as in a decode step."""
    from superinfer.kernels import moe_token

    x, _, gate_up, down = on_gpu(torch.bfloat16, 1, *WIDE)
    router = torch.randn(WIDE[0], WIDE[1], dtype=torch.bfloat16, device=CUDA) * WIDE[1] ** -0.5
    given, found = x.clone(), []

    def layers(value: torch.Tensor) -> None:
        found.clear()
        for _ in range(6):
            routed = (value @ router.T).float() * 4
            parts = moe_token.moe_parts(value, routed, gate_up, down, 2, True)
            assert parts is not None
            found.append((value, routed, parts))
            value = F.rms_norm(parts.sum(0), (WIDE[1],)).to(torch.bfloat16)

    layers(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(given)
    for seed in range(4):
        given.copy_(torch.randn(1, WIDE[1], generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        for value, routed, parts in found:
            assert error(parts.sum(0), dense_answer(value, routed, gate_up, down, 2, True)) < BOUND[torch.bfloat16]


def test_what_is_not_for_one_tokens_kernels():
    from superinfer.kernels import moe_token

    for tokens, experts, hidden, size in ((2, *WIDE), (1, 128, 512, 768)):
        x, logits, gate_up, down = on_gpu(torch.bfloat16, tokens, experts, hidden, size)
        assert moe_token.moe_parts(x, logits, gate_up, down, 2, True) is None
    x, logits, gate_up, down = on_gpu(torch.float32, 1, *WIDE)
    assert moe_token.moe_parts(x, logits, gate_up, down, 2, True) is None
