"""Ten times more requests than can be served, for a minute: are all answered, is memory bounded, does goodput hold?

    python benchmarks/http_overload.py [--seconds 60] [--short 15] [--rate 40] [--quick]

A no-op engine (noop_engine.py) with 16 places gives each request 20 tokens in about 0.4 s, so that about 40 requests/s
can be served, and holds 48 more in its queue. Every request promises 2 s (`on_miss: truncate`), over a connection of
its own. Goodput is what was answered in full within its promise, per second. The rates before the last find its peak.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import http_load
import record
from http_load import USAGE, Read, Servers, completion, cpu, quantile, rss_mib

from superinfer.bench.record import write_record

TOKENS, TBT_MS, PLACES, QUEUE, DEADLINE_S = 20, 20, 16, 48, 2.0
SHARES = (0.5, 1.0, 2.0)  # of what can be served, to find the peak
SAMPLE_EVERY_S = 0.5


async def offered(found: Servers, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at `rate`/s for `seconds`, whatever becomes of those before."""
    slo = {"deadline_ms": 1e3 * DEADLINE_S, "on_miss": "truncate"}
    read: list[Read] = []
    refused_s: list[float] = []
    memory: list[tuple[float, float, float]] = []

    async def one() -> None:
        answer = await completion(TOKENS, slo=slo, **USAGE).run(found.port)
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


def main() -> None:
    """Measure and write, to results/http-overload.json if nothing else is said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of ten times the load")
    parser.add_argument("--short", type=float, default=15.0, help="of each lower rate")
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s that can be served")
    parser.add_argument("--json", type=Path, default=record.RESULTS / "http-overload.json", help="where to write")
    parser.add_argument("--quick", action="store_true", help="a few seconds; writes nothing")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.seconds, chosen.short = 6.0, 3.0
    load = os.getloadavg()
    with http_load.servers(tbt_ms=TBT_MS, capacity=PLACES, max_queue=PLACES + QUEUE) as found:
        runs = []
        for share in (*SHARES, 10.0):
            seconds = chosen.seconds if share == 10.0 else chosen.short
            run = http_load.run(offered(found, share * chosen.rate, seconds))
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
        "places": PLACES,
        "queue": QUEUE,
        "deadline_s": DEADLINE_S,
        "peak_goodput_per_s": peak,
        "goodput_of_peak": last["goodput_per_s"] / peak,
        "lost": last["lost"],
        "server_grew_mib_in_second_half": last["server_rss_mib"]["end"] - last["server_rss_mib"]["half"],
        "engine_grew_mib_in_second_half": last["engine_rss_mib"]["end"] - last["engine_rss_mib"]["half"],
        "runs": runs,
    }
    print(f"at ten times the load: {last['goodput_per_s'] / peak:.1%} of the peak, {last['lost']} lost")
    if not chosen.quick:
        command = f"python benchmarks/http_overload.py --seconds {chosen.seconds:g} --short {chosen.short:g}"
        print(write_record(chosen.json, command, measured))


if __name__ == "__main__":
    main()
