"""What `superinfer bench serve` itself costs: thousands of streams from a server that only keeps time.

The server, a process of its own, sends every stream a token at a fixed pace: what the client sees beyond that is the
machine's and its own. CPU time for each token is what it takes away from a server beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
from multiprocessing.connection import Connection

import msgspec
from record import write

from superinfer.bench.load import Asking, probe, run_load
from superinfer.bench.load_report import LoadReport, report
from superinfer.bench.openai_stream import OpenAIStreams
from superinfer.bench.workload import prompts_of
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO

CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"m","choices":[{'
    b'"index":0,"text":" token","logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":{"prompt_tokens":512,'
    b'"completion_tokens":%d,"total_tokens":%d}}\n\n'
)


def serve_at_a_pace(ready: Connection, pace_s: float) -> None:
    """A server whose every completion has a token each `pace_s` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/v1/completions" not in head:
                    card = json.dumps({"data": [{"id": "m", "owned_by": "nobody"}]}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(card), card))
                    continue
                found = re.search(rb"content-length: (\d+)", head.lower())
                assert found is not None
                count = json.loads(await reader.readexactly(int(found[1])))["max_tokens"]
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                due = asyncio.get_running_loop().time()
                for at in range(1, count + 1):
                    due += pace_s
                    await asyncio.sleep(due - asyncio.get_running_loop().time())
                    chunk = CHUNK % (at, 512 + at)
                    writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def load(url: str, rate: float, duration: float, output: int, pace_s: float) -> LoadReport:
    """`rate` requests a second, each of `output` tokens."""
    slo = SLO(ttft=pace_s + 0.1, tbt=pace_s)
    jobs = [Job(at / rate, 512, output, (-1 - at,), 512, slo) for at in range(int(rate * duration))]
    async with OpenAIStreams(url) as streams:
        server = await streams.describe("")
        asking = Asking(await probe(streams, server, Asking(server), [1, 2, 3]))
        bodies = [asking.body(prompt, job) for prompt, job in zip(prompts_of(jobs, 2000, 0), jobs, strict=True)]
        samples, delay = await run_load(streams, jobs, bodies, drain_s=60)
    return report(samples, delay)


def main() -> None:
    """Measure, print, write results/bench-client.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 100.0, 200.0])
    parser.add_argument("--duration", type=float, default=20.0)
    parser.add_argument("--output-tokens", type=int, default=20)
    parser.add_argument("--pace-s", type=float, default=0.5)
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve_at_a_pace, args=(there, arguments.pace_s), daemon=True)
    server.start()
    rows = []
    try:
        url = f"http://127.0.0.1:{here.recv()}"
        for rate in arguments.rates:
            found = asyncio.run(load(url, rate, arguments.duration, arguments.output_tokens, arguments.pace_s))
            streams, tokens = rate * arguments.output_tokens * arguments.pace_s, rate * arguments.output_tokens
            assert found.failed == 0 and found.client_loop is not None and found.client_sent is not None
            token_us = found.client_cpu * found.duration / found.output_tokens * 1e6
            row = {"rate": rate, "streams": streams, "tokens_per_s": tokens, "cpu_us_per_token": token_us}
            rows.append({**row, "report": msgspec.to_builtins(found)})
            print(
                f"{streams:,.0f} streams at {tokens:,.0f} tokens/s: {token_us:.0f} µs of CPU a token, "
                f"{token_us * tokens / 1e6:.0%} of a core; sent late p99 {found.client_sent.p99 * 1e3:.1f} ms, "
                f"read late p99 {found.client_loop.p99 * 1e3:.1f} ms"
            )
    finally:
        server.terminate()
    measured = {"settings": vars(arguments), "runs": rows}
    print(f"written to {write('bench-client', 'python benchmarks/client_capacity.py', measured)}")


if __name__ == "__main__":
    main()
