"""The experts' layer with each of its tiles, and with torch's grouped products, by rows an expert has.

Mixtral 8x7B's and Qwen3-30B-A3B's layers, random weights and inputs, bf16, each token to random experts. Weights of two
layers by turns.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from gpu_common import milliseconds_a_call
from record import write

from superinfer.kernels import fused_moe

SHAPES = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768)}
LAYERS, ROUNDS, LEAST_MS, MOST_CALLS = 2, 3, 6.0, 30


def run(
    layers: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, logits: torch.Tensor, k: int, at: int
) -> None:
    fused_moe.moe_mlp(x, logits, *layers[at], k, True)


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-moe")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    arguments = parser.parse_args()
    every = {f"rows {tiles.rows}, to {most} an expert": tiles for most, tiles in fused_moe.TILES}
    every["rows 128"] = fused_moe.TALLEST
    choose, own = fused_moe.choose_tiles, (fused_moe.GROUPED_FROM, fused_moe.GROUPED_LEAST)
    results = []
    for model, (experts, top_k, hidden, size) in SHAPES.items():
        given = dict(device="cuda", dtype=torch.bfloat16)
        layers = [
            (torch.randn(experts, 2 * size, hidden, **given) * 0.02, torch.randn(experts, hidden, size, **given) * 0.02)
            for _ in range(LAYERS)
        ]
        for tokens in arguments.tokens:
            x, logits = torch.randn(tokens, hidden, **given), torch.randn(tokens, experts, device="cuda")
            row = {"model": model, "tokens": tokens, "rows_an_expert": tokens * top_k / experts}
            row["weights_gb"] = sum(part.nbytes for part in layers[0]) / 1e9 * min(1.0, row["rows_an_expert"])
            layer = partial(run, layers, x, logits, top_k)
            ways = {"chosen": None, "grouped": None, **every}
            for name, tiles in ways.items():
                fused_moe.choose_tiles = (lambda *_, tiles=tiles: tiles) if tiles else choose
                grouped = {"chosen": own, "grouped": (0, 0)}.get(name, (1 << 40, 0))
                fused_moe.GROUPED_FROM, fused_moe.GROUPED_LEAST = grouped
                layer(0)
                torch.cuda.synchronize()
                calls = max(3, min(MOST_CALLS, int(LEAST_MS / milliseconds_a_call(layer, 2, LAYERS))))
                row[name] = statistics.median(milliseconds_a_call(layer, calls, LAYERS) for _ in range(ROUNDS))
            results.append(row)
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        del layer, layers
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_moe.py', {'results': results})}")


if __name__ == "__main__":
    main()
