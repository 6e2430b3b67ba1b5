"""2,000 programs at once in one process: over the real door, to an engine that computes nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import superinfer as si
from superinfer.lang.loop import language_loop

ROOT = Path(__file__).parents[2]
PROGRAMS = 2000


@pytest.fixture(scope="module")
def noop_engine(tiny_checkpoint: Path) -> Iterator[str]:
    """Its address. It answers each request with one token after another, whatever is asked."""
    command = [sys.executable, "benchmarks/noop_engine.py", "--checkpoint", str(tiny_checkpoint), "--tbt-ms", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(10)


class Threads:
    """How many threads the kernel counts in this process, at most: looked at often, and whenever `look` is called."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._run)

    def look(self) -> None:
        self.most = max(self.most, len(os.listdir("/proc/self/task")))

    def _run(self) -> None:
        while not self._over.wait(0.01):
            self.look()

    def __enter__(self) -> Threads:
        self._watch.start()
        self.look()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._watch.join()


@pytest.mark.slow
def test_2000_programs_at_once_need_no_threads_and_failing_ones_harm_no_other(noop_engine: str) -> None:
    with si.RuntimeEndpoint(noop_engine) as backend, Threads() as threads:
        before = threads.most
        all_there = language_loop().run(barrier())

        @si.function(deadline=300.0)
        async def program(s, i):
            s += si.user(f"{i}") + si.assistant(si.gen("x", max_tokens=2))
            await s.get("x")
            await all_there.wait()  # every program has made its first call and none has ended: all are running
            threads.look()
            if i % 100 == 7:
                raise ValueError(f"item {i}")
            if i % 100 == 8:
                s += si.assistant_end()  # ends what is not open: its state fails
            forks = s.fork(2)
            forks += si.user("a") + si.assistant(si.gen("y", max_tokens=2))
            await forks.ajoin()

        states = program.run_batch([(i,) for i in range(PROGRAMS)], backend=backend)
    assert len(states) == PROGRAMS
    for i, state in enumerate(states):
        if i % 100 in (7, 8):
            assert type(state.error()) is (ValueError if i % 100 == 7 else si.InvalidRequestError), i
        else:
            assert state.error() is None and len(state["y"]) == 2 and len(state["x"]) == 2, i
    assert threads.most <= before + 2  # the language's loop, where it was not running yet, and the kernel's own


async def barrier() -> asyncio.Barrier:
    """One for all programs, on the language's loop."""
    return asyncio.Barrier(PROGRAMS)


async def test_cancelling_2000_programs_cancels_all_their_requests(noop_engine: str) -> None:
    @si.function
    async def program(s, i):
        s += f"{i}" + si.gen("x", max_tokens=100_000)
        await s.get("x")

    with si.RuntimeEndpoint(noop_engine) as backend:
        tasks = [asyncio.create_task(program.arun(i, backend=backend)) for i in range(PROGRAMS)]
        while (await asyncio.to_thread(running, backend)) < PROGRAMS:
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done)
        while (await asyncio.to_thread(running, backend)) > 0:  # until the test's time limit
            await asyncio.sleep(0.05)


def running(backend: si.RuntimeEndpoint) -> int:
    """Requests that the engine works on."""
    return language_loop().run(backend.client.client.health(timeout=30.0)).running
