"""Products of few rows by each way there is: cuBLAS, Triton, and tensor copies cut in several ways, for warps of their
own (`tma`) and for warpgroups (`wide`).

Llama-3-8B's four matrices, random weights and inputs, bf16. gate_up is with its activation. Each time is of a graph of
launches over different weights, which the device's cache does not hold, a call's share of it; each way is first checked
against float64.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from gpu_common import PRODUCTS, milliseconds
from record import write

from superinfer.kernels import skinny, skinny_tma, wide_tma
from superinfer.kernels.activation import silu_and_mul
from superinfer.kernels.nvrtc import compiled
from superinfer.kernels.skinny_tma import Cut
from superinfer.kernels.warpgroup import made_for

LEAST_COPIES, LEAST_BYTES, REPLAYS = 8, 300e6, 20
WIDE = {  # (parts of the depth, rows of the weight in a tile)
    "qkv": [(2, 96), (4, 192)],
    "o": [(2, 64), (4, 128)],
    "gate_up": [(1, 112), (1, 224), (1, 256)],
    "down": [(2, 64), (4, 128)],
}
TILES = {"qkv": (6, 12), "o": (8, 16), "down": (8, 16)}  # of 16 rows of the weight that a program may have
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


def cuts(name: str, rows: int) -> Iterator[Cut]:
    """Those that fill the 132 multiprocessors, or nearly, each with as many stages as there is room for."""
    if rows > skinny_tma.MOST_ROWS:
        return
    if name == "gate_up":
        shapes = [(1, 7, 2, boxes) for boxes in (1, 2)] + [(1, 8, 2, 1)]
    else:
        outputs, depth = PRODUCTS[name]
        shapes = []
        for tiles, tall, parts, boxes in itertools.product(TILES[name], (1, 2), (2, 4, 8), (1, 2)):
            programs = -(-outputs // (16 * tiles)) * parts
            if tiles // tall <= skinny_tma.MOST_WARPS and 96 <= programs <= 132 and depth % (parts * boxes * 64) == 0:
                shapes.append((parts, tiles // tall, tall, boxes))
        if name != "qkv":
            shapes += [(2, 4, 1, boxes) for boxes in (1, 2)]
    for shape in shapes:
        yield Cut(*shape, 0).with_most_stages(rows)


def wide_cuts(name: str, rows: int) -> Iterator[wide_tma.Cut]:
    """The same, for warpgroups."""
    for parts, columns in WIDE[name] if rows > 32 else ():
        yield wide_tma.Cut(parts, columns, 0).with_most_stages(rows)


def gated(product: Way, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    found = product(x, weight)
    return None if found is None else silu_and_mul(found)


def by_cut(cut: Cut, is_gated: bool, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return skinny_tma.run(x, weight, cut, is_gated)


def by_wide_cut(cut: wide_tma.Cut, is_gated: bool, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return wide_tma.run(x, weight, cut, is_gated)


def ways_of(name: str, rows: int) -> dict[str, Way]:
    """What each is called -> the product, in whatever form it gives it: whole, or in parts to be added up."""
    is_gated = name == "gate_up"
    found: dict[str, Way] = {"cublas": partial(gated, F.linear) if is_gated else F.linear}
    if not is_gated:
        found["triton"] = skinny.linear_parts
    for cut in cuts(name, rows):
        found["tma p{} w{}x{} b{} s{}".format(*cut)] = partial(by_cut, cut, is_gated)
    for wide in wide_cuts(name, rows):
        found["wide p{} c{} s{}".format(*wide)] = partial(by_wide_cut, wide, is_gated)
    return found


def compile_all(every_rows: list[int]) -> None:
    """Several at once, as each takes part of a second."""
    wanted = {
        tuple(skinny_tma.compile_constants(-(-rows // 8), cut, name == "gate_up", False).items())
        for name in PRODUCTS
        for rows in every_rows
        for cut in cuts(name, rows)
    }
    wide = {
        (tuple(wide_tma.compile_constants(-(-rows // 64), cut, name == "gate_up", False).items()), cut.columns)
        for name in PRODUCTS
        for rows in every_rows
        for cut in wide_cuts(name, rows)
    }
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(compiled, "skinny_tma.cu", constants) for constants in wanted]
        found += [pool.submit(compiled, "wide_tma.cu", constants, made_for(n)) for constants, n in wide]
    for each in found:
        each.result()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of all outputs, as a share of their norm."""
    whole = found.double().sum(0) if found.dim() == 3 else found.double()
    return float((whole - exact).norm() / exact.norm())


def microseconds(way: Way, x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    """Of one call, in a graph of calls over all weights twice; median of replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights * 2:
            way(x, weight)
    graph.replay()
    return statistics.median(milliseconds(graph.replay) for _ in range(REPLAYS)) * 1e3 / (2 * len(weights))


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-skinny")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128])
    arguments = parser.parse_args()
    compile_all(arguments.rows)
    results, wrong = [], 0
    for name, (outputs, depth) in PRODUCTS.items():
        copies = max(LEAST_COPIES, -(-int(LEAST_BYTES) // (outputs * depth * 2)))
        given = dict(device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(outputs, depth, **given) * depth**-0.5 for _ in range(copies)]
        every = torch.randn(max(arguments.rows), depth, **given)
        exact_products = every.double() @ weights[0].double().T
        for rows in arguments.rows:
            x, exact = every[:rows].contiguous(), exact_products[:rows]
            if name == "gate_up":
                gate, up = exact.bfloat16().double().chunk(2, dim=-1)
                exact = F.silu(gate) * up
            for called, way in ways_of(name, rows).items():
                found = way(x, weights[0])
                if found is None:
                    continue
                torch.cuda.synchronize()
                off = error(found, exact)
                row = {"matrix": name, "rows": rows, "way": called, "error": off, "us": microseconds(way, x, weights)}
                row["tb_s"] = outputs * depth * 2 / row["us"] / 1e6
                is_wrong = not off < 6e-3  # rounding to bfloat16 is 2e-3
                wrong += is_wrong
                results.append(row)
                verdict = f"  WRONG: off by {off:.1e}" if is_wrong else ""
                print(f"{name:8} {rows:3} {called:22} {row['us']:7.2f} us {row['tb_s']:5.2f} TB/s{verdict}", flush=True)
        del weights, exact_products
    if wrong:
        raise SystemExit(f"{wrong} products are wrong: nothing is written")
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_skinny.py', {'results': results})}")


if __name__ == "__main__":
    main()
