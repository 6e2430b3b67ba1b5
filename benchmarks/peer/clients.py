"""Several client processes that load one server together, so that none is the bottleneck, and say if they were.

Each is `superinfer bench serve`'s client; a job goes to the process of its number modulo how many there are. Prompts
are made before, from seeds, in the processes. Their clock is the machine's monotonic one: all begin at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from superinfer.bench.load import Asking, ClientDelay, new_sample, run_load
from superinfer.bench.load_report import Spread
from superinfer.bench.openai_stream import OpenAIStreams, Sample
from superinfer.bench.workload import prompts_of
from superinfer.runtime.sim.workload import Job

AHEAD_S = 0.2  # between "all are ready" and the run's start
GRACE_S = 20.0  # beyond the last arrival and the drain, until clients are taken to hang


class ClientFailed(Exception):
    """A client process ended or hangs."""


@dataclass(frozen=True)
class Work:
    """One run. vocab, seed: of the prompts. drain_s: after the last arrival. window_s: count tokens until then."""

    asking: Asking
    jobs: Sequence[Job]
    vocab: int
    seed: int
    drain_s: float
    window_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """samples: in the jobs' order. window_tokens: output tokens that came before `window_s`."""

    samples: list[Sample]
    delay: ClientDelay
    window_tokens: int | None

    def client(self) -> dict[str, Any]:
        """What the clients say of themselves."""
        sent, loop = Spread.of(self.delay.sent_s), Spread.of(self.delay.loop_s)
        return {
            "sent_late_p99_s": sent.p99 if sent else None,
            "read_late_p99_s": loop.p99 if loop else None,
            "busiest_cpu": self.delay.cpu,
            "warning": self.delay.warning,
        }


class Clients:
    """A context of `count` processes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._members: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Clients:
        self._open()
        return self

    def restart(self) -> None:
        """New processes in place of those that may be busy with what was given up."""
        self._close()
        self._open()

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(there,), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._members = []

    def run(self, work: Work) -> Outcome:
        """Everything sent, everything answered or given up. Raises ClientFailed."""
        parts = [work.jobs[at :: self._count] for at in range(self._count)]
        busy = [(pipe, jobs) for (_, pipe), jobs in zip(self._members, parts, strict=True) if jobs]
        for pipe, jobs in busy:
            pipe.send(Work(work.asking, jobs, work.vocab, work.seed, work.drain_s, work.window_s))
        for pipe, _ in busy:
            self._expect(pipe, 120.0)
        start = time.perf_counter() + AHEAD_S
        for pipe, _ in busy:
            pipe.send(start)
        limit = max(job.at for job in work.jobs) + work.drain_s + GRACE_S
        found = [self._expect(pipe, start + limit - time.perf_counter()) for pipe, _ in busy]
        samples: list[Sample | None] = [None] * len(work.jobs)
        for at, (part, _, _) in enumerate(found):
            samples[at :: self._count] = part
        delays = [delay for _, delay, _ in found]
        delay = ClientDelay(
            [late for one in delays for late in one.sent_s],
            [late for one in delays for late in one.loop_s],
            max(one.cpu for one in delays),
        )
        window = sum(tokens for _, _, tokens in found) if work.window_s is not None else None
        return Outcome([sample for sample in samples if sample is not None], delay, window)

    def _expect(self, pipe: Connection, limit_s: float) -> Any:
        try:
            if not pipe.poll(max(0.1, limit_s)):
                raise ClientFailed(f"a client said nothing for {limit_s:.0f} s")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise ClientFailed("a client process ended") from None
        if isinstance(answer, str) and answer:
            raise ClientFailed(answer)
        return answer


def _main(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            work = pipe.recv()
            try:
                prompts = prompts_of(work.jobs, work.vocab, work.seed)
                bodies = [work.asking.body(prompt, job) for prompt, job in zip(prompts, work.jobs, strict=True)]
                pipe.send("")
                pipe.send(asyncio.run(_run(work, bodies, pipe.recv())))
            except (EOFError, OSError):
                raise
            except Exception as error:  # said by the parent; the next run may go well
                pipe.send(f"{type(error).__name__}: {error}")


async def _run(work: Work, bodies: list[bytes], start: float) -> tuple[list[Sample], ClientDelay, int]:
    samples = [new_sample(job) for job in work.jobs]
    seen = 0

    async def look() -> None:
        nonlocal seen
        await asyncio.sleep(start + (work.window_s or 0.0) - time.perf_counter())
        seen = sum(sample.tokens for sample in samples)

    async with OpenAIStreams(work.asking.server.url) as streams:
        looking = asyncio.create_task(look())
        _, delay = await run_load(streams, work.jobs, bodies, drain_s=work.drain_s, start=start, samples=samples)
        if not looking.done():  # all is over before the window is
            seen = sum(sample.tokens for sample in samples)
            looking.cancel()
    return samples, delay, seen
