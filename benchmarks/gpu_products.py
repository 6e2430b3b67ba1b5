"""Matrix products by torch and by the algorithm that was measured at the start (`kernels/tuned_linear.py`), by turns.

Llama-3-8B's four matrices, random weights and inputs, bf16, the numbers of rows of decodes, of steps with chunks and of
prefill. Each time is of several calls in a row over weights of different layers, which the device's cache does not
hold, while the GPU stays busy, as it is under load.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from gpu_common import PRODUCTS, milliseconds_a_call
from record import write

from superinfer.kernels.cublaslt import CublasLt, Product
from superinfer.kernels.tuned_linear import TunedLinear

LAYERS, ROUNDS, MOST_CALLS, LEAST_MS = 4, 7, 40, 5.0


def by_torch(x: torch.Tensor, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    return F.linear(x, weights[layer])


def by_tuned(tuned: TunedLinear, x: torch.Tensor, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    found = tuned.run(x, weights[layer], None)
    assert found is not None
    return found


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-products")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 768, 1024, 1280, 2048, 4096, 8192])
    arguments = parser.parse_args()
    library = CublasLt(torch.device("cuda", torch.cuda.current_device()))
    results = []
    for rows in arguments.rows:
        whole = [0.0, 0.0]
        for name, (outputs, depth) in PRODUCTS.items():
            weights = [torch.randn(outputs, depth, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(LAYERS)]
            x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
            tuned = TunedLinear(Product(library, outputs, depth, torch.bfloat16, bias=False))
            tuned.tune(rows, weights)
            ways = partial(by_torch, x, weights), partial(by_tuned, tuned, x, weights)
            calls = min(MOST_CALLS, 2 + int(LEAST_MS / milliseconds_a_call(ways[0], 2, LAYERS)))
            rounds = [[milliseconds_a_call(way, calls, LAYERS) for way in ways] for _ in range(ROUNDS)]
            exact = x.float() @ weights[0].float().t()
            wrong = ((ways[1](0).float() - exact).norm() / exact.norm()).item()
            assert wrong < 4e-3, f"{name} of {rows} rows is off by {wrong:.1e}"
            ours = [statistics.median(way) for way in zip(*rounds, strict=True)]
            whole = [a + b for a, b in zip(whole, ours, strict=True)]
            results.append({"rows": rows, "matrix": name, "torch_ms": ours[0], "tuned_ms": ours[1], "rounds": rounds})
            print(f"{rows} rows, {name}: {ours[0] * 1e3:.1f} us by torch, {ours[1] * 1e3:.1f} tuned", flush=True)
        results.append({"rows": rows, "matrix": "all", "torch_ms": whole[0], "tuned_ms": whole[1]})
        print(f"{rows} rows: {whole[0] / whole[1]:.3f} x as quick as torch", flush=True)
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_products.py', {'results': results})}")


if __name__ == "__main__":
    main()
