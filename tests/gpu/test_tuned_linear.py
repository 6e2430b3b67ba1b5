"""Products with algorithms that were measured, against float32, and what a model does with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.device("cuda")
MEASURED = (16, 64, 256, 2048)
ROWS = (1, 15, 16, 64, 65, 251, 256, 257, 1000, 1793, 2030, 2048, 2080)


def tuned_for(outputs: int, depth: int, dtype: torch.dtype, rows: tuple[int, ...], bias: bool = False):
    from superinfer.kernels.cublaslt import CublasLt, Product
    from superinfer.kernels.tuned_linear import TunedLinear

    weights = [torch.randn(outputs, depth, device=CUDA, dtype=dtype) for _ in range(3)]
    added = torch.randn(outputs, device=CUDA, dtype=dtype) if bias else None
    tuned = TunedLinear(Product(CublasLt(CUDA), outputs, depth, dtype, bias))
    for count in rows:
        tuned.tune(count, weights, added)
    return tuned, weights, added


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs,depth", [(768, 512), (512, 3584), (128, 4096)])
def test_products_of_any_number_of_rows_equal_float32(outputs, depth, dtype, bias):
    """Also of numbers of rows between those measured, and beyond them."""
    tuned, weights, added = tuned_for(outputs, depth, dtype, MEASURED, bias)
    for rows in ROWS:
        x = torch.randn(rows, depth, device=CUDA, dtype=dtype)
        for weight in weights:
            found = tuned.run(x, weight, added)
            if found is None:  # as many tiles were not measured, or the algorithm of those cannot do these
                assert rows not in MEASURED
                continue
            assert any(0.97 * measured <= rows <= measured for measured in MEASURED)
            exact = F.linear(x.float(), weight.float(), None if added is None else added.float())
            assert error(found, exact) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_bias_is_that_of_the_call():
    tuned, (weight, *_), added = tuned_for(256, 512, torch.bfloat16, (16,), bias=True)
    x = torch.randn(16, 512, device=CUDA, dtype=torch.bfloat16)
    plain = F.linear(x.float(), weight.float())
    for scale in (1.0, -3.0):
        found = tuned.run(x, weight, added * scale)
        assert found is not None
        assert error(found, plain + added.float() * scale) < 4e-3


def test_a_graph_replays_the_product():
    tuned, (weight, *_), _ = tuned_for(768, 512, torch.bfloat16, (48,))
    x = torch.randn(48, 512, device=CUDA, dtype=torch.bfloat16)
    assert tuned.run(x, weight, None) is not None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tuned.run(x, weight, None)
    assert out is not None
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert error(out, F.linear(x.float(), weight.float())) < 4e-3


def test_what_is_not_contiguous_or_aligned_is_left_to_torch():
    tuned, (weight, *_), _ = tuned_for(768, 512, torch.bfloat16, (48,))
    wide = torch.randn(48, 1024, device=CUDA, dtype=torch.bfloat16)
    assert tuned.run(wide[:, :512], weight, None) is None
    flat = torch.randn(48 * 512 + 8, device=CUDA, dtype=torch.bfloat16)
    assert tuned.run(flat[8:].view(48, 512), weight, None) is None
    assert tuned.run(flat[: 8 * 512].view(8, 512), weight, None) is None


def test_a_models_layers_are_given_algorithms_and_answer_alike(tmp_path):
    from checkpoints import make_checkpoint

    from superinfer.runtime.engine.cuda_tuning import tune_linears
    from superinfer.runtime.models.config import load_config
    from superinfer.runtime.models.layers import Linear
    from superinfer.runtime.models.loader import load_model

    make_checkpoint(tmp_path, hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2)
    config = load_config(tmp_path)
    model = load_model(tmp_path, config, dtype=torch.bfloat16, device=CUDA)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    x = {layer.weight.shape[1]: torch.randn(600, layer.weight.shape[1], device=CUDA).bfloat16() for layer in layers}
    before = [layer(x[layer.weight.shape[1]]) for layer in layers]
    stages = []
    tune_linears(model, 1000, lambda stage, fraction: stages.append((stage, fraction)))
    assert any(layer.tuned is not None for layer in layers)
    assert all(0 <= fraction < 1 for _, fraction in stages)
    for layer, expected in zip(layers, before, strict=True):
        assert error(layer(x[layer.weight.shape[1]]), expected.float()) < 8e-3
