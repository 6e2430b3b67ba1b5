"""The experts' kernels at sizes of real models, and in CUDA graphs; small sizes are in tests/kernels."""

from __future__ import annotations

import pytest
import torch
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


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("experts,top_k,hidden,size", [(8, 2, 1024, 3584), (8, 2, 4096, 2048), (128, 8, 512, 768)])
def test_the_parts_of_few_tokens_add_up_to_the_dense_answer_in_float64(experts, top_k, hidden, size, dtype):
    from superinfer.kernels import fused_moe_few, moe

    for tokens in (tokens for tokens in range(1, 17) if fused_moe_few.takes(tokens, top_k)):
        x, logits, gate_up, down = on_gpu(dtype, tokens, experts, hidden, size, seed=tokens)
        for favourite in (False, True):
            if favourite:  # of all tokens
                logits[:, experts // 2] = 50.0
            parts = moe.moe_parts(x, logits, gate_up, down, top_k, True)
            assert parts.dtype == torch.float32 and parts.shape[1:] == (tokens, hidden)
            assert error(parts.sum(0), dense_answer(x, logits, gate_up, down, top_k, True)) < BOUND[dtype]


def test_above_few_tokens_there_is_one_part():
    from superinfer.kernels import fused_moe_few, moe

    tokens = fused_moe_few.MOST_ROWS // 2 + 1
    x, logits, gate_up, down = on_gpu(torch.bfloat16, tokens, 8, 256, 512)
    found = moe.moe_parts(x, logits, gate_up, down, 2, True)
    assert torch.equal(found, moe.moe_mlp(x, logits, gate_up, down, 2, True))


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("experts,top_k,hidden,size", [(8, 2, 1024, 3584), (128, 8, 512, 768)])
def test_few_tokens_go_through_layers_in_a_graph_as_each_layer_alone_says(experts, top_k, hidden, size, tokens):
    """Kernels start early there, and memory of one layer is the next one's: whoever does not wait reads what is old."""
    from superinfer.kernels import moe
    from superinfer.kernels.norm import add_rms_norm

    layers = [on_gpu(torch.bfloat16, 1, experts, hidden, size, seed=seed)[2:] for seed in range(3)]
    torch.manual_seed(tokens)
    routers = [torch.randn(experts, hidden, device=CUDA) / hidden**0.5 for _ in layers]
    norm, floor = torch.ones(hidden, device=CUDA, dtype=torch.bfloat16), torch.tensor(1e-3, device=CUDA)
    x = torch.randn(tokens, hidden, device=CUDA).bfloat16()

    def through() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What each layer got, and the residual behind it."""
        seen, at, residual = [], x, torch.zeros_like(x)
        for _ in range(4):
            for (gate_up, down), router in zip(layers, routers, strict=True):
                logits = at.float() @ router.T
                parts = moe.moe_parts(at, logits, gate_up, down, top_k, True)
                before, residual = at, residual.clone()
                at, residual = add_rms_norm(parts, residual, norm, floor)
                seen.append((before, logits, residual))
        return seen

    through()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = through()
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn(tokens, hidden))
        graph.replay()
        torch.cuda.synchronize()
        residual = torch.zeros_like(x).double()
        for call, (given, logits, after) in enumerate(seen):
            expected = dense_answer(given, logits, *layers[call % 3], top_k, True)
            assert error(after, residual + expected) < 2 * BOUND[torch.bfloat16], f"replay {seed}, layer {call}"
            residual = after.double()


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
