"""What scheduling costs: CPU time of `plan`, `commit` and publishing, and simulated requests a second.

Decoding steps of a full batch, alone and before a long queue, which is too late within the first third of the steps,
or, where it is patient, never; tokens are published to four clients, up to the frames that would be sent. Then the
simulator, with about 4,000 and 16,000 requests live. CPU time of the thread, as other processes of the machine are no
part of it; a busy machine still makes it longer, so a loop of fixed work is timed beside it (`unit_ms`: 1,500
additions). Garbage is collected as in a serving engine (runtime/collector.py). `looks`: the slices of RotaSched's look
at everybody (runtime/scheduler/standing.py), one by one, in the same steps. With --pause-ms each step waits as an
engine does for its device, so that the caches are as cold as there; without it they are warm.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import statistics
import time
from collections.abc import Generator
from typing import Any

import numpy as np
from record import write

from superinfer.runtime import protocol
from superinfer.runtime.collector import spare_the_collector
from superinfer.runtime.engine.loop import EngineLoop
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.scheduler.base import Scheduler, SchedulerLimits
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import POLICIES, build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.slices import Slice
from superinfer.runtime.scheduler.standing import Standing
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO

# Waiting; for blocks rather than slots; with a second tier; patient.
CASES = (
    (0, False, False, False),
    (1000, False, False, False),
    (1000, False, False, True),
    (1000, True, False, False),
    (1000, False, True, False),
    (15_744, False, False, False),
    (15_744, False, False, True),
    (15_744, True, False, False),
)
TTFT_S, PATIENT_S = 1.0, 30.0  # promised
STEP_S = 0.0145  # of 256 decodes: what an H100 takes, about


def unit_time() -> float:
    """Seconds of CPU that 1,500 additions take now."""
    started, total, pair = time.thread_time(), 0, (1, 2)
    for number in range(1500):
        total += pair[number & 1]
    return time.thread_time() - started


class LookTimes:
    """While entered, times each slice of each look: `took`, by what it is, microseconds."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = collections.defaultdict(list)

    def __enter__(self) -> LookTimes:
        self._look = look = Standing.look

        def timed(*given: Any) -> Generator[Slice, None, None]:
            slices = look(*given)
            part = next(slices)
            while True:
                yield part
                started = time.thread_time()
                following = next(slices, None)
                self.took[part.what].append((time.thread_time() - started) * 1e6)
                if following is None:
                    return
                part = following

        Standing.look = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *raised: object) -> None:
        Standing.look = self._look  # type: ignore[method-assign]

    def medians(self, looks: int) -> dict[str, dict[str, float]]:
        """Of each kind of slice: its median, microseconds, and how many a look has."""
        return {
            what: {"p50_us": statistics.median(took), "a_look": len(took) / max(1, looks)}
            for what, took in self.took.items()
        }


class NoDoor:
    """What would be sent ends here."""

    def send(self, client: bytes, message: protocol.Message) -> None:
        """See FrontDoor."""
        protocol.encode(message)


class TimedSteps:
    """A scheduler's steps, one after another from second 0, and what their parts took, milliseconds of CPU time.

    pause_s: slept, untimed, between a plan and its commit.
    """

    def __init__(self, scheduler: Scheduler, most_live: int, pause_s: float) -> None:
        self._scheduler, self._pause_s = scheduler, pause_s
        self._loop = EngineLoop(NoDoor(), None, scheduler, None, most_live)  # type: ignore[arg-type]
        self.now = 0.0
        self.forget()

    def forget(self) -> None:
        """What was timed until now."""
        self._plans: list[float] = []
        self._commits: list[float] = []
        self._publishes: list[float] = []
        self._units: list[float] = []

    def step(self) -> None:
        """Plan, as if a device had then computed, commit and publish."""
        started = time.thread_time()
        plan = self._scheduler.plan(self.now)
        planned = time.thread_time()
        assert plan is not None
        tokens = {work.slot: 5 for work in plan.others if work.sample}
        copied, decoded = [copy.id for copy in plan.copies], np.full(len(plan.decodes), 5)
        result = StepResult(plan.step, tokens, elapsed=STEP_S, copied=copied, decoded=decoded)
        self.now += STEP_S
        if self._pause_s:
            time.sleep(self._pause_s)
        begun = time.thread_time()
        updates = self._scheduler.commit(result, self.now)
        committed = time.thread_time()
        self._loop._publish_step(updates, self.now)
        self._publishes.append((time.thread_time() - committed) * 1e3)
        self._commits.append((committed - begun) * 1e3)
        self._plans.append((planned - started) * 1e3)
        self._units.append(unit_time() * 1e3)

    def figures(self) -> dict[str, float]:
        """Of what has been timed since it was last forgotten."""
        plans = self._plans
        return {
            "plan_p50_ms": statistics.median(plans),
            "plan_p90_ms": statistics.quantiles(plans, n=10)[8],
            "plan_p99_ms": statistics.quantiles(plans, n=100)[98],
            "plan_max_ms": max(plans),
            "plan_mean_ms": statistics.fmean(plans),
            "commit_p50_ms": statistics.median(self._commits),
            "commit_mean_ms": statistics.fmean(self._commits),
            "publish_p50_ms": statistics.median(self._publishes),
            "unit_ms": statistics.median(self._units),
        }


def step_times(
    policy: str,
    resident: int,
    waiting: int,
    steps: int,
    blocked: bool,
    dram: bool,
    patient: bool = False,
    pause_s: float = 0.0,
) -> dict[str, float]:
    """Milliseconds of steps in which all residents decode.

    dram: with a second tier as large as the first, over a link that takes no time: "rota" rotates in every step.
    blocked: slots are free but no block is, so that every step looks at the queue in vain (blocks are large enough for
    a whole sequence then); otherwise all slots are taken.
    patient: all that wait may still be kept, in every step.
    pause_s: slept, untimed, between a plan and its commit, where an engine waits for its device: the CPU's caches are
    cold then.
    """
    page = 1024 if blocked else 16
    rng = random.Random(0)
    prompts = [[at] * rng.randrange(100, 400) for at in range(resident + waiting)]
    blocks = sum(-(-(len(prompt) + steps + 2) // page) for prompt in prompts[:resident])  # the residents' own, no more
    limits = SchedulerLimits(resident + (64 if blocked else 0), 2048, blocks * page)
    scheduler = build_scheduler(policy, build_cache(blocks, blocks if dram else 0, page), limits)
    scheduler.headroom = 0  # type: ignore[attr-defined]  # they are all to run, and there is no more
    slo = SLO(ttft=PATIENT_S if patient else TTFT_S, tbt=0.1)
    timed = TimedSteps(scheduler, len(prompts), pause_s)
    sequences = [
        Sequence(
            id=at,
            prompt=prompt,
            max_tokens=10_000,
            arrival=0.0,
            slo=slo,
            request_id=f"{at:032x}",
            owner=b"%d" % (at % 4),
        )
        for at, prompt in enumerate(prompts)
    ]
    for sequence in sequences[:resident]:
        scheduler.add(sequence)
    while any(sequence.num_output == 0 for sequence in sequences[:resident]):
        timed.step()
    for sequence in sequences[resident:]:
        sequence.arrival = timed.now
        scheduler.add(sequence)
    timed.forget()
    for _ in range(steps // 2):
        timed.step()
    return timed.figures()


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
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--name", default="scheduler-speed")
    parser.add_argument("--waiting", type=int, nargs="+", help="only the cases in which so many wait")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="slept in each step: the device's time")
    parser.add_argument("--live", type=int, nargs="*", default=[4000, 16_000])
    arguments = parser.parse_args()
    policies, pause_s = arguments.policies.split(","), arguments.pause_ms * 1e-3
    cases = [case for case in CASES if arguments.waiting is None or case[0] in arguments.waiting]
    if arguments.waiting is not None and set(arguments.waiting) - {case[0] for case in cases}:
        parser.error(f"--waiting: there are cases of {sorted({case[0] for case in CASES})} only")
    resident = 256
    steps: list[dict[str, Any]] = []
    spare_the_collector()
    for policy in policies:
        for waiting, blocked, dram, patient in cases:
            times = step_times(policy, resident, waiting, arguments.steps, blocked, dram, patient, pause_s)
            case = {"resident": resident, "waiting": waiting, "blocked": blocked, "dram": dram, "patient": patient}
            steps.append({"policy": policy} | case | times)
            if policy == "rota":  # anew: a clock in every slice is no part of the times above
                with LookTimes() as looks:
                    step_times(policy, resident, waiting, arguments.steps, blocked, dram, patient, pause_s)
                steps[-1]["looks"] = looks.medians(len(looks.took["residents"]))
            print(
                f"{policy:9} {resident} resident, {waiting:6,} waiting for {'blocks' if blocked else 'slots '}"
                f"{' with DRAM' if dram else ' patiently' if patient else '          '}: "
                f"plan {times['plan_p50_ms']:.3f} ms (p90 {times['plan_p90_ms']:.3f}, p99 {times['plan_p99_ms']:.3f}, "
                f"max {times['plan_max_ms']:.3f}, mean {times['plan_mean_ms']:.3f}), "
                f"commit {times['commit_p50_ms']:.3f} ms, publish {times['publish_p50_ms']:.3f} ms, "
                f"unit {times['unit_ms']:.3f} ms",
                flush=True,
            )
    simulated: list[dict[str, Any]] = []
    for live in arguments.live:
        for policy in ("fcfs", "rota"):
            run = simulated_rate(policy, live)
            simulated.append(run)
            print(
                f"{run['policy']}, {run['peak_live']:,.0f} live: "
                f"{run['per_wall_second']:.0f} simulated requests/s of wall time, "
                f"{run['per_cpu_second']:.0f} of CPU time; plan p99 {run['plan_cpu_p99_ms']:.2f} ms, "
                f"max {run['plan_cpu_max_ms']:.2f} ms (CPU)",
                flush=True,
            )
    live_list = " ".join(map(str, arguments.live))
    flags = f" --waiting {' '.join(map(str, arguments.waiting))}" if arguments.waiting is not None else ""
    flags += f" --pause-ms {arguments.pause_ms:g}" if pause_s else ""
    out = write(
        arguments.name,
        f"python benchmarks/scheduler_speed.py --name {arguments.name} --steps {arguments.steps} "
        f"--policies {','.join(policies)} --live {live_list}{flags}",
        {"pause_ms": arguments.pause_ms, "load_average": os.getloadavg()[0], "steps": steps, "simulator": simulated},
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
