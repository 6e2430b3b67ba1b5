"""What scheduling costs: wall time of `plan` and `commit` with many requests, and simulated requests a second.

Decoding steps of a full batch behind a long queue; then the simulator, with about 4,000 and 16,000 requests live.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import product
from typing import Any

from record import write

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import POLICIES, build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO


def step_times(policy: str, resident: int, waiting: int, steps: int, blocked: bool) -> dict[str, float]:
    """Milliseconds of steps in which all residents decode.

    blocked: slots are free but no block is, so that every step looks at the queue in vain (blocks are large enough for
    a whole sequence then); otherwise all slots are taken.
    """
    page = 1024 if blocked else 16
    rng = random.Random(0)
    prompts = [[at] * rng.randrange(100, 400) for at in range(resident + waiting)]
    blocks = sum(-(-(len(prompt) + steps + 2) // page) for prompt in prompts[:resident])  # the residents' own, no more
    limits = SchedulerLimits(resident + (64 if blocked else 0), 2048, blocks * page)
    scheduler = build_scheduler(policy, KVCache(blocks, page), limits)
    slo = SLO(ttft=1.0, tbt=0.1)
    now = 0.0
    plans, commits = [], []

    def step() -> None:
        nonlocal now
        started = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        assert plan is not None
        result = StepResult(plan.step, {work.slot: 5 for work in plan.work if work.sample}, elapsed=0.02)
        now += 0.02
        begun = time.perf_counter()
        scheduler.commit(result, now)
        commits.append((time.perf_counter() - begun) * 1e3)
        plans.append((planned - started) * 1e3)

    sequences = [
        Sequence(id=at, prompt=prompt, max_tokens=10_000, arrival=0.0, slo=slo) for at, prompt in enumerate(prompts)
    ]
    for sequence in sequences[:resident]:
        scheduler.add(sequence)
    while any(sequence.num_output == 0 for sequence in sequences[:resident]):
        step()
    for sequence in sequences[resident:]:
        scheduler.add(sequence)
    plans.clear()
    commits.clear()
    for _ in range(steps // 2):
        step()
    return {
        "plan_p50_ms": statistics.median(plans),
        "plan_p90_ms": statistics.quantiles(plans, n=10)[8],
        "commit_p50_ms": statistics.median(commits),
    }


def simulated_rate(policy: str, live: int) -> dict[str, Any]:
    """Requests simulated in one second, wall and CPU, with up to `live` unfinished at a time."""
    jobs = make_jobs("lmsys", rate=200, duration=live / 125, seed=0, slos=[(1.0, SLO(ttft=1.0, tbt=0.1))])
    started = time.process_time()
    result = simulate(
        jobs,
        profile_of("h100-pcie5"),
        shape_of("llama-3-8b"),
        SimConfig(policy=policy, kv_tokens=80_000, max_batch_size=256),
    )
    cpu_s = time.process_time() - started
    return {
        "policy": policy,
        "requests": result.requests,
        "peak_live": result.peak_live,
        "per_wall_second": result.requests_per_wall_s,
        "per_cpu_second": result.requests / cpu_s,
        "plan_cpu_p50_ms": result.plan_ms.p50,
        "plan_cpu_p99_ms": result.plan_ms.p99,
        "plan_cpu_max_ms": result.plan_ms_max,
    }


def main() -> None:
    """Measure, print, write results/scheduler-speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    resident = 256
    steps: list[dict[str, Any]] = []
    for policy in POLICIES:
        for waiting, blocked in product((1000, 15_744), (False, True)):
            times = step_times(policy, resident, waiting, arguments.steps, blocked)
            steps.append({"policy": policy, "resident": resident, "waiting": waiting, "blocked": blocked} | times)
            print(
                f"{policy:9} {resident} resident, {waiting:6,} waiting for {'blocks' if blocked else 'slots'}: "
                f"plan {times['plan_p50_ms']:.3f} ms (p90 {times['plan_p90_ms']:.3f}), "
                f"commit {times['commit_p50_ms']:.3f} ms"
            )
    simulated = [simulated_rate(policy, live) for live in (4000, 16_000) for policy in ("fcfs", "rota")]
    for run in simulated:
        print(
            f"{run['policy']}, {run['peak_live']:,.0f} live: "
            f"{run['per_wall_second']:.0f} simulated requests/s of wall time, "
            f"{run['per_cpu_second']:.0f} of CPU time; plan p99 {run['plan_cpu_p99_ms']:.2f} ms, "
            f"max {run['plan_cpu_max_ms']:.2f} ms (CPU)"
        )
    out = write(
        "scheduler-speed",
        f"python benchmarks/scheduler_speed.py --steps {arguments.steps}",
        {"steps": steps, "simulator": simulated},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
