"""How much the HTTP layer can carry: streamed tokens/s, what it adds to each token's way, and streams held at once.

    python benchmarks/http_speed.py [--quick] [--rounds 5] [--alone]

Three processes share the machine: an engine that computes nothing (noop_engine.py), `superinfer serve`, and this load
generator. The latency of a token is the time from the engine's handing it to its socket until the client has read it;
the same client reads the same streams from the engine's own door, in turns, and what HTTP adds is the difference. All
ends within LIMIT_S, with an error where a run has not ended by then.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import http_load
import record
from http_load import USAGE, Direct, Read, Servers, Stamps, completion, cpu, direct, quantile, rss_mib

from superinfer.bench.record import write_record
from superinfer.runtime.client import AsyncEngineClient

STREAMS, TOKENS, TBT_MS = 200, 100, 20.0  # 200 streams of 50 tokens/s: half of what must be carried
LIMIT_S = 170.0  # of all runs; on an idle machine they take about 100 s
_BEGAN = time.perf_counter()
NO_HURRY = {"slo": {"ttft_ms": 600_000}}  # answered with what the engine itself saw


def run(main: Coroutine[Any, Any, dict[str, float]]) -> dict[str, float]:
    """Raises TimeoutError at the limit."""
    return http_load.run(main, within_s=max(0.1, _BEGAN + LIMIT_S - time.perf_counter()))


async def throughput(found: Servers, streams: int, tokens: int) -> dict[str, float]:
    """`streams` at once, each of `tokens` tokens, at the rate the engine was told."""
    cpu_before, began = cpu(found.server), time.perf_counter()
    answers = await asyncio.gather(*(completion(tokens, **USAGE).run(found.port) for _ in range(streams)))
    took, used = time.perf_counter() - began, cpu(found.server) - cpu_before
    read = [answer.read() for answer in answers]
    assert all(one.status == 200 and one.complete and one.tokens == tokens for one in read), "an answer is not whole"
    total = streams * tokens
    return {
        "tokens_per_s": total / took,
        "server_cpu_us_per_token": 1e6 * used / total,
        "reads_per_token": sum(len(answer.reads) for answer in answers) / total,
    }


async def spread(k: int) -> None:
    """Requests come one after another, as real ones do: over half the time that a stream takes."""
    await asyncio.sleep(k / STREAMS * TBT_MS / 1e3 * TOKENS / 2)


async def over_http(found: Servers) -> dict[str, float]:
    """Latency through the server."""

    async def one(k: int) -> http_load.Answer:
        await spread(k)
        return await completion(TOKENS, prompt_cache_key=str(k), **NO_HURRY).run(found.port)

    before = cpu(found.server)
    answers = await asyncio.gather(*(one(k) for k in range(STREAMS)))
    used = cpu(found.server) - before
    stamps = Stamps(found.folder / "stamps", STREAMS, TOKENS)
    read: list[Read] = [answer.read() for answer in answers]
    assert all(one.complete and len(one.arrivals) == TOKENS for one in read), "an answer is not whole"
    return _figures(
        [_lags(one.arrivals, stamps.of(k)) for k, one in enumerate(read)],
        [one.arrivals[0] - asked.began - one.slo["ttft_ms"] / 1e3 for asked, one in zip(answers, read, strict=True)],
        [asked.ended - asked.began - one.slo["e2e_ms"] / 1e3 for asked, one in zip(answers, read, strict=True)],
    ) | {"server_cpu_us_per_token": 1e6 * used / (STREAMS * TOKENS)}


async def over_the_door(found: Servers, round: int) -> dict[str, float]:
    """The same from the engine's own door: what the engine's socket, the machine and this client take."""
    async with await AsyncEngineClient.connect(found.address) as client:

        async def one(k: int) -> Direct:
            await spread(k)
            return await direct(f"{round}.{k}", TOKENS, k).run(client)

        answers = await asyncio.gather(*(one(k) for k in range(STREAMS)))
    stamps = Stamps(found.folder / "stamps", STREAMS, TOKENS)
    assert all(len(one.arrivals) == TOKENS for one in answers), "an answer is not whole"
    return _figures(
        [_lags(one.arrivals, stamps.of(k)) for k, one in enumerate(answers)],
        [one.arrivals[0] - one.began - one.report.ttft_s for one in answers],
        [one.ended - one.began - one.report.e2e_s for one in answers],
    )


def _lags(arrivals: list[float], sent: list[float]) -> list[float]:
    return [read - handed for read, handed in zip(arrivals, sent, strict=True)]


def _figures(lags: list[list[float]], first: list[float], whole: list[float]) -> dict[str, float]:
    tokens = [lag for one in lags for lag in one]
    named = {"token": tokens, "first_token": first, "answer": whole}
    return {f"{name}_ms_p{q}": 1e3 * quantile(values, q / 100) for name, values in named.items() for q in (50, 90, 99)}


def latency(rounds: int) -> dict[str, Any]:
    """Rounds over HTTP and over the door, in turns."""
    http, door = [], []
    with http_load.servers(tbt_ms=TBT_MS, ttft_ms=5, stamps=(STREAMS, TOKENS)) as found:
        for round in range(rounds + 1):
            pair = run(over_http(found)), run(over_the_door(found, round))
            if round:  # the first is to warm up
                http.append(pair[0])
                door.append(pair[1])
    through, without = medians(http), medians(door)
    return {
        "streams": STREAMS,
        "offered_tokens_per_s": STREAMS * 1e3 / TBT_MS,
        "over_http": through,
        "over_the_door": without,
        "added_by_http": {name: through[name] - without[name] for name in without},
        "rounds_over_http": http,
        "rounds_over_the_door": door,
    }


def main() -> None:
    """Measure and write, to results/http-noop.json if nothing else is said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=record.RESULTS / "http-noop.json", help="where to write")
    parser.add_argument("--only", choices=("throughput", "latency", "held"), help="writes nothing")
    parser.add_argument("--alone", action="store_true", help="run before all other processes of a machine in use")
    chosen = parser.parse_args()
    scheduled = http_load.keep_others_away() if chosen.alone else "as any process"
    rounds = 2 if chosen.quick else chosen.rounds
    wanted = (chosen.only,) if chosen.only else ("throughput", "latency", "held")
    measured: dict[str, Any] = {
        "load_average_before": os.getloadavg(), "cores": os.cpu_count(), "scheduled": scheduled
    }  # fmt: skip

    if "throughput" in wanted:
        with http_load.servers(tbt_ms=20) as found:  # 500 streams * 50/s = 25,000 tokens/s offered
            found_rounds = [run(throughput(found, 500, 200)) for _ in range(rounds)]
        figures = medians(found_rounds)
        measured["throughput"] = {
            "streams": 500, "offered_tokens_per_s": 25_000, **figures, "rounds": found_rounds
        }  # fmt: skip
        print("throughput", rounded(figures), flush=True)

    if "latency" in wanted:
        measured["latency"] = latency(rounds)
        for name in ("over_http", "over_the_door", "added_by_http"):
            print(name, rounded(measured["latency"][name]), flush=True)

    if "held" in wanted:
        with http_load.servers(tbt_ms=500) as found:
            held = run(throughput(found, 2000, 20))
            measured["held"] = {"streams": 2000, "server_rss_mib": rss_mib(found.server), **held}
        print("held", rounded(measured["held"]), flush=True)

    measured["load_average_after"] = os.getloadavg()
    if not chosen.quick and not chosen.only:
        command = f"python benchmarks/http_speed.py --rounds {rounds}{' --alone' if chosen.alone else ''}"
        print(write_record(chosen.json, command, measured))


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """To read them."""
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()
