"""What two habits of decode steps are worth, each alone and both, in one run: products of few rows by our kernel, and
kernels that start before the one in front is over.

Llama-3-8B's shape, random weights, bf16, 520 tokens a sequence, greedy: device milliseconds of a step by batch, the
median of five times 20 steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_common import model_folder, random_prompt
from gpu_profile import GREEDY, PAGE, PROMPT, run
from record import write

from superinfer.kernels import fused, launch, skinny
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

BATCHES = (1, 8, 16, 32, 64, 128, 256)
# name -> (rows up to which products are ours, kernels overlap)
VARIANTS = {"neither": (0, False), "overlap": (0, True), "products": (64, False), "both": (64, True)}
STEPS, REPEATS = 20, 5


def settle(rows: int, overlaps: bool) -> None:
    """Have the kernels' modules behave as the variant says, from the next capture on."""
    skinny.MOST_ROWS = rows
    skinny.choose_tiles.cache_clear()
    chosen = launch.overlap if overlaps else lambda x: {"PDL": False}
    fused.overlap = skinny.overlap = chosen  # type: ignore[attr-defined]


def measure(folder: str) -> dict[int, float]:
    """Milliseconds of a decode step by batch."""
    config = EngineConfig(
        model=folder, device="cuda", load_format="dummy", max_batch_size=max(BATCHES), max_batch_tokens=8192,
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
    for first in range(0, len(works), 16):
        executor.submit(StepPlan(0, tuple(works[first : first + 16]), inits[first : first + 16]))
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
    parser.add_argument("--name", default="gpu-decode-variants")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(Path(folder))
        for name, variant in VARIANTS.items():
            settle(*variant)
            results[name] = measure(path)
            torch.cuda.empty_cache()
            print(f"{name:9}", "  ".join(f"{batch}: {ms:.3f}" for batch, ms in results[name].items()), flush=True)
    record = {"model": "Llama-3-8B shape, random weights, bfloat16", "step_ms": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_decode_variants.py', record)}")


if __name__ == "__main__":
    main()
