"""Why a step with chunks takes longer under load than alone: steps of an online run, each repeated among its own kind.

The real scheduler (`rota`) and executor in one process, Azure's conversation lengths, Poisson arrivals, no door and no
client. Every few steps with chunks the clock stops and the step just submitted is repeated: in a row, and once after
the GPU has rested. Same rows, same contexts, same block tables: what differs is what the GPU did before. Then some
steps under the profiler, online and in a row, so that kernels can be compared one by one. Power and clocks are sampled
all along by nvidia-smi. Llama-3-8B's shape, random weights, bf16. Needs the trace (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import torch
from gpu_common import MODEL, gpu_executor
from record import write
from torch.profiler import ProfilerActivity, profile

from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.seed_cost import seed_cost
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import StepPlan
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
IN_A_ROW, EVERY, PROFILED, WARM_S = 8, 12, 60, 6.0
SAMPLED = "--query-gpu=power.draw,clocks.sm,temperature.gpu"
POWER = ["nvidia-smi", SAMPLED, "--format=csv,noheader,nounits", "-lms", "100"]


class Online:
    """The engine's loop without its door. Its clock stands still while steps are repeated."""

    def __init__(self, executor: CudaExecutor, jobs: list[Job], batch_tokens: int) -> None:
        limits, tier = executor.limits, executor.tier
        num_dram, link = (tier.num_blocks, tier.link) if tier is not None else (0, None)
        kv = build_cache(limits.num_blocks, num_dram, limits.page_size, prefix_cache=True, link=link)
        batch = SchedulerLimits(limits.num_slots, batch_tokens, limits.max_model_len)
        cost = seed_cost(executor.device, executor.path, executor.captured_tokens)
        self.executor, self.jobs, self.given = executor, jobs, 0
        self.scheduler = build_scheduler("rota", kv, batch, cost)
        self.paused = 0.0
        self.under_way: deque[StepPlan] = deque()
        self.began = time.monotonic()

    def now(self) -> float:
        """Seconds of the run."""
        return time.monotonic() - self.began - self.paused

    def turn(self) -> tuple[StepPlan, float, float] | None:
        """One turn of the loop: (plan, device ms, ms since the turn began) of the step collected, if there was one."""
        begun = time.perf_counter()
        self._arrive()
        self.scheduler.expire(self.now())
        while len(self.under_way) < self.executor.depth:
            plan = self.scheduler.plan(self.now())
            if plan is None:
                break
            self.executor.submit(plan)
            self.under_way.append(plan)
        if not self.under_way:
            return None
        plan = self.under_way.popleft()
        result = self.executor.collect()
        self.scheduler.commit(result, self.now())
        return plan, result.elapsed * 1e3, (time.perf_counter() - begun) * 1e3

    def _arrive(self) -> None:
        now = self.now()
        while self.given < len(self.jobs) and self.jobs[self.given].at <= now:
            job, number = self.jobs[self.given], self.given
            self.given += 1
            prompt = [(number * 7919 + at * 31) % 128_000 for at in range(job.prompt_length)]
            sampling = SamplingParams(temperature=0.0, max_tokens=job.output_length, ignore_eos=True)
            self.scheduler.add(
                Sequence(
                    id=number, request_id=str(number), owner=b"", prompt=prompt, sampling=sampling, arrival=job.at,
                    max_tokens=job.output_length, seed=number, slo=STREAM,
                )
            )  # fmt: skip

    def drain(self) -> StepPlan | None:
        """Collect all that is under way, without planning more; the last of it, whose tables still stand."""
        last = None
        while self.under_way:
            last = self.under_way.popleft()
            self.scheduler.commit(self.executor.collect(), self.now())
        return last


def again(plan: StepPlan) -> StepPlan:
    """The same rows once more: no slot begins or ends, no block is added, nothing is copied."""
    others = tuple(type(work)(work.slot, work.start, work.length, work.tokens, (), work.sample) for work in plan.others)
    decodes = type(plan.decodes)(plan.decodes.slots, plan.decodes.positions)
    return StepPlan(plan.step, others, decodes=decodes)


def repeated(executor: CudaExecutor, plan: StepPlan, times: int) -> list[float]:
    """Device ms of each, two under way at a time."""
    found = []
    for at in range(times):
        executor.submit(plan)
        if at:
            found.append(executor.collect().elapsed * 1e3)
    return [*found, executor.collect().elapsed * 1e3]


def kernels(trace: Any, steps: int) -> dict[str, dict[str, float]]:
    """By kernel: calls and milliseconds a step."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for event in trace.key_averages():
        found[event.key[:90]]["calls"] += event.count / steps
        found[event.key[:90]]["ms"] += event.self_device_time_total / 1e3 / steps
    ordered = sorted(found.items(), key=lambda item: -item[1]["ms"])[:20]
    return {name: dict(counts) for name, counts in ordered}


def shape(plan: StepPlan) -> dict[str, Any]:
    chunks = [work.length for work in plan.others if work.tokens]
    contexts = [*(plan.decodes.positions + 1).tolist(), *(w.start + 1 for w in plan.others if not w.tokens)]
    return {"decodes": len(contexts), "context": sum(contexts), "longest": max(contexts, default=0), "chunks": chunks}


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--name", default="gpu-online-steps")
    parser.add_argument("--rate", type=float, default=25.0)
    parser.add_argument("--duration", type=float, default=30.0)
    arguments = parser.parse_args()
    executor = gpu_executor(
        max_batch_size=512, max_batch_tokens=8192, kv_tokens=153_600, dram_tokens=262_144, policy="rota"
    )
    jobs = make_jobs(
        "azure", rate=arguments.rate, duration=arguments.duration, seed=0, trace=arguments.trace, slos=[(1.0, STREAM)]
    )
    with tempfile.TemporaryFile("w+") as sampled:
        which = f"GPU-{torch.cuda.get_device_properties(executor.cache.device).uuid}"
        sampler = subprocess.Popen([*POWER, "-i", which], stdout=sampled)
        rows = _run(executor, jobs, arguments.duration)
        sampler.terminate()
        sampler.wait()
        sampled.seek(0)
        power = [line.strip() for line in sampled]
    record = {"model": MODEL, "rate": arguments.rate, **rows, "power": power}
    _say(rows)
    print("power W, SM MHz, C:", "; ".join(power[len(power) // 2 :: max(1, len(power) // 16)]))
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_online_steps.py azure_conv_2023.csv', record)}")


def _run(executor: CudaExecutor, jobs: list[Job], duration: float) -> dict[str, Any]:
    online = Online(executor, jobs, 8192)
    steps: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    since = 0
    while online.now() < duration * 0.8:
        turned = online.turn()
        if turned is None:
            continue
        plan, device, whole = turned
        steps.append({"at": online.now(), "device_ms": device, "turn_ms": whole, **shape(plan)})
        since += bool(steps[-1]["chunks"])
        if online.now() > WARM_S and since >= EVERY and online.under_way and shape(online.under_way[-1])["chunks"]:
            since = 0
            pairs.append(_pair(online, online.under_way[-1]))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        online_shapes = [turned[0] for _ in range(PROFILED) if (turned := online.turn()) is not None]
    while online.under_way and not shape(online.under_way[-1])["chunks"]:
        online.turn()
    plan = online.drain()
    found = {"steps": steps, "pairs": pairs, "online_kernels": kernels(trace, len(online_shapes))}
    found["online_shapes"] = [shape(one) for one in online_shapes]
    if plan is not None:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            repeated(executor, again(plan), 20)
        found["row_kernels"], found["row_shape"] = kernels(trace, 20), shape(plan)
    executor.close()
    return found


def _pair(online: Online, plan: StepPlan) -> dict[str, Any]:
    """The last step submitted, as it ran, in a row, after rest, and in turn with decodes alone."""
    executor, results = online.executor, []
    while online.under_way:
        done = online.under_way.popleft()
        result = executor.collect()
        results.append((done, result.elapsed * 1e3))
        online.scheduler.commit(result, online.now())
    stopped = time.monotonic()
    same = again(plan)
    row = repeated(executor, same, IN_A_ROW)
    chunks = sum(work.length for work in plan.others if work.tokens)
    unrelated = StepPlan(plan.step, tuple(work for work in same.others if not work.tokens), decodes=same.decodes)
    in_turn = []
    if unrelated.has_work:
        for _ in range(4):
            in_turn.append(repeated(executor, same, 1)[0])
            repeated(executor, unrelated, 1)
    time.sleep(0.15)
    rested = repeated(executor, same, 1)[0]
    online.paused += time.monotonic() - stopped
    return {
        **shape(plan), "prompt_tokens": chunks, "online_ms": results[-1][1], "row_ms": row, "in_turn_ms": in_turn,
        "rested_ms": rested, "copies": len(plan.copies), "waits": len(plan.waits), "init": len(plan.init),
    }  # fmt: skip


def _say(rows: dict[str, Any]) -> None:
    pairs = rows["pairs"]
    for how in ("online_ms", "row_ms", "in_turn_ms", "rested_ms"):
        values = [_typical(pair[how]) for pair in pairs if pair[how]]
        print(f"{how}: mean {statistics.mean(values):.2f}, median {statistics.median(values):.2f}, {len(values)} steps")
    for pair in pairs[:: max(1, len(pairs) // 12)]:
        times = ", ".join(f"{how} {_typical(pair[how]):.1f}" for how in ("online_ms", "row_ms", "rested_ms"))
        rows_of = f"{pair['decodes']} decodes of {pair['context']} + {pair['prompt_tokens']} in {len(pair['chunks'])}"
        print(f"  {rows_of}: {times}; copies {pair['copies']}, waits {pair['waits']}")
    steps = [step for step in rows["steps"] if step["at"] > WARM_S]
    busy = sum(step["device_ms"] for step in steps)
    print(f"steps {len(steps)}: device {busy / 1e3:.1f} s, turns {sum(step['turn_ms'] for step in steps) / 1e3:.1f} s")
    for name in ("online_kernels", "row_kernels"):
        if name in rows:
            print(name, rows.get("row_shape") if name == "row_kernels" else "")
            for kernel, counts in list(rows[name].items())[:12]:
                print(f"   {counts['ms']:.3f} ms {counts['calls']:.1f} x {kernel}")


def _typical(times: float | list[float]) -> float:
    """Of several in a row, the median but for the first two."""
    return statistics.median(times[2:] or times) if isinstance(times, list) else times


if __name__ == "__main__":
    main()
