"""How much the HTTP layer can carry: streamed tokens/s, added latency, streams held, and ten times too much load.

    python benchmarks/http_speed.py [--quick] [--overload-s 60]

Three processes share the machine: an engine that computes nothing (noop_engine.py), `superinfer serve`, and this load
generator. The generator reads raw sockets and counts events: an HTTP client library would take longer than the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from chat_checkpoint import write_checkpoint


@dataclass
class Servers:
    """The two processes under test."""

    port: int
    server: psutil.Process
    engine: psutil.Process


@contextlib.contextmanager
def servers(**options: float) -> Iterator[Servers]:
    """A no-op engine with `options`, and a server before it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny")
        flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        engine = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "noop_engine.py"), "--checkpoint", str(checkpoint), *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert engine.stdout is not None
        address = engine.stdout.readline().strip()
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "superinfer",
                "serve",
                "--engine",
                address,
                "--port",
                "0",
                "--max-concurrent",
                "100000",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if line.startswith("serving at"))
            port = int(line.split()[2].split(":")[2].split("/")[0])
            yield Servers(port, psutil.Process(server.pid), psutil.Process(engine.pid))
        finally:
            server.send_signal(signal.SIGTERM)
            engine.terminate()
            server.wait(30)
            engine.wait(30)


@dataclass
class Answer:
    """What one request got. Seconds since it was sent; tokens are characters of this checkpoint."""

    status: int
    tokens: int = 0
    writes: int = 0
    ttft: float = 0.0
    e2e: float = 0.0
    met: bool | None = None
    ended: bool = False


async def ask(port: int, max_tokens: int, **more: Any) -> Answer:
    """One streamed completion over a connection of its own."""
    body = json.dumps({"model": "noop", "prompt": "hello", "max_tokens": max_tokens, "stream": True, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = Answer(0)
    tail = b""
    try:
        writer.write(head.encode() + body)
        while chunk := await reader.read(1 << 16):
            if not answer.status:
                answer.status = int(chunk.split(b" ", 2)[1])
                answer.ttft = time.perf_counter() - began
            answer.tokens += chunk.count(b'"text":')  # chunks of the stream; merged ones are counted by `usage`
            answer.writes += 1
            tail = (tail + chunk)[-2000:]
        answer.ended = b"[DONE]" in tail or answer.status != 200
        if b'"met":' in tail:
            answer.met = b'"met":true' in tail
        if (at := tail.rfind(b'"completion_tokens":')) >= 0:
            answer.tokens = int(tail[at + 20 :].split(b",")[0])
    finally:
        answer.e2e = time.perf_counter() - began
        writer.close()
    return answer


USAGE = {"stream_options": {"include_usage": True}}


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def throughput(found: Servers, streams: int, tokens: int) -> dict[str, float]:
    """`streams` at once, each of `tokens` tokens, at the rate the engine was told."""
    cpu_before, began = cpu(found.server), time.perf_counter()
    answers = await asyncio.gather(*(ask(found.port, tokens, **USAGE) for _ in range(streams)))
    took = time.perf_counter() - began
    assert all(a.status == 200 and a.ended and a.tokens == tokens for a in answers), "an answer is not whole"
    return {
        "tokens_per_s": sum(a.tokens for a in answers) / took,
        "server_cpu_s_per_1000_tokens": 1000 * (cpu(found.server) - cpu_before) / sum(a.tokens for a in answers),
        "reads_per_token": sum(a.writes for a in answers) / sum(a.tokens for a in answers),
    }


async def latency(found: Servers, streams: int, tokens: int, tbt: float, ttft: float) -> dict[str, float]:
    """Added to the engine's own times by HTTP: of the first token, and of the whole answer."""

    async def one(k: int) -> Answer:
        await asyncio.sleep(k / streams * tbt * tokens / 2)  # spread, as real requests are
        return await ask(found.port, tokens, **USAGE)

    answers = await asyncio.gather(*(one(k) for k in range(streams)))
    first = sorted(1e3 * (a.ttft - ttft) for a in answers)
    whole = sorted(1e3 * (a.e2e - ttft - (tokens - 1) * tbt) for a in answers)
    at = lambda values, q: values[min(len(values) - 1, int(q * len(values)))]  # noqa: E731
    return {
        "ttft_added_ms_p50": at(first, 0.5),
        "ttft_added_ms_p99": at(first, 0.99),
        "e2e_added_ms_p50": at(whole, 0.5),
        "e2e_added_ms_p99": at(whole, 0.99),
    }


async def offered(found: Servers, rate: float, seconds: float, tokens: int, deadline: float) -> dict[str, Any]:
    """Requests at `rate`/s for `seconds`, dropped by the engine once their deadline has passed."""
    slo = {"deadline_ms": 1e3 * deadline, "on_miss": "truncate"}
    tasks, peak, began = [], 0, time.perf_counter()
    for k in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + k / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(found.port, tokens, slo=slo, **USAGE)))
        if k % 50 == 0:
            peak = max(peak, found.server.memory_info().rss)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    took = time.perf_counter() - began
    good = [a for a in answers if isinstance(a, Answer)]
    return {
        "offered_per_s": rate,
        "requests": len(answers),
        "answered": sum(a.ended for a in good),
        "lost": len(answers) - sum(a.ended for a in good),
        "refused": sum(a.status in (429, 503) for a in good),
        "met": sum(a.met is True for a in good),
        "goodput_per_s": sum(a.met is True for a in good) / took,
        "server_rss_peak_mib": max(peak, found.server.memory_info().rss) / 2**20,
    }


def main() -> None:
    """Measure and write results/http-noop.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; writes nothing")
    parser.add_argument("--overload-s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.overload_s, chosen.rounds = 5.0, 2
    measured: dict[str, Any] = {"load_average_before": os.getloadavg(), "cores": os.cpu_count()}

    with servers(tbt_ms=20) as found:  # 500 streams * 50/s = 25,000 tokens/s offered
        rounds = [asyncio.run(throughput(found, 500, 200)) for _ in range(chosen.rounds)]
    measured["throughput"] = {"streams": 500, "offered_tokens_per_s": 25_000, "rounds": rounds, **_medians(rounds)}
    print("throughput", _medians(rounds))

    with servers(tbt_ms=20, ttft_ms=5) as found:  # 200 streams * 50/s = 10,000 tokens/s
        rounds = [asyncio.run(latency(found, 200, 100, 0.020, 0.005)) for _ in range(chosen.rounds)]
    measured["latency"] = {"streams": 200, "offered_tokens_per_s": 10_000, "rounds": rounds, **_medians(rounds)}
    print("latency", _medians(rounds))

    with servers(tbt_ms=500) as found:
        held = asyncio.run(throughput(found, 2000, 20))
        measured["held"] = {"streams": 2000, "server_rss_mib": found.server.memory_info().rss / 2**20, **held}
    print("held", measured["held"])

    # 16 places of 0.39 s: 41 requests/s can be served. A queue of 48 is waited through in 0.8 s of the 2 s promised.
    with servers(tbt_ms=20, capacity=16, max_queue=64) as found:
        at_capacity = asyncio.run(offered(found, 41, chosen.overload_s, 20, 2.0))
        over = asyncio.run(offered(found, 410, chosen.overload_s, 20, 2.0))
    measured["overload"] = {"capacity_per_s": 41, "at_capacity": at_capacity, "ten_times": over}
    print("overload", json.dumps(measured["overload"], indent=1))
    measured["load_average_after"] = os.getloadavg()
    if not chosen.quick:
        print(record.write("http-noop", "python benchmarks/http_speed.py", measured))


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
