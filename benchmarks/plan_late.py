"""Planning steps late against at once (`EngineConfig.plan_late`), in real time.

The real loop, scheduler and sockets around a device that does nothing but take as long as a GPU would, give or take
2 %.

Steps of 6 ms and 20 us a prompt token, Poisson arrivals of 100 to 900 tokens in and 30 to 300 out, `fcfs`, by turns.
idle: the share of time that the device had nothing to do while somebody waited for it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import threading
import time
from typing import Any

from record import write
from timed_device import TimedDevice

from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.loop import EngineLoop
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import Generate, ModelInfo, SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.scheduler.plan import StepPlan
from superinfer.runtime.scheduler.registry import build_scheduler

LIMITS = ExecutorLimits(num_blocks=30_000, page_size=16, num_slots=256, max_model_len=8192, vocab_size=100)
RATES = StepRates(5e-3, 0.0, 0.0, 2e-5, 5e-8, 1e-9, 1e-5, 1e-3)


class Device(TimedDevice):
    """live: requests that are under way. idle_s: for how long it had nothing to do meanwhile."""

    def __init__(self) -> None:
        super().__init__(RATES, LIMITS, spread=0.02)
        self.live = 0
        self.idle_s = 0.0

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        if self.free_at and self.live:
            self.idle_s += max(0.0, time.monotonic() - self.free_at)
        super().submit(plan)


def measure(late: bool, rate: float, seconds: float) -> dict[str, Any]:
    """One engine and its clients, for as long as all need."""
    device = Device()
    info = ModelInfo(
        model="timed", path="", architecture="none", vocab_size=LIMITS.vocab_size, max_model_len=LIMITS.max_model_len,
        eos_token_ids=(2,), dtype="none", device="none", page_size=LIMITS.page_size, num_blocks=LIMITS.num_blocks,
        policy="fcfs", pid=0,
    )  # fmt: skip
    kv = build_cache(LIMITS.num_blocks, 0, LIMITS.page_size, prefix_cache=False)
    scheduler = build_scheduler("fcfs", kv, SchedulerLimits(256, 8192, 8192), StepCost(RATES))
    door = FrontDoor("tcp://127.0.0.1:0", info)
    loop = EngineLoop(door, Intake(info), scheduler, device, 4096, plan_late=late)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run)
    thread.start()
    began = time.monotonic()
    first_s = asyncio.run(_clients(door.address, device, rate, seconds))
    took_s = time.monotonic() - began
    loop.stop("measured")
    thread.join()
    p50, p99 = (statistics.quantiles(first_s, n=100)[at] for at in (49, 98))
    found = {"late": late, "requests": len(first_s), "ttft_mean_ms": statistics.mean(first_s) * 1e3}
    return found | {"ttft_p50_ms": p50 * 1e3, "ttft_p99_ms": p99 * 1e3, "idle": device.idle_s / took_s}


async def _clients(address: str, device: Device, rate: float, seconds: float) -> list[float]:
    """Each request's time to its first token, seconds."""
    rng, first_s = random.Random(5), []

    async def ask(client: AsyncEngineClient, prompt: list[int], tokens: int) -> None:
        device.live += 1
        asked, came = time.monotonic(), None
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        async for delta in client.generate(Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling)):
            if came is None and delta.token_ids:
                came = time.monotonic()
        assert came is not None
        first_s.append(came - asked)
        device.live -= 1

    async with await AsyncEngineClient.connect(address) as client:
        tasks, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            prompt = [rng.randrange(100) for _ in range(rng.randrange(100, 900))]
            tasks.append(asyncio.create_task(ask(client, prompt, rng.randrange(30, 300))))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    return first_s


def main() -> None:
    """Measure, print, write results/plan-late-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows = []
    for _ in range(given.rounds):
        for late in (False, True):
            rows.append(measure(late, given.rate, given.seconds))
            print({name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    command = (
        f"python benchmarks/plan_late.py --rate {given.rate:g} --seconds {given.seconds:g} --rounds {given.rounds}"
    )
    print(f"written to {write('plan-late-cpu', command, {'rate': given.rate, 'runs': rows})}")


if __name__ == "__main__":
    main()
