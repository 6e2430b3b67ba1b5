"""Decode attention as it lies in a step: a layer's rotation, attention and output projection; by FlashInfer, and by
ours as it may be cut.

Llama-3-8B's shape, bf16, random blocks of a pool of tens of gigabytes, 32 layers in one CUDA graph: microseconds a
layer, with attention and without, the median of seven replays. Beside them what reading alone reaches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_common import milliseconds
from record import write

from superinfer.kernels import fused
from superinfer.kernels import paged_flashinfer as flashinfer
from superinfer.kernels.paged import AttentionCall, PagedBatch
from superinfer.kernels.paged_hopper import FEW, MANY, Geometry, HopperDecode, HopperKernel

HEADS, KV_HEADS, HEAD_DIM, PAGE, LAYERS = 32, 8, 128, 16, 32
BLOCKS = 26_000
GEOMETRIES = {"few": FEW, "many": MANY}
SHAPES = (
    (1, 520),
    (1, 8192),
    (1, 100_000),
    (3, 8192),
    (8, 600),
    (8, 8192),
    (32, 1024),
    (64, 520),
    (64, 2000),
    (128, 520),
    (128, 1024),
    (256, 520),
    (256, 1000),
    (400, 800),
)
HIDDEN = HEADS * HEAD_DIM
CUDA = torch.device("cuda")


def timed(step: Callable[[], None], replays: int = 7) -> float:
    """Microseconds a layer."""
    graph = torch.cuda.CUDAGraph()
    step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    taken = [milliseconds(graph.replay) * 1e3 / LAYERS for _ in range(replays + 2)]
    return statistics.median(taken[2:])


def batch_of(sequences: int, tokens: int) -> PagedBatch:
    """On blocks in random order."""
    pages = -(-tokens // PAGE)
    ends = torch.arange(sequences + 1, dtype=torch.int32)
    last = torch.full((sequences,), (tokens - 1) % PAGE + 1, dtype=torch.int32)
    indices = torch.randperm(BLOCKS)[: sequences * pages].int()
    host = [tensor.pin_memory() for tensor in (ends, ends * pages, indices, last)]
    there = [tensor.to(CUDA) for tensor in host]
    return PagedBatch(there[0], there[1], there[2], there[3], host[0], host[1], host[2], host[3], 1)


def measure(
    cache: torch.Tensor, weights: list[torch.Tensor], make: Callable[[PagedBatch], AttentionCall] | None,
    shape: tuple[int, int],
) -> float:  # fmt: skip
    """make: of a batch that never moves; None leaves attention out."""
    sequences, tokens = shape
    batch = batch_of(*shape)
    call = make(batch) if make is not None else None
    if call is not None:
        call.plan(batch)
    last = batch.kv_indices.view(sequences, -1)[:, -1]
    places = (last * PAGE + (tokens - 1) % PAGE).int().contiguous()
    qkv = torch.randn(sequences, HEADS + 2 * KV_HEADS, HEAD_DIM, device=CUDA, dtype=torch.bfloat16)
    angle = torch.randn(sequences, 1, HEAD_DIM, device=CUDA, dtype=torch.bfloat16)
    q, out = torch.empty(2, sequences, HEADS, HEAD_DIM, device=CUDA, dtype=torch.bfloat16).unbind()

    def step() -> None:
        for layer, weight in enumerate(weights):
            fused.rope_and_store(qkv, angle, angle, places, cache[:, layer], KV_HEADS, out=q)
            if call is not None:
                call.run(q, cache[:, layer], layer, out)
            torch.matmul(out.view(sequences, HIDDEN), weight.t())

    return timed(step)


def by_flashinfer() -> Callable[[PagedBatch], AttentionCall]:
    """FlashInfer's tensor-core decode."""
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    room = flashinfer.workspace_bytes(512, HEADS, HEAD_DIM, multiprocessors, KV_HEADS)
    workspace = torch.zeros(room, dtype=torch.uint8, device=CUDA)
    plans = torch.zeros(flashinfer.PLAN_BYTES, dtype=torch.uint8, device=CUDA)
    stage = flashinfer.PlanStage(CUDA, torch.cuda.Stream())
    sizes = HEADS, KV_HEADS, HEAD_DIM, PAGE, HEAD_DIM**-0.5, torch.bfloat16
    return lambda batch: flashinfer.FlashInferDecode(workspace, plans, stage, batch, *sizes)


def by_ours(geometry: Geometry) -> Callable[[PagedBatch], AttentionCall]:
    """Our kernel, cut so."""
    kernel = HopperKernel(HEADS, KV_HEADS, HEAD_DIM, PAGE, HEAD_DIM**-0.5, torch.bfloat16, 512, CUDA, geometry)
    return lambda _: HopperDecode(kernel)


def reading_tb_s() -> float:
    """What adding 4 GB up reaches."""
    numbers = torch.empty(1 << 30, device=CUDA)

    def step() -> None:
        torch.sum(numbers)

    return numbers.nbytes / (timed(step) * LAYERS) / 1e6


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-decode-attention")
    given = parser.parse_args()
    reading = reading_tb_s()
    cache = torch.empty(BLOCKS, LAYERS, 2, PAGE, KV_HEADS, HEAD_DIM, device=CUDA, dtype=torch.bfloat16).normal_()
    weights = [torch.randn(HIDDEN, HIDDEN, device=CUDA, dtype=torch.bfloat16) * 0.02 for _ in range(LAYERS)]
    calls: dict[str, Callable[[PagedBatch], AttentionCall] | None] = {"without": None, "FlashInfer": by_flashinfer()}
    calls |= {name: by_ours(geometry) for name, geometry in GEOMETRIES.items()}
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        row = {name: round(measure(cache, weights, call, shape), 1) for name, call in calls.items()}
        rows.append({"sequences": shape[0], "tokens": shape[1], "us": row})
        print(
            f"{shape[0]:4d} x {shape[1]:5,d}  " + "  ".join(f"{name} {us:6.1f}" for name, us in row.items()), flush=True
        )
    command = f"python benchmarks/gpu_decode_attention.py --name {given.name}"
    cuts = {name: geometry._asdict() for name, geometry in GEOMETRIES.items()}
    write(given.name, command, {"reading_tb_s": reading, "geometries": cuts, "rows": rows})


if __name__ == "__main__":
    main()
