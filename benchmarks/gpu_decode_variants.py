"""What habits of decode steps are worth, in one run: products of few rows by tensor copies (`skinny_tma`) and by Triton
(`skinny`), kernels that start before the one in front is over, and our own decode attention in FlashInfer's place.

Llama-3-8B's shape, random weights, bf16, 520 tokens a sequence, greedy: device milliseconds of a step by batch, the
median of five times 20 steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_common import model_folder, random_prompt
from gpu_profile import GREEDY, PAGE, PROMPT, run
from record import write

from superinfer.kernels import fused, launch, skinny, skinny_tma
from superinfer.kernels.paged import Choice, choose_attention
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine import cuda_build
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Variant(NamedTuple):
    """overlap: kernels start early. boxes, triton: rows up to which products are by these. attention: our own."""

    overlap: bool = True
    boxes: int = skinny_tma.MOST_ROWS
    triton: int = 64
    attention: bool = True


VARIANTS = {
    "none": Variant(overlap=False, boxes=0, triton=0, attention=False),
    "no overlap": Variant(overlap=False),
    "no boxes": Variant(boxes=0),
    "no triton": Variant(triton=0),
    "FlashInfer": Variant(attention=False),
    "all": Variant(),
}
STEPS, REPEATS = 20, 5


def without_our_own(*shape: Any) -> Choice:
    """As `choose_attention`, but that decodes are FlashInfer's."""
    return choose_attention(*shape)._replace(decode="flashinfer-fa2")


def settle(variant: Variant) -> None:
    """Have the kernels' modules behave as the variant says, from the next capture on."""
    skinny.MOST_ROWS, skinny_tma.MOST_ROWS = variant.triton, variant.boxes
    skinny.choose_tiles.cache_clear()
    skinny_tma.choose_cut.cache_clear()
    cuda_build.choose_attention = choose_attention if variant.attention else without_our_own  # type: ignore[attr-defined]
    overlap = launch.overlap if variant.overlap else lambda x: {"PDL": False}
    fused.overlap = skinny.overlap = overlap  # type: ignore[attr-defined]


def measure(folder: str) -> dict[int, float]:
    """Milliseconds of a decode step by batch."""
    config = EngineConfig(
        model=folder, device="cuda", load_format="dummy", max_batch_size=max(BATCHES), max_batch_tokens=1024,
        kv_tokens=max(BATCHES) * (PROMPT + 64),
    )  # fmt: skip
    executor = build_executor(config)
    assert isinstance(executor, CudaExecutor)
    rng = random.Random(0)
    blocks = (PROMPT + 64) // PAGE
    prompts = [tuple(random_prompt(rng, PROMPT)) for _ in range(max(BATCHES))]
    inits = tuple(SlotInit(slot, GREEDY, 0, prompt) for slot, prompt in enumerate(prompts))
    works = [
        SlotWork(slot, 0, PROMPT, prompt, tuple(range(slot * blocks, (slot + 1) * blocks)), sample=True)
        for slot, prompt in enumerate(prompts)
    ]
    for work, init in zip(works, inits, strict=True):
        executor.submit(StepPlan(0, (work,), (init,)))
        executor.collect()
    found = {}
    for batch in BATCHES:
        plan = StepPlan(0, tuple(SlotWork(slot, PROMPT + 8, 1, sample=True) for slot in range(batch)))
        run(executor, [plan] * STEPS)
        found[batch] = statistics.median(run(executor, [plan] * STEPS) / STEPS for _ in range(REPEATS))
    executor.close()
    return found


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h200-decode-variants")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(Path(folder))
        for name in arguments.only:
            settle(VARIANTS[name])
            results[name] = measure(path)
            torch.cuda.empty_cache()
            print(f"{name:16}", "  ".join(f"{batch}: {ms:.3f}" for batch, ms in results[name].items()), flush=True)
    record = {"model": "Llama-3-8B shape, random weights, bfloat16", "step_ms": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_decode_variants.py', record)}")


if __name__ == "__main__":
    main()
