"""Where the device's time goes, kernel by kernel: decode steps of several batch sizes, and steps of prefill alone.

Llama-3-8B's shape, random weights, bf16. Kernels are put in groups by their names; what no kernel accounts for is the
gaps between them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

import torch
from gpu_common import ceilings, model_folder, random_prompt
from record import write
from torch.profiler import ProfilerActivity, profile

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

PROMPT, PAGE, STEPS = 512, 16, 5
GREEDY = SamplingParams(temperature=0)
# First match wins. Names as the profiler gives them.
GROUPS = {
    "attention": ("Prefill", "Decode", "Merge", "merge_state", "persistent"),
    "norm": ("_rms_norm",),
    "rope and KV write": ("_rope_and_store",),
    "silu": ("_silu_and_mul",),
    "matmul": ("gemm", "gemv", "splitK", "cutlass", "nvjet", "cublas", "sm90_xmma"),
    "argmax": ("ArgMax", "argmax", "reduce_kernel"),
    "copies": ("Memcpy", "Memset", "memcpy"),
}


def group_of(kernel: str) -> str:
    for group, words in GROUPS.items():
        if any(word in kernel for word in words):
            return group
    return "other"


def run(executor: CudaExecutor, plans: list[StepPlan]) -> float:
    """Device milliseconds of the steps, two under way at a time."""
    elapsed = 0.0
    for i, plan in enumerate(plans):
        executor.submit(plan)
        if i:
            elapsed += executor.collect().elapsed
    return (elapsed + executor.collect().elapsed) * 1e3


def profiled(executor: CudaExecutor, plans: list[StepPlan]) -> dict[str, object]:
    """Milliseconds a step by group, the largest kernels, and the step's own length without the profiler's cost."""
    run(executor, plans)
    plain = run(executor, plans) / len(plans)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run(executor, plans)
        torch.cuda.synchronize()
    groups: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in trace.key_averages():
        milliseconds = event.self_device_time_total / 1e3 / len(plans)
        groups[group_of(event.key)] += milliseconds
        kernels[f"{event.count // len(plans)} x {event.key[:100]}"] += milliseconds
    return {"step_ms": plain, "groups_ms": dict(groups.most_common()), "kernels_ms": dict(kernels.most_common(14))}


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-profile")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    arguments = parser.parse_args()
    roof = ceilings()
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=model_folder(Path(folder)),
            device="cuda",
            load_format="dummy",
            max_batch_size=max(arguments.batch),
            max_batch_tokens=8192,
        )
        executor = build_executor(config)
    assert isinstance(executor, CudaExecutor)
    rng = random.Random(0)
    blocks = (PROMPT + 64) // PAGE
    prompts = [tuple(random_prompt(rng, PROMPT)) for _ in range(max(arguments.batch))]
    results = {}
    inits = tuple(SlotInit(slot, GREEDY, 0, prompt) for slot, prompt in enumerate(prompts))
    works = [
        SlotWork(slot, 0, PROMPT, prompt, tuple(range(slot * blocks, (slot + 1) * blocks)), sample=True)
        for slot, prompt in enumerate(prompts)
    ]
    for first in range(0, len(works), 16):
        executor.submit(StepPlan(0, tuple(works[first : first + 16]), inits[first : first + 16]))
        executor.collect()
    for batch in arguments.batch:
        decodes = tuple(SlotWork(slot, PROMPT + 8, 1, sample=True) for slot in range(batch))
        results[f"decode {batch}"] = profiled(executor, [StepPlan(0, decodes)] * STEPS)
    again = tuple(SlotWork(work.slot, 0, PROMPT, work.tokens, sample=True) for work in works[:16])
    results[f"prefill {len(again)} x {PROMPT}"] = profiled(executor, [StepPlan(0, again)] * STEPS)
    for name, found in results.items():
        groups = found["groups_ms"]
        assert isinstance(groups, dict)
        parts = ", ".join(f"{group} {value:.2f}" for group, value in groups.items())
        print(f"{name}: step {found['step_ms']:.2f} ms: {parts}")
    measured = {"model": "Llama-3-8B shape, random weights, bfloat16", "ceilings": roof, "results": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_profile.py', measured)}")


if __name__ == "__main__":
    main()
