"""Where the device's time goes, kernel by kernel: decode steps of several batch sizes, and steps of prefill alone.

Llama-3-8B's shape or another's, random weights, bf16. Kernels are put in groups by their names; what no kernel accounts
for is the gaps between them.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch
from gpu_common import GREEDY, PAGE, PROMPT, ceilings, decode_plan, device_ms, fill_slots, gpu_executor
from record import write
from torch.profiler import ProfilerActivity, profile

from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

STEPS, TOGETHER = 5, 16  # of a profile; prompts in a step
LONG = 8000  # tokens of a prompt that has a step for itself
# First match wins. Names as the profiler gives them.
GROUPS = {
    "attention": ("Prefill", "Decode", "Merge", "merge_state", "persistent", "decode_attention", "_paged_attention"),
    "norm": ("_rms_norm",),
    "rope and KV write": ("_rope_and_store",),
    "silu": ("_silu_and_mul",),
    "matmul": ("gemm", "gemv", "splitK", "cutlass", "nvjet", "cublas", "sm90_xmma", "_rows", "_skinny"),
    "argmax": ("ArgMax", "argmax", "reduce_kernel", "_largest_of_part", "_keep_largest"),
    "inputs": ("_receive", "_describe"),
    "copies": ("Memcpy", "Memset", "memcpy"),
}


def group_of(kernel: str) -> str:
    for group, words in GROUPS.items():
        if any(word in kernel for word in words):
            return group
    return "other"


def profiled(executor: CudaExecutor, plans: list[StepPlan]) -> dict[str, object]:
    """Milliseconds a step by group, the largest kernels, and the step's own length without the profiler's cost."""
    device_ms(executor, plans)
    plain = device_ms(executor, plans) / len(plans)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        device_ms(executor, plans)
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
    parser.add_argument("--model", default="llama-3-8b", help="a shape, as of `superinfer bench latency`")
    parser.add_argument("--layers", type=int, help="fewer of its layers")
    arguments = parser.parse_args()
    roof = ceilings()
    executor = gpu_executor(
        shape=arguments.model, layers=arguments.layers, max_batch_size=max(arguments.batch), max_batch_tokens=8192,
        max_model_len=8192,
    )  # fmt: skip
    works = fill_slots(executor, max(arguments.batch), TOGETHER)
    results = {f"decode {batch}": profiled(executor, [decode_plan(batch)] * STEPS) for batch in arguments.batch}
    again = tuple(SlotWork(work.slot, 0, PROMPT, work.tokens, sample=True) for work in works[:TOGETHER])
    results[f"prefill {len(again)} x {PROMPT}"] = profiled(executor, [StepPlan(0, again)] * STEPS)
    # Over the blocks of the others, which have been profiled by now.
    prompt = tuple(random.Random(1).choices(range(10_000), k=LONG))
    begun = SlotWork(0, 0, LONG, prompt, tuple(range(LONG // PAGE)), sample=True)
    executor.submit(StepPlan(0, (begun,), (SlotInit(0, GREEDY, 0, prompt),)))
    executor.collect()
    alone = StepPlan(0, (SlotWork(0, 0, LONG, prompt, sample=True),))
    results[f"prefill 1 x {LONG}"] = profiled(executor, [alone] * STEPS)
    for name, found in results.items():
        groups = found["groups_ms"]
        assert isinstance(groups, dict)
        parts = ", ".join(f"{group} {value:.2f}" for group, value in groups.items())
        print(f"{name}: step {found['step_ms']:.2f} ms: {parts}")
    model = f"{arguments.model} shape, {arguments.layers or 'all'} layers, random weights, bfloat16"
    measured = {"model": model, "ceilings": roof, "results": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_profile.py', measured)}")


if __name__ == "__main__":
    main()
