"""The experts' layer of few tokens as it was, with its kernels overlapping, and by the kernels of few tokens with each
of a list of tiles.

Mixtral 8x7B's and Qwen3-30B-A3B's layers, random weights and inputs, bf16. A layer is the router's product, the experts
and the norm behind, which adds parts up. Microseconds of one layer: graphs of 20 layers, four different ones by turns,
the median of 20 replays. What differs from the answer in float64 is said to be WRONG, and not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from record import write

from superinfer.kernels import fused_moe, fused_moe_few, moe
from superinfer.kernels.fused import add_rms_norm
from superinfer.kernels.fused_moe import Tile
from superinfer.kernels.fused_moe_few import Tiles

SHAPES = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768)}
TOKENS = (1, 2, 4, 8)
LAYERS, LAUNCHES, REPLAYS = 4, 20, 20
MOST_ERROR = 8e-3
GATE_UPS = (
    Tile(16, 128, 4, 4), Tile(16, 128, 4, 6), Tile(16, 256, 4, 4), Tile(16, 256, 8, 4), Tile(32, 64, 4, 6),
    Tile(32, 128, 4, 3), Tile(32, 128, 4, 4), Tile(32, 128, 4, 5), Tile(32, 128, 8, 4), Tile(32, 256, 8, 3),
    Tile(32, 256, 8, 5), Tile(64, 64, 4, 6), Tile(64, 128, 4, 3), Tile(64, 128, 8, 3),
)  # fmt: skip
DOWNS = (
    (Tile(32, 128, 4, 4), 1), (Tile(32, 128, 4, 6), 1), (Tile(32, 256, 4, 4), 1), (Tile(32, 256, 4, 4), 2),
    (Tile(64, 64, 4, 6), 2), (Tile(64, 128, 4, 4), 1), (Tile(64, 128, 4, 5), 1), (Tile(64, 128, 4, 5), 2),
    (Tile(64, 128, 4, 5), 4), (Tile(64, 256, 8, 4), 1), (Tile(64, 256, 8, 5), 1), (Tile(64, 256, 8, 3), 2),
    (Tile(64, 128, 8, 5), 2),
)  # fmt: skip


class Layer(NamedTuple):
    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model(NamedTuple):
    name: str
    top_k: int
    layers: list[Layer]
    norm: torch.Tensor
    floor: torch.Tensor


# (x, logits, layer, top_k) -> what the norm takes.
Way = Callable[[torch.Tensor, torch.Tensor, Layer, int], torch.Tensor]


def build(name: str) -> Model:
    experts, top_k, hidden, size = SHAPES[name]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    layers = [
        Layer(random(experts, hidden), random(experts, 2 * size, hidden), random(experts, hidden, size))
        for _ in range(LAYERS)
    ]
    ones = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    return Model(name, top_k, layers, ones, torch.tensor(1e-3, device="cuda"))


def whole(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int, overlap: bool) -> torch.Tensor:
    """By the kernels of any number of tokens."""
    own = fused_moe.overlap
    if not overlap:
        fused_moe.overlap = lambda x: {"PDL": False}  # type: ignore[attr-defined]
    try:
        return fused_moe.moe_mlp(x, logits, layer.gate_up, layer.down, top_k, True)
    finally:
        fused_moe.overlap = own  # type: ignore[attr-defined]


def few(
    x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int, tiles: Tiles | None = None, prefetched: int = 2
) -> torch.Tensor:
    fused_moe_few.PREFETCHED = prefetched
    return fused_moe_few.moe_parts(x, logits, layer.gate_up, layer.down, top_k, True, tiles)


def nothing(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int) -> torch.Tensor:
    """No experts: what the router and the norm take."""
    return x


def answer(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int) -> torch.Tensor:
    """In float64, a row at a time; of equally probable experts the first."""
    order = logits.double().sort(dim=-1, descending=True, stable=True)
    weights = order.values[:, :top_k].softmax(-1)
    found = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, experts in enumerate(order.indices[:, :top_k].tolist()):
        for choice, expert in enumerate(experts):
            gate, up = (layer.gate_up[expert].double() @ x[token].double()).chunk(2)
            found[token] += weights[token, choice] * (layer.down[expert].double() @ (F.silu(gate) * up))
    return found


def microseconds(model: Model, x: torch.Tensor, way: Way) -> float:
    """Of one layer."""
    residual = torch.zeros_like(x)

    def launch(call: int) -> None:
        layer = model.layers[call % LAYERS]
        add_rms_norm(way(x, F.linear(x, layer.router), layer, model.top_k), residual, model.norm, model.floor)

    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(LAUNCHES):
            launch(call)
    graph.replay()
    times = []
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(REPLAYS):
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) * 1e3 / LAUNCHES)
    return statistics.median(times)


class Case:
    """One model and number of tokens."""

    def __init__(self, model: Model, tokens: int) -> None:
        self.model = model
        hidden = model.layers[0].router.shape[1]
        self.x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        self.logits = F.linear(self.x, model.layers[0].router)
        self.expected = answer(self.x, self.logits, model.layers[0], model.top_k)
        # Of every layer the weights of the experts picked, which is what must be read.
        self.megabytes = 0.0
        for layer in model.layers:
            picked = F.linear(self.x, layer.router).float().topk(model.top_k).indices.unique()
            one = layer.gate_up[0].nbytes + layer.down[0].nbytes
            self.megabytes += len(picked) * one / LAYERS / 1e6
        blocks = fused_moe_few.route_few(self.logits, model.top_k, True)[2]
        self.tiles = fused_moe_few.choose_tiles(
            len(blocks), layer.down.shape[2], self.x.dtype, fused_moe.shared_memory_of(self.x.device)
        )
        self.found: dict[str, Any] = {"model": model.name, "tokens": tokens, "megabytes": self.megabytes, "us": {}}

    def measure(self, name: str, way: Way, exact: bool = True) -> None:
        """Print, and add to `found`. exact: held against the answer."""
        try:
            result = way(self.x, self.logits, self.model.layers[0], self.model.top_k).double()
            summed = result.sum(0) if result.dim() == 3 else result
            error = ((summed - self.expected).norm() / self.expected.norm()).item()
            # The other way round a NaN would pass.
            us = microseconds(self.model, self.x, way) if not exact or error < MOST_ERROR else None
        except Exception as failure:  # too much shared memory, or not to be compiled
            if "CUDA error" in str(failure):
                raise  # nothing works after that
            print(f"  {name:34} FAILED {str(failure).splitlines()[0][:100]}", flush=True)
            return
        if us is None:
            print(f"  {name:34} WRONG by {error:.1e}", flush=True)
            return
        self.found["us"][name] = us
        print(f"  {name:34} {us:7.1f} us  {self.megabytes / us:5.2f} TB/s", flush=True)

    def title(self) -> None:
        tiles = f"gate_up {tuple(self.tiles.gate_up)}, down {tuple(self.tiles.down)} x {self.tiles.splits}"
        head = f"{self.model.name}, {len(self.x)} tokens, {self.megabytes:.0f} MB a layer; own tiles: {tiles}"
        print(head, flush=True)


def candidates(tiles: Tiles) -> dict[str, Way]:
    """`tiles` with one of the two products computed otherwise."""
    ways: dict[str, Way] = {f"prefetched {count}": partial(few, prefetched=count) for count in (0, 4)}
    for tile in GATE_UPS:
        ways[f"gate_up {tuple(tile)}"] = partial(few, tiles=tiles._replace(gate_up=tile))
    for tile, splits in DOWNS:
        ways[f"down {tuple(tile)} x {splits}"] = partial(few, tiles=tiles._replace(down=tile, splits=splits))
    return ways


def compile_all(cases: list[Case], threads: int) -> None:
    """Run every candidate once, many at a time. What fails is told when it is measured."""
    ready: dict[tuple[Any, ...], Callable[[], Any]] = {}
    for case in cases:
        few(case.x, case.logits, case.model.layers[0], case.model.top_k)
        for name, way in candidates(case.tiles).items():
            if not name.startswith("prefetched"):  # a number that all threads share
                run = partial(way, case.x, case.logits, case.model.layers[0], case.model.top_k)
                ready.setdefault((case.model.name, name), run)

    def attempt(run: Callable[[], Any]) -> None:
        try:
            run()
        except Exception as failure:
            print(f"  compiling ahead: {str(failure)[:100]}", flush=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(attempt, ready.values()))
    torch.cuda.synchronize()


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-moe-few")
    parser.add_argument("--seconds", type=float, default=100, help="candidates after that are left out")
    parser.add_argument("--threads", type=int, default=16, help="that compile")
    parser.add_argument("--chosen-only", action="store_true", help="no candidates")
    arguments = parser.parse_args()
    begun = time.monotonic()
    torch.manual_seed(0)
    models = [build(name) for name in SHAPES]
    cases = [Case(model, tokens) for tokens in TOKENS for model in models]
    for case in cases:
        case.title()
        case.measure("router and norm alone", nothing, exact=False)
        case.measure("before", partial(whole, overlap=False))
        case.measure("overlapping", partial(whole, overlap=True))
        case.measure("few", few)
        case.measure("as the models call it", lambda x, logits, layer, k: moe.moe_parts(x, logits, *layer[1:], k, True))
    print(f"after {time.monotonic() - begun:.0f} s", flush=True)
    left_out = 0
    if not arguments.chosen_only:
        compile_all(cases, arguments.threads)
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
        for case in cases:
            case.title()
            for name, way in candidates(case.tiles).items():
                if time.monotonic() - begun > arguments.seconds:
                    left_out += 1
                else:
                    case.measure(name, way)
            best = sorted(case.found["us"].items(), key=lambda pair: pair[1])[1:4]
            print("  best: " + "; ".join(f"{name} {us:.1f}" for name, us in best), flush=True)
    record = {"results": [case.found for case in cases], "candidates_left_out": left_out}
    print(f"{left_out} left out; written to {write(arguments.name, 'python benchmarks/gpu_moe_few.py', record)}")


if __name__ == "__main__":
    main()
