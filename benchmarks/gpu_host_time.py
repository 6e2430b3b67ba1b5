"""Where the host's time of a decode step goes: plan, submit, wait, commit, with the real scheduler and executor.

In this process and without the door, so that each part can be timed alone; the loop is the engine's: step n + 1 is
planned and submitted before step n is collected. Llama-3-8B's shape, random weights, bf16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from gpu_common import model_folder, random_prompt
from record import write

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

PARTS = ("plan", "submit", "wait", "commit")


def decode_steps(executor, batch: int, prompt: int, steps: int, temperature: float) -> list[dict[str, float]]:
    """Milliseconds of every part in each of `steps` steady decode steps."""
    limits = executor.limits
    kv = KVCache(limits.num_blocks, limits.page_size, prefix_cache=True)
    scheduler = build_scheduler("fcfs", kv, SchedulerLimits(batch, 8192, limits.max_model_len))
    rng = random.Random(batch)
    sampling = SamplingParams(temperature=temperature, max_tokens=steps + 64, ignore_eos=True)
    for i in range(batch):
        scheduler.add(
            Sequence(
                id=i,
                request_id=str(i),
                owner=b"",
                prompt=random_prompt(rng, prompt),
                sampling=sampling,
                arrival=0.0,
                max_tokens=steps + 64,
                seed=i,
            )
        )
    while scheduler.counts().waiting:  # prefill, one step at a time
        plan = scheduler.plan(time.monotonic())
        executor.submit(plan)
        scheduler.commit(executor.collect(), time.monotonic())
    executor.submit(scheduler.plan(time.monotonic()))
    rows = []
    for _ in range(steps):
        marks = [time.perf_counter()]
        plan = scheduler.plan(time.monotonic())
        marks.append(time.perf_counter())
        executor.submit(plan)
        marks.append(time.perf_counter())
        result = executor.collect()
        marks.append(time.perf_counter())
        scheduler.commit(result, time.monotonic())
        marks.append(time.perf_counter())
        row = {part: (b - a) * 1e3 for part, a, b in zip(PARTS, marks, marks[1:], strict=False)}
        rows.append({**row, "step": (marks[-1] - marks[0]) * 1e3, "device": result.elapsed * 1e3})
    executor.collect()
    return rows


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-host-time")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=model_folder(Path(folder)),
            device="cuda",
            load_format="dummy",
            max_batch_size=max(arguments.batch),
            max_batch_tokens=8192,
        )
        executor = build_executor(config)
    for batch in arguments.batch:
        for temperature in arguments.temperature:
            rows = decode_steps(executor, batch, 512, arguments.steps, temperature)
            median = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
            results.append({"batch": batch, "temperature": temperature, "median_ms": median, "steps": rows})
            parts = "  ".join(f"{part} {value:.3f}" for part, value in median.items())
            print(f"batch {batch:4d} temperature {temperature}: {parts} ms", flush=True)
    record = {"model": "Llama-3-8B shape, random weights, bfloat16", "settings": vars(arguments), "results": results}
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_host_time.py', record)}")


if __name__ == "__main__":
    main()
