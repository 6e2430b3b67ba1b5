"""Gates of many rows and what they let through: one kernel (`kernels/many_tma.py`) against cuBLAS's measured algorithm
and the activation behind it, and that product alone.

Llama-3-8B's and Qwen2.5-32B's gate and up, random weights and inputs, bf16. Each way runs alone for as long as it takes
a GPU to settle at its power limit, then is timed; ways by turns. Weights of different layers take turns, which the
device's cache does not hold.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from gpu_common import ceilings, milliseconds_a_call
from record import write

from superinfer.kernels import many_tma
from superinfer.kernels.activation import silu_and_mul
from superinfer.kernels.cublaslt import CublasLt, Product
from superinfer.kernels.tuned_linear import TunedLinear

SHAPES = {"Llama-3-8B": (28672, 4096), "Qwen2.5-32B": (55296, 5120)}  # [gates and up, hidden]
LAYERS, SETTLE_MS, TIMED_MS = 4, 150, 250


def product(tuned: TunedLinear, x: torch.Tensor, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    found = tuned.run(x, weights[layer], None)
    assert found is not None
    return found


def two_kernels(tuned: TunedLinear, x: torch.Tensor, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    return silu_and_mul(product(tuned, x, weights, layer))


def one_kernel(cut: many_tma.Cut, x: torch.Tensor, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    return many_tma.run(x, weights[layer], cut)


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-gates")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8000, 8192])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    roof = ceilings()
    library = CublasLt(torch.device("cuda", torch.cuda.current_device()))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    results = []
    for name, (outputs, depth) in SHAPES.items():
        weights = [torch.randn(outputs, depth, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(LAYERS)]
        for rows in arguments.rows:
            x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
            tuned = TunedLinear(Product(library, outputs, depth, torch.bfloat16, bias=False))
            tuned.tune(rows, weights)
            ways = {"cuBLAS, then the activation": partial(two_kernels, tuned, x, weights)}
            ways["cuBLAS alone"] = partial(product, tuned, x, weights)
            ways |= {f"tiles of {cut.columns}": partial(one_kernel, cut, x, weights) for cut in many_tma.CUTS}
            exact = two_kernels(tuned, x, weights, 0).float()
            for cut in many_tma.CUTS:
                wrong = ((one_kernel(cut, x, weights, 0).float() - exact).norm() / exact.norm()).item()
                assert wrong < 4e-3, f"{name}, {rows} rows by {cut} is off by {wrong:.1e}"
            calls = {way: 1 / milliseconds_a_call(call, 4, LAYERS) for way, call in ways.items()}
            rounds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way, call in ways.items():
                    milliseconds_a_call(call, max(1, int(SETTLE_MS * calls[way])), LAYERS)
                    timed = milliseconds_a_call(call, max(1, int(TIMED_MS * calls[way])), LAYERS)
                    rounds[way].append(timed)
            found = {way: statistics.mean(times) for way, times in rounds.items()}
            chosen = many_tma.choose_cut(rows, outputs, depth, multiprocessors)
            row = {"model": name, "rows": rows, "chosen": chosen and chosen.columns, "ms": found, "rounds": rounds}
            results.append(row)
            told = ", ".join(f"{way} {ms * 1e3:.0f}" for way, ms in found.items())
            print(f"{name}, {rows} rows, µs: {told}; chosen: {row['chosen']}", flush=True)
    record = {"layers": LAYERS, "ceilings": roof, "products": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_gates.py', record)}")


if __name__ == "__main__":
    main()
