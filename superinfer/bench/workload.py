"""What a load test asks, and when: the simulator's workloads and traces, or lengths of one's own, as token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from superinfer.errors import InvalidRequestError
from superinfer.runtime.sim.workload import WORKLOADS, Job, make_jobs
from superinfer.runtime.slo import SLO

UNIFORM = "uniform"  # the workload of lengths of one's own
FIRST_TOKEN = 10  # the first ids of most vocabularies are special tokens


class Span(NamedTuple):
    """A range of lengths in tokens, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str) -> Span:
        """Of "512" or "100:1024". Raises InvalidRequestError."""
        parts = text.split(":")
        if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
            raise InvalidRequestError(f"{name} {text!r} must be a number of tokens, or two with a colon: 100:1024")
        low, high = int(parts[0]), int(parts[-1])
        if not 1 <= low <= high:
            raise InvalidRequestError(f"{name} {text!r} must begin at 1 or more and not end before it begins")
        return cls(low, high)


class Load(NamedTuple):
    """How requests are made. See `make_load`."""

    workload: str
    trace: Path | None
    prompt_tokens: Span
    output_tokens: Span
    scale: float
    arrivals: str
    duration: float
    seed: int
    slos: tuple[tuple[float, SLO], ...]


def workload_name(workload: str, trace: Path | None) -> str:
    """`workload`, or what a trace's file says it is where none was named. Raises InvalidRequestError."""
    known = (*WORKLOADS, UNIFORM)
    if workload:
        if workload not in known:
            raise InvalidRequestError(f"workload {workload!r} is unknown; choose one of {', '.join(known)}")
        return workload
    if trace is None:
        return "sharegpt"
    return "mooncake" if trace.suffix == ".jsonl" else "azure"


def make_load(load: Load, rate: float) -> list[Job]:
    """The jobs of one run at `rate` requests/s, the same for the same seed. Raises InvalidRequestError."""
    if not (math.isfinite(load.scale) and load.scale > 0):
        raise InvalidRequestError(f"scale={load.scale} must be finite and above 0")
    own = load.workload == UNIFORM
    if own and (load.trace is not None or load.arrivals == "trace"):
        raise InvalidRequestError(f"workload {load.workload!r} reads no trace; leave out --trace and --arrivals trace")
    jobs = make_jobs(
        "sharegpt" if own else load.workload,  # its times and classes; the lengths are replaced
        rate=rate,
        duration=load.duration,
        seed=load.seed,
        trace=load.trace,
        arrivals=load.arrivals,
        slos=load.slos,
    )
    if own:
        rng = np.random.default_rng((load.seed, 1))
        prompts = rng.integers(load.prompt_tokens.low, load.prompt_tokens.high + 1, len(jobs))
        outputs = rng.integers(load.output_tokens.low, load.output_tokens.high + 1, len(jobs))
        jobs = [_resized(job, int(p), int(o)) for job, p, o in zip(jobs, prompts, outputs, strict=True)]
    return [_scaled(job, load.scale) for job in jobs] if load.scale != 1.0 else jobs


def _resized(job: Job, prompt: int, output: int) -> Job:
    return job._replace(prompt_length=prompt, output_length=output, block=prompt)


def _scaled(job: Job, scale: float) -> Job:
    """Lengths times `scale`. Blocks that prompts share shrink with them, so that as large a share is common."""
    block = max(1, round(job.block * scale))
    prompt = min(max(1, round(job.prompt_length * scale)), block * len(job.blocks))
    return job._replace(prompt_length=prompt, output_length=max(1, round(job.output_length * scale)), block=block)


def prompts_of(jobs: Sequence[Job], vocab: int, seed: int) -> Iterator[list[int]]:
    """Each job's prompt: random token ids below `vocab`, equal where blocks are equal."""
    for job in jobs:
        parts = [np.random.default_rng((seed, id % 2**63)).integers(FIRST_TOKEN, vocab, job.block) for id in job.blocks]
        yield np.concatenate(parts)[: job.prompt_length].tolist()
