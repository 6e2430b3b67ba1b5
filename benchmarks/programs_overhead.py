"""What a call of a program costs beside the engine: CPU time in the program's process and in the HTTP server, and the
time that passes between an answer and the next call.

    python benchmarks/programs_overhead.py --shape tree_of_thought --programs 8

The programs of `superinfer bench programs` on an engine that computes nothing (noop_engine.py), by three ways in turns:
`zmq`, the language at the engine itself; `http`, the language at `superinfer serve`; `openai`, the same calls made with
the `openai` client, unstreamed, at the same server. `away`, for programs whose calls wait for each other: the mean time
that a program has no request at the engine, for each call, without what its tools take.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from record import write

import superinfer as si
from superinfer.bench.program_texts import SHAPES, SIZES, TOOL_S, TURNS, Texts, Tokens
from superinfer.bench.programs_openai import PROGRAMS as CALLS
from superinfer.bench.programs_openai import Caller
from superinfer.bench.shapes import write_shape
from superinfer.lang.loop import language_loop

HERE = Path(__file__).parent
WAYS = ("zmq", "http", "openai")
CHAINS = ("react", "json_extraction", "chat")  # each call waits for the one before


def cpu_of(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started(stack: ExitStack, command: list[str], says: str) -> tuple[str, int]:
    """(what follows `says` in its first lines, process id) of a process that ends with the stack."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, 10)
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(says + r"(\S+)", line):
            return found[1], process.pid
    raise RuntimeError(f"{command} ended without saying where it is")


class Bench:
    """One engine, the server before it, and the ways to both."""

    def __init__(self, address: str, url: str, server: int, shape: str) -> None:
        self._shape, self._server = shape, server
        self._backends: dict[str, Any] = {"zmq": si.RuntimeEndpoint(address), "http": si.RuntimeEndpoint(url)}
        self._url = url

    def round(self, way: str, programs: int, round_: int) -> dict[str, float]:
        """All programs at once. µs of CPU for each call; away_us: of each, of the time without a request."""
        texts = [Texts(self._shape, SIZES[self._shape], f"{way} {round_} {at}") for at in range(programs)]
        at_engine = self._at_engine()
        server, began, here = cpu_of(self._server), time.perf_counter(), time.process_time()
        calls, programs_s = asyncio.run(self._openai(texts) if way == "openai" else self._language(way, texts))
        here = time.process_time() - here
        took, server = time.perf_counter() - began, cpu_of(self._server) - server
        tools = TURNS * TOOL_S * len(texts) if self._shape == "react" else 0.0
        found = {"program_us": here / calls * 1e6, "server_us": server / calls * 1e6, "wall_s": took, "calls": calls}
        if self._shape in CHAINS:
            found["away_us"] = (programs_s - (self._at_engine() - at_engine) - tools) / calls * 1e6
        return found

    def _at_engine(self) -> float:
        """Seconds that all finished requests have been at the engine."""
        stats = language_loop().run(self._backends["zmq"].client.client.stats())
        return float(stats.finished * stats.step_s_mean)

    async def _language(self, way: str, texts: list[Texts]) -> tuple[int, float]:
        """(calls, seconds of all programs together); so does the next."""
        from superinfer.bench.programs_lang import PROGRAMS

        states, seconds = await _timed([PROGRAMS[t.shape].arun(t, backend=self._backends[way]) for t in texts])
        return sum(len(state.ret_value) for state in states), seconds

    async def _openai(self, texts: list[Texts]) -> tuple[int, float]:
        import openai

        used = Tokens()
        async with openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=600.0
        ) as client:
            caller = Caller(client, self._backends["http"].model)
            _, seconds = await _timed([CALLS[t.shape](caller, used, t) for t in texts])
        return used.calls, seconds

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()


async def _timed(programs: Sequence[Awaitable[Any]]) -> tuple[list[Any], float]:
    """What programs that run at once return, and how long all of them took together."""
    began, ends = time.perf_counter(), []

    async def one(program: Awaitable[Any]) -> Any:
        returned = await program
        ends.append(time.perf_counter())
        return returned

    return await asyncio.gather(*map(one, programs)), sum(ends) - began * len(ends)


def main() -> None:
    """Measure, print, write results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[shape for shape in SHAPES if shape != "select"], default="tree_of_thought")
    parser.add_argument("--programs", type=int, default=8, help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--tbt-ms", type=float, default=10.0)
    parser.add_argument("--name", default="programs-overhead", help="of the result file; empty: write none")
    chosen = parser.parse_args()
    ways = chosen.ways.split(",")
    with ExitStack() as stack:
        folder = write_shape("llama-3-8b", Path(stack.enter_context(tempfile.TemporaryDirectory())), tokenizer=True)
        engine = ["--checkpoint", str(folder), "--tbt-ms", str(chosen.tbt_ms), "--ttft-ms", "5"]
        address, _ = started(stack, [str(HERE / "noop_engine.py"), *engine], "^")
        command = ["-m", "superinfer", "serve", "--engine", address, "--port", "0", "--model-name", "noop"]
        url, server = started(stack, command, "serving at ")
        bench = Bench(address, url.removesuffix("/v1"), server, chosen.shape)
        stack.callback(bench.close)
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for round_ in range(-1, chosen.rounds):
            for way in ways:
                one = bench.round(way, 2 if round_ < 0 else chosen.programs, round_)
                if round_ >= 0:
                    rounds[way].append(one)
    medians = {
        way: {name: statistics.median(one[name] for one in of) for name in of[0] if name != "calls"}
        for way, of in rounds.items()
    }
    for way, median in medians.items():
        print(
            f"{way:8} {median['program_us']:8.0f} µs a call in the program {median['server_us']:8.0f} in the server "
            f"{median['wall_s']:7.2f} s" + (f" {median['away_us']:8.0f} µs away" if "away_us" in median else "")
        )
    settings = {name: value for name, value in vars(chosen).items() if name != "name"}
    if chosen.name:
        record = {"settings": settings, "medians": medians, "rounds": rounds}
        command_line = " ".join(["python benchmarks/programs_overhead.py", *sys.argv[1:]])
        print(f"written to {write(chosen.name, command_line, record)}")


if __name__ == "__main__":
    main()
