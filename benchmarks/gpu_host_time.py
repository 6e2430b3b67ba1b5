"""Where the host's time of a decode step goes: plan, submit, wait, commit, with the real scheduler and executor.

In this process and without the door, so that each part can be timed alone; the loop is the engine's: step n + 1 is
planned and submitted before step n is collected. Llama-3-8B's shape, random weights, bf16. Others may wait meanwhile,
for slots, as there is none: too late after a second, or patient, so that each may still be kept.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from typing import NamedTuple

from gpu_common import MODEL, gpu_executor, random_prompt
from record import write

from superinfer.runtime.collector import spare_the_collector
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.slo import SLO

PARTS = ("plan", "submit", "wait", "commit")
PROMISES_S, TBT_S = (1.0, 30.0), 0.1


class Case(NamedTuple):
    """What decodes, and what waits meanwhile. ttft_s: promised to who waits; 0: nothing is."""

    policy: str
    batch: int
    temperature: float
    waiting: int = 0
    ttft_s: float = 0.0


def decode_steps(executor, case: Case, prompt: int, steps: int) -> list[dict[str, float]]:
    """Milliseconds of every part in each of `steps` steady decode steps."""
    limits, batch = executor.limits, case.batch
    kv = build_cache(limits.num_blocks, 0, limits.page_size)
    scheduler = build_scheduler(case.policy, kv, SchedulerLimits(batch, 8192, limits.max_model_len))
    rng = random.Random(batch)
    sampling = SamplingParams(temperature=case.temperature, max_tokens=steps + 64, ignore_eos=True)

    def add(i: int, tokens: int, ttft_s: float) -> None:
        scheduler.add(
            Sequence(
                id=i,
                request_id=str(i),
                owner=b"",
                prompt=random_prompt(rng, tokens),
                sampling=sampling,
                arrival=time.monotonic(),
                max_tokens=steps + 64,
                seed=i,
                slo=SLO(ttft=ttft_s, tbt=TBT_S) if case.waiting else None,
            )
        )

    for i in range(batch):
        add(i, prompt, max(PROMISES_S))  # nobody who decodes is late
    while scheduler.counts().waiting:  # prefill, one step at a time
        plan = scheduler.plan(time.monotonic())
        executor.submit(plan)
        scheduler.commit(executor.collect(), time.monotonic())
    executor.submit(scheduler.plan(time.monotonic()))
    for i in range(case.waiting):
        add(batch + i, rng.randrange(100, 400), case.ttft_s)
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
        if plan is None or not len(plan.decodes) + len(plan.others) == plan.num_tokens == batch:
            continue  # somebody came or went
        row = {part: (b - a) * 1e3 for part, a, b in zip(PARTS, marks, marks[1:], strict=False)}
        rows.append({**row, "step": (marks[-1] - marks[0]) * 1e3, "device": result.elapsed * 1e3})
    executor.collect()
    if 2 * len(rows) < steps:
        raise RuntimeError(f"only {len(rows)} of {steps} steps were decodes of all {batch}")
    return rows


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-host-time")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--waiting", type=int, default=0, help="With a promise each, as those who decode.")
    arguments = parser.parse_args()
    results = []
    executor = gpu_executor(max_batch_size=max(arguments.batch), max_batch_tokens=8192)
    spare_the_collector()
    promises = PROMISES_S if arguments.waiting else (0.0,)
    for batch, temperature, ttft_s in itertools.product(arguments.batch, arguments.temperature, promises):
        case = Case(arguments.policy, batch, temperature, arguments.waiting, ttft_s)
        rows = decode_steps(executor, case, 512, arguments.steps)
        median = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        median["host"] = statistics.median(row["plan"] + row["submit"] + row["commit"] for row in rows)
        results.append(case._asdict() | {"median_ms": median, "steps": rows})
        parts = "  ".join(f"{part} {value:.3f}" for part, value in median.items())
        queue = f", {case.waiting:,} wait for {ttft_s:g} s at most" if case.waiting else ""
        print(f"{case.policy}, batch {batch:4d} temperature {temperature}{queue}: {parts} ms", flush=True)
    record = {"model": MODEL, "settings": vars(arguments), "results": results}
    flags = f" --policy {arguments.policy} --waiting {arguments.waiting}" if arguments.waiting else ""
    print(f"written to {write(arguments.name, f'python benchmarks/gpu_host_time.py{flags}', record)}")


if __name__ == "__main__":
    main()
