"""What scheduling costs: wall time of `plan` and `commit` with many requests, and simulated requests a second.

Decoding steps of a full batch behind a long queue; then the simulator, with about 4,000 requests live.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
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

PAGE = 16


def step_times(policy: str, resident: int, waiting: int, steps: int) -> dict[str, float]:
    """Milliseconds of steps in which all residents decode and no block is left for anybody else."""
    rng = random.Random(0)
    prompts = [[at] * rng.randrange(100, 400) for at in range(resident + waiting)]
    # The residents' own blocks to the end and no more: the queue is looked at in vain in every step.
    blocks = sum(-(-(len(prompt) + steps + 2) // PAGE) for prompt in prompts[:resident])
    scheduler = build_scheduler(policy, KVCache(blocks, PAGE), SchedulerLimits(resident, 2048, blocks * PAGE))
    slo = SLO(ttft=1.0, tbt=0.1)
    now = 0.0
    plans, commits = [], []

    def step() -> None:
        nonlocal now
        started = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        assert plan is not None
        result = StepResult(plan.step, {work.slot: 5 for work in plan.work if work.sample})
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


def simulated_rate(live: int) -> dict[str, float]:
    """Requests simulated in one second, wall and CPU, with up to `live` unfinished at a time."""
    jobs = make_jobs("lmsys", rate=200, duration=live / 100, seed=0, slos=[(1.0, SLO(ttft=1.0, tbt=0.1))])
    started = time.process_time()
    result = simulate(
        jobs, profile_of("h100-pcie5"), shape_of("llama-3-8b"), SimConfig(kv_tokens=80_000, max_batch_size=256)
    )
    cpu_s = time.process_time() - started
    return {
        "requests": result.requests,
        "peak_live": result.peak_live,
        "per_wall_second": result.requests_per_wall_s,
        "per_cpu_second": result.requests / cpu_s,
        "plan_p50_ms": result.plan_ms.p50,
        "plan_p99_ms": result.plan_ms.p99,
    }


def main() -> None:
    """Measure, print, write results/scheduler-speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    steps: list[dict[str, Any]] = []
    for policy in POLICIES:
        for resident, waiting in ((256, 1000), (256, 15_744)):
            times = step_times(policy, resident, waiting, arguments.steps)
            steps.append({"policy": policy, "resident": resident, "waiting": waiting} | times)
            print(f"{policy:9} {resident} resident, {waiting:6,} waiting: plan {times['plan_p50_ms']:.3f} ms "
                  f"(p90 {times['plan_p90_ms']:.3f}), commit {times['commit_p50_ms']:.3f} ms")  # fmt: skip
    simulated = simulated_rate(4000)
    print(f"simulated requests/s at {simulated['peak_live']:,.0f} live: {simulated['per_wall_second']:.0f} wall, "
          f"{simulated['per_cpu_second']:.0f} CPU")  # fmt: skip
    out = write(
        "scheduler-speed",
        f"python benchmarks/scheduler_speed.py --steps {arguments.steps}",
        {"steps": steps, "simulator": simulated},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
