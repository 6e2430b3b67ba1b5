"""What habits of decode steps are worth, in one run: products of few rows by tensor copies (`skinny_tma`, `wide_tma`
for more) and by Triton (`skinny`), kernels that start before the one in front is over, few weights fetched by then, our
own decode attention in FlashInfer's place, and that it rotates and stores itself.

Llama-3-8B's shape, random weights, bf16, 520 tokens a sequence, greedy: device milliseconds of a step by batch, the
median of five times 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

import torch
from gpu_common import MODEL, PROMPT, ROOM, decode_plan, device_ms, fill_slots, gpu_executor
from record import write

from superinfer.kernels import fused, launch, skinny, skinny_tma, wide_tma
from superinfer.kernels.hopper import SHARED_BYTES
from superinfer.kernels.paged import AttentionByLayer, Choice, choose_attention
from superinfer.runtime.engine import cuda_build

BATCHES = (1, 2, 4, 8, 16, 32, 64, 80, 96, 112, 128)


class Variant(NamedTuple):
    """overlap: kernels start early. boxes, triton: rows up to which products are by these. wide: those of more rows by
    warpgroups. few_early: of their weights few are fetched while the kernel in front runs, else all that have room.
    attention: our own. rotating: which rotates and stores itself."""

    overlap: bool = True
    boxes: int = skinny_tma.MOST_ROWS
    triton: int = 64
    wide: bool = True
    few_early: bool = True
    attention: bool = True
    rotating: bool = True


VARIANTS = {
    "none": Variant(overlap=False, boxes=0, triton=0, wide=False, attention=False),
    "no overlap": Variant(overlap=False),
    "no boxes": Variant(boxes=0),
    "no wide": Variant(wide=False),
    "no triton": Variant(triton=0),
    "much early": Variant(few_early=False),
    "FlashInfer": Variant(attention=False),
    "not rotating": Variant(rotating=False),
    "all": Variant(),
}
STEPS, REPEATS = 20, 5
WIDE_ROWS = wide_tma.MOST_ROWS
EARLY_BYTES = {kernel: kernel.EARLY_BYTES for kernel in (skinny_tma, wide_tma)}
ROTATING = AttentionByLayer.rotating


def without_our_own(*shape: Any) -> Choice:
    """As `choose_attention`, but that decodes are FlashInfer's."""
    return choose_attention(*shape)._replace(decode="flashinfer-fa2")


def settle(variant: Variant) -> None:
    """Have the kernels' modules behave as the variant says, from the next capture on."""
    skinny.MOST_ROWS, skinny_tma.MOST_ROWS = variant.triton, variant.boxes
    wide_tma.MOST_ROWS = WIDE_ROWS if variant.wide else 0
    skinny.choose_tiles.cache_clear()
    skinny_tma.choose_cut.cache_clear()
    for kernel, bytes_early in EARLY_BYTES.items():
        kernel.EARLY_BYTES = bytes_early if variant.few_early else SHARED_BYTES
        kernel._kernel.cache_clear()
    cuda_build.choose_attention = choose_attention if variant.attention else without_our_own  # type: ignore[attr-defined]
    AttentionByLayer.rotating = ROTATING if variant.rotating else lambda self, layer: None  # type: ignore[method-assign]
    overlap = launch.overlap if variant.overlap else lambda x: {"PDL": False}
    fused.overlap = skinny.overlap = overlap  # type: ignore[attr-defined]


def measure() -> dict[int, float]:
    """Milliseconds of a decode step by batch."""
    most = max(BATCHES)
    executor = gpu_executor(max_batch_size=most, max_batch_tokens=1024, kv_tokens=most * (PROMPT + ROOM))
    fill_slots(executor, most, 1)
    found = {}
    for batch in BATCHES:
        plans = [decode_plan(batch)] * STEPS
        device_ms(executor, plans)
        found[batch] = statistics.median(device_ms(executor, plans) / STEPS for _ in range(REPEATS))
    executor.close()
    return found


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-decode-variants")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.only:
        settle(VARIANTS[name])
        results[name] = measure()
        torch.cuda.empty_cache()
        print(f"{name:16}", "  ".join(f"{batch}: {ms:.3f}" for batch, ms in results[name].items()), flush=True)
    record = {"model": MODEL, "step_ms": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_decode_variants.py', record)}")


if __name__ == "__main__":
    main()
