"""What the HTTP benchmarks share: a no-op engine with a server before it, and clients that cost little.

The clients read raw sockets and look at what they read when the run is over: an HTTP library would take longer than the
server, on the same cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from noop_engine import Stamps as Stamps

from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.file_limit import raise_file_limit
from superinfer.runtime.protocol import Generate, SamplingParams, SequenceDelta
from superinfer.runtime.server.serve import loop_factory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from chat_checkpoint import write_checkpoint

T = TypeVar("T")

PROMPT = "hello"
USAGE = {"stream_options": {"include_usage": True}}


@dataclass
class Servers:
    """What is under test. port: the server's; address: the engine's own door; server, engine: their processes' ids."""

    port: int
    address: str
    server: int
    engine: int
    folder: Path


@contextlib.contextmanager
def servers(*flags: str, stamps: tuple[int, int] | None = None, **options: float) -> Iterator[Servers]:
    """A no-op engine with `options`, and a server with `flags` before it. stamps: slots and tokens of a `Stamps`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "tiny")
        given = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        if stamps is not None:
            given += ["--stamps", str(folder / "stamps"), *map(str, stamps)]
        engine = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "noop_engine.py"), "--checkpoint", str(checkpoint), *given],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert engine.stdout is not None
        address = engine.stdout.readline().strip()
        try:
            with server_before(address, *flags) as (port, server):
                yield Servers(port, address, server, engine.pid, folder)
        finally:
            _end(engine)


@contextlib.contextmanager
def server_before(address: str, *flags: str) -> Iterator[tuple[int, int]]:
    """`superinfer serve` before the engine at `address`: its port, and its process's id."""
    command = [sys.executable, "-m", "superinfer", "serve", "--engine", address, "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("serving at")), "")
        if not line:
            raise RuntimeError(f"the server ended with status {server.wait()} before it served")
        yield int(line.split()[2].split(":")[2].split("/")[0]), server.pid
    finally:
        _end(server)


def _end(process: subprocess.Popen[str]) -> None:
    """Politely, then by force: what runs before all others must not stay."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(main: Coroutine[Any, Any, T], *, within_s: float | None = None) -> T:
    """Run the load. What is there already is no work for the garbage collector while it runs. Raises TimeoutError where
    it takes longer than `within_s`."""
    raise_file_limit()
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(asyncio.wait_for(main, within_s))
    finally:
        gc.unfreeze()


@dataclass
class Answer(asyncio.Protocol):
    """One streamed completion over a connection of its own. Times are of time.perf_counter; it ends with `done`."""

    body: bytes
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    began: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    error: str = ""

    def connection_made(self, transport: Any) -> None:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(self.body)}\r\n\r\n"
        )
        self.sent = time.perf_counter()
        transport.write(head.encode() + self.body)

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = time.perf_counter()
        self.error = self.error or (repr(error) if error else "")
        self.done.set_result(None)

    async def run(self, port: int) -> Answer:
        """Ask and read to the end. What goes wrong is kept, not raised."""
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self.began = time.perf_counter()
        try:
            await loop.create_connection(lambda: self, "127.0.0.1", port)
        except OSError as error:
            self.error, self.ended = repr(error), time.perf_counter()
            return self
        await self.done
        return self

    # ------------------------------------------------------------------ what came, read after the run

    def read(self) -> Read:
        """What was answered."""
        whole = b"".join(data for _, data in self.reads)
        status = int(whole.split(b" ", 2)[1]) if whole else 0
        found = Read(status=status, complete=status not in (0, 200) or b"data: [DONE]" in whole)
        for at, data in self.reads:
            # A piece's text is between these; a token is a character of this checkpoint, and none needs an escape.
            text = sum(len(part.split(b'"', 1)[0]) for part in data.split(b'"text":"')[1:])
            found.arrivals += [at] * text
        if (at_slo := whole.rfind(b'"slo":{')) >= 0:
            found.slo = json.JSONDecoder().raw_decode(whole[at_slo + 6 :].decode())[0]
        if (at_usage := whole.rfind(b'"completion_tokens":')) >= 0:
            found.tokens = int(whole[at_usage + 20 :].split(b",", 1)[0])
        return found


@dataclass
class Read:
    """status: of HTTP, 0 for no answer. arrivals: when each token was read. complete: an error, or a whole stream."""

    status: int
    complete: bool
    tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    slo: dict[str, Any] = field(default_factory=dict)


def completion(tokens: int, **more: Any) -> Answer:
    """A request for a stream of so many tokens."""
    return Answer(
        json.dumps({"model": "noop", "prompt": PROMPT, "max_tokens": tokens, "stream": True, **more}).encode()
    )


@dataclass
class Direct:
    """The same stream from the engine's own door, without HTTP."""

    request: Generate
    arrivals: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    report: Any = None

    async def run(self, client: AsyncEngineClient) -> Direct:
        done = asyncio.get_running_loop().create_future()

        def take(delta: SequenceDelta | Exception) -> None:
            now = time.perf_counter()
            if isinstance(delta, Exception):
                done.set_exception(delta)
                return
            self.arrivals += [now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                self.ended, self.report = now, delta.report
                done.set_result(None)

        self.began = time.perf_counter()
        await client.open(self.request, take)
        await done
        client.release(self.request.request_id, finished=True)
        return self


def direct(name: str, tokens: int, slot: int) -> Direct:
    """A request for so many tokens, of id `name`."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Direct(Generate(request_id=name, prompt=[5] * len(PROMPT), sampling=sampling, program=str(slot)))


def keep_others_away() -> str:
    """Let this process, and those it starts, run before all others of the machine, which may then be in use; returns
    how they are scheduled. Needs the right to."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return "SCHED_RR"
    return "as any process"


def cpu(pid: int) -> float:
    """Seconds that a process has computed (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Resident memory of a process now (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantile(values: list[float], q: float) -> float:
    """The value that a share `q` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
