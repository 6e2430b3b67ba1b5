"""What arrives, and when: lengths from published statistics, and real traces. Seeded; no text, only tokens."""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from superinfer.errors import InvalidRequestError
from superinfer.runtime.slo import SLO

MOONCAKE_BLOCK = 512  # tokens for each of a Mooncake trace's hash ids
MOST_JOBS = 10_000_000  # of one run: hours of simulating, and some GB


class Job(NamedTuple):
    """One request. at: seconds after the start. Lengths in tokens.

    blocks: one id for each `block` tokens of the prompt; prompts share the prefix over which their ids are equal.
    answer: the id of every token that it is answered with. filled: what blocks hold whose tokens are not all their id.
    max_tokens: what the request asks for; if that is more than `output_length`, nobody knows when the answer will end.
    """

    at: float
    prompt_length: int
    output_length: int
    blocks: tuple[int, ...]
    block: int
    slo: SLO | None = None
    answer: int = 0
    filled: Mapping[int, Iterable[int]] | None = None
    max_tokens: int = 0

    @property
    def ends_early(self) -> bool:
        """Whether the answer is shorter than the request lets it be."""
        return self.max_tokens > self.output_length

    def prompt(self) -> list[int]:
        """Token ids: every token of a block is the block's id unless it is `filled`, so equal ids are equal tokens."""
        tokens: list[int] = []
        filled = self.filled or {}
        for id in self.blocks:
            tokens += filled.get(id) or [id] * self.block
        return tokens[: self.prompt_length]


class Lengths(NamedTuple):
    """Mean and standard deviation of prompt and output lengths, tokens."""

    prompt_mean: float
    prompt_std: float
    output_mean: float
    output_std: float


# Zhu et al., NanoFlow: Towards Optimal Large Language Model Serving Throughput (arXiv 2408.12757), table 4.
PUBLISHED = {
    "sharegpt": Lengths(246, 547, 322, 244),
    "lmsys": Lengths(102, 169, 222, 210),
}
WORKLOADS = (*PUBLISHED, "azure", "mooncake")


class _Shape(NamedTuple):
    """One request of a trace, before it has a time of our own. at: seconds after the trace's first; nan: no time."""

    at: float
    prompt_length: int
    output_length: int
    blocks: tuple[int, ...] = ()


def make_jobs(
    workload: str,
    *,
    rate: float,
    duration: float,
    seed: int,
    trace: Path | None = None,
    arrivals: str = "poisson",
    slos: Sequence[tuple[float, SLO]] = (),
    turns: bool = False,
    max_tokens: int = 0,
) -> list[Job]:
    """Jobs of `duration` seconds at `rate` a second, in order of arrival. The same seed gives the same jobs.

    workload: one of WORKLOADS. "azure" and "mooncake" need their `trace` file. Azure's lengths are drawn from the
        trace without order; Mooncake's keep theirs, from a random point on, as its prompts share prefixes.
    arrivals: "poisson", or "trace": the trace's own times, stretched to the rate, from a random point on.
    slos: (share, SLO) of classes that each job is drawn into; shares need not sum to 1. Empty: no SLO.
    turns: prompts have the answers in them that they follow, as `as_turns` says; "mooncake" only.
    max_tokens: what every request asks for, though its answer ends before; 0: as long as its answer is.

    Raises InvalidRequestError for an unknown workload, a missing, malformed or useless trace, a rate or duration not
    above 0, more than MOST_JOBS, and a seed or max_tokens below 0.
    """
    if turns and workload != "mooncake":
        raise InvalidRequestError(f"--turns: prompts of workload {workload!r} follow no answers; those of mooncake do")
    if not (math.isfinite(rate) and rate > 0 and math.isfinite(duration) and duration > 0):
        raise InvalidRequestError(f"rate={rate} and duration={duration} must be finite and above 0")
    if rate * duration > MOST_JOBS:
        raise InvalidRequestError(
            f"rate={rate} for duration={duration} s are {rate * duration:.3g} requests; simulate {MOST_JOBS:,} at most"
        )
    if seed < 0:
        raise InvalidRequestError(f"seed={seed} must be at least 0")
    if max_tokens < 0:
        raise InvalidRequestError(f"max_tokens={max_tokens} must be above 0, or 0 for as many as the answer has")
    if arrivals not in ("poisson", "trace"):
        raise InvalidRequestError(f"arrivals={arrivals!r} must be poisson or trace")
    rng = np.random.default_rng(seed)
    shapes = _shapes(workload, trace, rng, count=math.ceil(rate * duration * 1.5) + 50)
    if arrivals == "trace":
        shapes, times = _trace_times(workload, shapes, rate, duration, rng)
    else:
        times = np.cumsum(rng.exponential(1.0 / rate, math.ceil(rate * duration * 1.5) + 50))
        times = times[times < duration]
        shapes = _some(shapes, len(times), rng, in_order=workload == "mooncake")
    classes = _draw_classes(slos, len(times), rng)
    jobs = []
    for number, (shape, at, slo) in enumerate(zip(shapes, times, classes, strict=False)):
        # Ids of single-block prompts are negative: they share with nothing, least of all with a trace's own ids.
        blocks, block = (shape.blocks, MOONCAKE_BLOCK) if shape.blocks else ((-1 - number,), shape.prompt_length)
        jobs.append(Job(float(at), shape.prompt_length, shape.output_length, blocks, block, slo, max_tokens=max_tokens))
    return as_turns(jobs) if turns else jobs


def as_turns(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, given in order of arrival, with answers of their own; where one is the next turn of another, its prompt
    has that one's whole prompt and answer in it.

    A trace tells of whole blocks only: not whether what stands behind the last one of a prompt, and the answer, are in
    a later prompt that begins with the same blocks. They are taken to be, if these are two at least (the first of
    Mooncake's is the same in most prompts) and half of the later one. What a block holds is settled by the first prompt
    that has it: equal ids stay equal tokens.
    """
    asked: dict[int, Job] = {}  # the last that arrived, by the last whole block of its prompt
    filled: dict[int, array[int]] = {}
    settled: set[int] = set()
    found = []
    for number, job in enumerate(jobs):
        job = job._replace(answer=-1 - number, filled=filled)
        size, known = job.block, array("i", _before(job, asked))
        for at, id in enumerate(job.blocks):
            if id not in settled and (part := known[at * size : (at + 1) * size]):
                filled[id] = part + array("i", [id]) * (size - len(part))
        settled.update(job.blocks)
        if job.prompt_length >= size:
            asked[job.blocks[job.prompt_length // size - 1]] = job
        found.append(job)
    return found


def _before(job: Job, asked: Mapping[int, Job]) -> list[int]:
    """Prompt and answer of the turn before; nothing where it is a first one."""
    for whole in range(job.prompt_length // job.block, max(2, math.ceil(len(job.blocks) / 2)) - 1, -1):
        last = asked.get(job.blocks[whole - 1])
        if last is not None and last.prompt_length + last.output_length <= job.prompt_length:
            return last.prompt() + [last.answer] * last.output_length
    return []


def _shapes(workload: str, trace: Path | None, rng: np.random.Generator, count: int) -> list[_Shape]:
    if workload in PUBLISHED:
        if trace is not None:
            raise InvalidRequestError(f"workload {workload!r} reads no trace; with --trace give azure or mooncake")
        given = PUBLISHED[workload]
        prompts = lognormal(rng, given.prompt_mean, given.prompt_std, count)
        outputs = lognormal(rng, given.output_mean, given.output_std, count)
        return [_Shape(math.nan, int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]
    if workload not in WORKLOADS:
        raise InvalidRequestError(f"workload {workload!r} is unknown; choose one of {', '.join(WORKLOADS)}")
    if trace is None:
        raise InvalidRequestError(f"workload {workload!r} is read from a file; give it with --trace FILE")
    try:
        return read_azure(trace) if workload == "azure" else read_mooncake(trace)
    except OSError as error:
        raise InvalidRequestError(f"the trace {str(trace)!r} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequestError(f"the trace {str(trace)!r} is no text of a trace ({error})") from None


def lognormal(rng: np.random.Generator, mean: float, std: float, count: int) -> np.ndarray:
    """`count` lengths of a lognormal distribution with this mean and standard deviation, at least 1, rounded."""
    variance = math.log(1.0 + (std / mean) ** 2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    return np.maximum(1, np.rint(drawn)).astype(int)


def read_azure(path: Path) -> list[_Shape]:
    """The Azure LLM inference trace (Patel et al., Splitwise, ISCA 2024): TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise InvalidRequestError(f"the trace {str(path)!r} is empty")
    try:
        start = datetime.fromisoformat(rows[0]["TIMESTAMP"][:26])
        return [
            _Shape(
                (datetime.fromisoformat(row["TIMESTAMP"][:26]) - start).total_seconds(),
                max(1, int(row["ContextTokens"])),
                max(1, int(row["GeneratedTokens"])),
            )
            for row in rows
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"{str(path)!r} is not an Azure trace of TIMESTAMP, ContextTokens, GeneratedTokens ({error!r})"
        ) from None


def read_mooncake(path: Path) -> list[_Shape]:
    """A Mooncake trace (Qin et al., FAST 2025): JSON lines of timestamp (ms), input_length, output_length, hash_ids."""
    shapes = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                blocks = tuple(int(id) for id in row["hash_ids"])
                shape = _Shape(
                    row["timestamp"] / 1000, int(row["input_length"]), max(1, int(row["output_length"])), blocks
                )
                if not 0 < shape.prompt_length <= len(blocks) * MOONCAKE_BLOCK:
                    raise ValueError(f"{len(blocks)} hash_ids for {shape.prompt_length} tokens")
                if not math.isfinite(shape.at):
                    raise ValueError(f"timestamp {row['timestamp']}")
            except (KeyError, ValueError, TypeError) as error:
                raise InvalidRequestError(
                    f"{str(path)!r} line {number} is not of a Mooncake trace ({error!r})"
                ) from None
            shapes.append(shape)
    if not shapes:
        raise InvalidRequestError(f"the trace {str(path)!r} is empty")
    return shapes


def _some(shapes: list[_Shape], count: int, rng: np.random.Generator, in_order: bool) -> list[_Shape]:
    """`count` of the shapes, again from the first when there are too few."""
    start = int(rng.integers(len(shapes)))
    order = (start + np.arange(len(shapes))) % len(shapes) if in_order else rng.permutation(len(shapes))
    return [shapes[order[at % len(order)]] for at in range(count)]


def _trace_times(
    workload: str, shapes: list[_Shape], rate: float, duration: float, rng: np.random.Generator
) -> tuple[list[_Shape], np.ndarray]:
    if math.isnan(shapes[0].at):
        raise InvalidRequestError(f"workload {workload!r} has no times of its own; use --arrivals poisson")
    times = np.array([shape.at for shape in shapes])
    if (np.diff(times) < 0).any():
        early = int(np.argmax(np.diff(times) < 0)) + 2
        raise InvalidRequestError(f"request {early} of the trace came before the one above it; sort it by time")
    span = times[-1] - times[0]
    if span <= 0:
        raise InvalidRequestError("all requests of the trace arrive at once; use --arrivals poisson")
    times = (times - times[0]) * (len(times) / span / rate)
    if times[-1] < duration:
        raise InvalidRequestError(
            f"at {rate} requests/s the trace lasts {times[-1]:.0f} s, less than duration={duration}; shorten it"
        )
    start = float(rng.uniform(0.0, times[-1] - duration))
    first, last = np.searchsorted(times, (start, start + duration))
    return shapes[first:last], times[first:last] - start


def _draw_classes(slos: Sequence[tuple[float, SLO]], count: int, rng: np.random.Generator) -> list[SLO | None]:
    if not slos:
        return [None] * count
    shares = np.array([share for share, _ in slos])
    drawn = rng.choice(len(slos), size=count, p=shares / shares.sum())
    return [slos[at][1] for at in drawn]
