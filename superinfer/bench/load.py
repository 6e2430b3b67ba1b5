"""An open loop: requests are sent when they are due, however the server does, and the client watches its own delay."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from superinfer.bench.openai_stream import OpenAIStreams, Sample, Server
from superinfer.errors import InvalidRequestError
from superinfer.runtime.file_limit import raise_file_limit
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO, TokenTimeline

LOOK_EVERY_S = 0.02  # how often the event loop's own delay is measured
BUSY_FRACTION = 0.9  # of a core: beyond it the client is taken to be the bottleneck
LATE_S = 0.01  # the same, of the 99th percentile of its delay


@dataclass(frozen=True)
class Asking:
    """What each request says. priority: "" or "edf". stream: else answers come in one piece, timed at their end."""

    server: Server
    ignore_eos: bool = True
    send_slo: bool = False
    priority: str = ""
    stream: bool = True

    def body(self, prompt: list[int], job: Job) -> bytes:
        """The JSON of one request."""
        asked: dict[str, Any] = {
            "model": self.server.model,
            "prompt": prompt,
            "max_tokens": job.output_length,
            "temperature": 0,
        }
        if self.stream:
            counted = {"continuous_usage_stats": True} if self.server.counts else {}
            asked |= {"stream": True, "stream_options": {"include_usage": True, **counted}}
        if self.ignore_eos:
            asked["ignore_eos"] = True
        if self.priority == "edf":
            ttft = job.slo.ttft if job.slo is not None and job.slo.ttft is not None else 3600.0
            asked["priority"] = int((job.at + ttft) * 1e3)
        if self.send_slo and job.slo is not None:
            asked["slo"] = slo_fields(job.slo)
        return msgspec.json.encode(asked)


def slo_fields(slo: SLO) -> dict[str, float]:
    """An SLO as the server's `slo` field, in milliseconds."""
    named = {"ttft_ms": slo.ttft, "tbt_ms": slo.tbt, "deadline_ms": slo.deadline}
    found = {name: seconds * 1e3 for name, seconds in named.items() if seconds is not None}
    return found | ({"weight": slo.weight} if slo.weight != 1.0 else {})


@dataclass(frozen=True)
class ClientDelay:
    """What the client itself added. sent_s: how late each request was sent. loop_s: how late a timer of the event loop
    fired, sampled; what came meanwhile was read that much too late. cpu: share of one core it used."""

    sent_s: list[float]
    loop_s: list[float]
    cpu: float

    @property
    def warning(self) -> str:
        """Why the figures are not the server's alone; "" if they are."""
        said = []
        for what, delays in (("requests were sent", self.sent_s), ("answers were read", self.loop_s)):
            late = sorted(delays)[int(0.99 * (len(delays) - 1))] if delays else 0.0
            if late > LATE_S:
                said.append(f"1 % of {what} over {late * 1e3:.0f} ms late")
        if self.cpu > BUSY_FRACTION:
            said.append(f"it used {self.cpu:.0%} of the one core it has")
        if not said:
            return ""
        return f"the client was short of time: {', '.join(said)}; its delay is part of these figures"


async def probe(streams: OpenAIStreams, server: Server, asking: Asking, prompt: list[int]) -> Server:
    """The server with `counts` set: whether it heeds `continuous_usage_stats`. Raises InvalidRequestError, with the
    server's words, if it takes this kind of request in neither form."""
    refused = ""
    for counts in (True, False):
        server = replace(server, counts=counts)
        job = Job(0.0, len(prompt), 1, (0,), len(prompt))
        sample = new_sample(job)
        body = replace(asking, server=server).body(prompt, job)
        await streams.stream(body, sample, time.perf_counter(), time.perf_counter)
        if not sample.error:
            return replace(server, counts=sample.counted)
        refused = f"{sample.error}: {sample.detail}"
        if not sample.error.startswith("HTTP 4"):
            break
    raise InvalidRequestError(f"the server at {server.url} refused a first small request: {refused}")


def new_sample(job: Job) -> Sample:
    """Nothing has come of the job yet."""
    return Sample(job.at, job.prompt_length, job.output_length, job.slo, TokenTimeline(job.slo))


async def run_load(
    streams: OpenAIStreams,
    jobs: Sequence[Job],
    bodies: Sequence[bytes],
    *,
    drain_s: float,
    on_finished: Callable[[Sample], None] | None = None,
    start: float | None = None,
    samples: Sequence[Sample] | None = None,
) -> tuple[list[Sample], ClientDelay]:
    """Send every body when its job is due. What is not finished `drain_s` seconds after the last has failed.

    start: of the run, on time.perf_counter, for several clients that begin together; None: now.
    samples: of the jobs, new ones, for who wants to look at them meanwhile.
    """
    raise_file_limit()
    clock = time.perf_counter
    samples = [new_sample(job) for job in jobs] if samples is None else list(samples)
    delays: list[float] = []
    watcher = asyncio.create_task(_watch_loop(delays))
    tasks: set[asyncio.Task[None]] = set()

    async def one(body: bytes, sample: Sample) -> None:
        await streams.stream(body, sample, began, clock)
        if on_finished is not None:
            on_finished(sample)

    gc.collect()
    gc.freeze()  # what is prepared need not be looked through again and again while answers come
    began, cpu = clock() + 0.05 if start is None else start, time.process_time()
    try:
        for job, body, sample in zip(jobs, bodies, samples, strict=True):
            await asyncio.sleep(max(0.0, began + job.at - clock()))
            tasks.add(asyncio.create_task(one(body, sample)))
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        gc.unfreeze()
        watcher.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watcher, *tasks, return_exceptions=True)
    used = (time.process_time() - cpu) / max(1e-9, clock() - began)
    return samples, ClientDelay([s.sent for s in samples if s.sent is not None], delays, used)


async def _watch_loop(delays: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LOOK_EVERY_S)
        delays.append(max(0.0, time.perf_counter() - before - LOOK_EVERY_S))
