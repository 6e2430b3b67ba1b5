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
