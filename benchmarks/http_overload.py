"""Ten times more requests than can be served, for a minute: are all answered, is memory bounded, does goodput hold?

    python benchmarks/http_overload.py [--engine noop|embedded] [--seconds 60] [--short 15] [--rate 40] [--quick]

A no-op engine (noop_engine.py) with 16 places gives each request 20 tokens in about 0.4 s, so that about 40 requests/s
can be served, and holds 48 more in its queue. Every request promises 2 s (`on_miss: truncate`), over a connection of
its own. Goodput is what was answered in full within its promise, per second. The rates before the last find its peak.

With `--engine embedded` it is a real engine, the embedded model on one CPU core, with 16 places and 48 more in its
queue. How many requests/s it can serve is measured first, by as many clients as it has places, and the promise is made
to fit: a quarter longer than all that it holds takes it, as with the no-op engine. It shares the machine's
cores with the server and the clients, so that every refusal takes from what it can compute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import http_load
import record
from http_load import USAGE, Read, Servers, completion, cpu, quantile, rss_mib

from superinfer.bench.record import write_record
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine

TOKENS, TBT_MS, PLACES, QUEUE, DEADLINE_S = 20, 20, 16, 48, 2.0
SHARES = (0.5, 1.0, 2.0)  # of what can be served, to find the peak
SAMPLE_EVERY_S = 0.5


async def offered(found: Servers, rate: float, seconds: float, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """Requests at `rate`/s for `seconds`, whatever becomes of those before."""
    slo = {"deadline_ms": 1e3 * deadline_s, "on_miss": "truncate"}
    read: list[Read] = []
    refused_s: list[float] = []
    memory: list[tuple[float, float, float]] = []

    async def one() -> None:
        answer = await completion(TOKENS, slo=slo, ignore_eos=True, **USAGE).run(found.port)
        read.append(answer.read())
        if read[-1].status != 200:
            refused_s.append(answer.ended - answer.began)

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - began, rss_mib(found.server), rss_mib(found.engine)))
            await asyncio.sleep(SAMPLE_EVERY_S)

    used, began = cpu(found.server), time.perf_counter()
    watcher = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        for k in range(int(rate * seconds)):
            await asyncio.sleep(began + k / rate - time.perf_counter())
            group.create_task(one())
        offering = time.perf_counter() - began
    took = time.perf_counter() - began
    watcher.cancel()
    met = sum(one.slo.get("met") is True and one.tokens == TOKENS for one in read)
    half = [sample for sample in memory if sample[0] > seconds / 2]
    return {
        "offered_per_s": len(read) / offering,
        "seconds": took,
        "requests": len(read),
        "answered": sum(one.complete for one in read),
        "lost": sum(not one.complete for one in read),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in read).items())},
        "met": met,
        "goodput_per_s": met / took,
        "refused_ms_p50": 1e3 * quantile(refused_s, 0.5) if refused_s else None,
        "refused_ms_p99": 1e3 * quantile(refused_s, 0.99) if refused_s else None,
        "server_cores": (cpu(found.server) - used) / took,
        "server_rss_mib": {"begin": memory[0][1], "half": half[0][1], "end": memory[-1][1]},
        "server_rss_mib_peak": max(sample[1] for sample in memory),
        "engine_rss_mib": {"begin": memory[0][2], "half": half[0][2], "end": memory[-1][2]},
        "engine_rss_mib_peak": max(sample[2] for sample in memory),
    }


@contextlib.contextmanager
def embedded() -> Iterator[Servers]:
    """The embedded model on one core, and a server before it."""
    config = EngineConfig(
        device="cpu", threads=1, policy="rota", max_batch_size=PLACES, max_queue=PLACES + QUEUE, prefix_cache=False
    )
    with (
        launch_engine(config) as engine,
        http_load.server_before(engine.address, "--model-name", "noop") as (port, server),
    ):
        yield Servers(port, engine.address, server, engine.pid, Path())


async def served_per_s(found: Servers, seconds: float) -> float:
    """Requests/s that as many clients get answered as there are places."""
    began, count = time.perf_counter(), 0

    async def client() -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            answer = await completion(TOKENS, ignore_eos=True, **USAGE).run(found.port)
            assert answer.read().tokens == TOKENS, "an answer is not whole"
            count += 1

    await asyncio.gather(*(client() for _ in range(PLACES)))
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure and write, to results/http-overload.json or http-overload-embedded.json if nothing else is said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of ten times the load")
    parser.add_argument("--short", type=float, default=15.0, help="of each lower rate")
    parser.add_argument("--engine", choices=("noop", "embedded"), default="noop")
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s that the no-op engine can serve")
    parser.add_argument("--json", type=Path, help="where to write")
    parser.add_argument("--quick", action="store_true", help="a few seconds; writes nothing")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.seconds, chosen.short = 6.0, 3.0
    load = os.getloadavg()
    noop = chosen.engine == "noop"
    with http_load.servers(tbt_ms=TBT_MS, capacity=PLACES, max_queue=PLACES + QUEUE) if noop else embedded() as found:
        runs = []
        deadline_s = DEADLINE_S
        if not noop:
            http_load.run(served_per_s(found, 3.0))  # whatever is made once
            chosen.rate = http_load.run(served_per_s(found, chosen.short))
            # As in the other case: a quarter longer than all that the engine holds takes it.
            deadline_s = 1.25 * (PLACES + QUEUE) / chosen.rate
            print(
                f"the embedded model serves {chosen.rate:.1f} requests/s; the promise is {deadline_s:.1f} s", flush=True
            )
        for share in (*SHARES, 10.0):
            seconds = chosen.seconds if share == 10.0 else chosen.short
            run = http_load.run(offered(found, share * chosen.rate, seconds, deadline_s))
            runs.append({"share": share, **run})
            print(
                f"{share:4.1f} x: goodput {run['goodput_per_s']:.1f}/s, {run['answered']} of {run['requests']} answered"
                f", {run['statuses']}, server {run['server_rss_mib_peak']:.0f} MiB",
                flush=True,
            )
    peak, last = max(run["goodput_per_s"] for run in runs[:-1]), runs[-1]
    measured = {
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
        "cores": os.cpu_count(),
        "engine": chosen.engine,
        "served_per_s": chosen.rate,
        "places": PLACES,
        "queue": QUEUE,
        "deadline_s": deadline_s,
        "peak_goodput_per_s": peak,
        "goodput_of_peak": last["goodput_per_s"] / peak,
        "lost": last["lost"],
        "server_grew_mib_in_second_half": last["server_rss_mib"]["end"] - last["server_rss_mib"]["half"],
        "engine_grew_mib_in_second_half": last["engine_rss_mib"]["end"] - last["engine_rss_mib"]["half"],
        "runs": runs,
    }
    print(f"at ten times the load: {last['goodput_per_s'] / peak:.1%} of the peak, {last['lost']} lost")
    if not chosen.quick:
        command = (
            f"python benchmarks/http_overload.py --engine {chosen.engine} --seconds {chosen.seconds:g} "
            f"--short {chosen.short:g}"
        )
        name = "http-overload.json" if noop else "http-overload-embedded.json"
        print(write_record(chosen.json or record.RESULTS / name, command, measured))


if __name__ == "__main__":
    main()
