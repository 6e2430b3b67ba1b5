"""What a machine can do at most, measured in the same run as what is held against it."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from superinfer.runtime.sim.shapes import ModelShape

HEAD_START_CYCLES = 2_000_000  # of the device, 1 ms: longer than any call here takes to launch


class Ceilings(NamedTuple):
    """copy: bytes/s, read plus written, of a copy within the device's memory. matmul: FLOP/s of a matrix product."""

    copy: float
    matmul: float


def measure_ceilings(device: str, dtype: str, threads: int | None = None) -> Ceilings:
    """A GPU's in a process of its own, so that its memory is free again for the engine.

    dtype: of the matrix product. threads: of a CPU; None: all cores.
    """
    if not device.startswith("cuda"):
        return measure_here(device, dtype, threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_here, device, dtype, threads).result()


def measure_here(device: str, dtype: str, threads: int | None = None) -> Ceilings:
    """See measure_ceilings; in this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measure(device, dtype)
    finally:
        torch.set_num_threads(before)


def _measure(device: str, dtype: str) -> Ceilings:
    import torch

    on_gpu = device.startswith("cuda")
    size, side = (4 << 30, 8192) if on_gpu else (128 << 20, 1024)
    two = torch.ones(2, size, dtype=torch.uint8, device=device)
    copy_s = median_s(lambda: two[0].copy_(two[1]), device)
    factors = torch.randn(2, side, side, device=device).to(getattr(torch, dtype))
    return Ceilings(2 * size / copy_s, 2 * side**3 / median_s(lambda: factors[0] @ factors[1], device))


def median_s(run: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Median seconds of a call after one that warms up, by the device's own clock on a GPU."""
    return statistics.median(times_s(run, device, repeats))


def times_s(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up. On a GPU each is enqueued while the device is kept
    busy, so that what it takes to launch a short kernel is not counted as the kernel's."""
    import torch

    run()
    times = []
    for _ in range(repeats):
        if device.startswith("cuda"):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return times


def in_dtype(shape: ModelShape, dtype: str) -> ModelShape:
    """The shape with the bytes of the dtype that an engine computes in."""
    return shape._replace(dtype_bytes=4 if dtype == "float32" else 2)


def decode_floor_s(shape: ModelShape, batch: int, context: float, roof: Ceilings) -> float:
    """A step of `batch` decodes: its weights, read once or multiplied, whichever takes longer, and its KV, read.

    context: tokens of a sequence. Of a mixture, tokens are taken to pick experts uniformly (`ModelShape.read_bytes`).
    """
    weights = max(shape.read_bytes(batch) / roof.copy, batch * shape.flops_per_token / roof.matmul)
    return weights + batch * context * shape.kv_bytes_per_token / roof.copy


def prefill_flops(shape: ModelShape, tokens: int) -> float:
    """What must be computed for the first token of one prompt: matrix products and causal attention. Of the last layer
    all tokens need keys and values only; the rest of it and the output projection are for the last token."""
    pairs = shape.flops_per_pair * tokens * (tokens + 1) / 2 * (shape.layers - 1) / shape.layers
    keys_and_values = 2 * shape.hidden * 2 * shape.kv_heads * shape.head_dim
    output = 2 * shape.vocab * shape.hidden
    layer = (shape.flops_per_token - output) / shape.layers
    return tokens * (layer * (shape.layers - 1) + keys_and_values) + layer - keys_and_values + output + pairs


def prefill_floor_s(shape: ModelShape, prompts: int, tokens: int, roof: Ceilings) -> float:
    """Seconds of `prompts` prompts of `tokens` tokens, computed at once: their arithmetic, or the weights read once,
    whichever takes longer."""
    arithmetic = prompts * prefill_flops(shape, tokens) / roof.matmul
    return max(arithmetic, shape.read_bytes(prompts * tokens) / roof.copy)
