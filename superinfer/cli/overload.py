"""The demo's point: one overload, run twice on two-tier engines that differ in their policy alone.

More requests arrive than the HBM pool holds. They are promised a pace that the machine can keep up for all of them, but
only if they take turns in memory. How long a token takes is measured first, so it is the same overload on any machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import Progress, launch_engine
from superinfer.runtime.protocol import Generate, ModelInfo, SamplingParams, StatsReport
from superinfer.runtime.slo import SLO, TokenTimeline, Verdict

BASELINE = "fcfs"
REQUESTS, RESIDENT = 40, 10  # how many come, and how many of them the HBM pool holds
# An output is half its prompt: a request that is let in with its prompt has most of its KV.
PROMPT_TOKENS = 48, 512  # of a prompt, at least and at most; between them as the length of the run asks
TTFT_SHARE, WHOLE_SHARE = 0.25, 1.3  # of the whole run: when the first token is due, and the last
WINDOW_SHARE = 0.25  # of it: how long requests keep arriving
LINK_GBPS = 0.5  # between the tiers, each way: a request of 300 tokens of the embedded model takes 5 ms
SEED = 7
LOOK_EVERY_S = 0.1
MEASURED_PROMPT, MEASURED_OUTPUT = 96, 32  # tokens of the requests that the speed is measured by


@dataclass(frozen=True)
class Speed:
    """What this machine takes, seconds: for a prompt token, and for a decode step of RESIDENT requests, and of one."""

    prefill_s: float
    step_s: float
    alone_s: float


@dataclass(frozen=True)
class Ask:
    """One request. at: seconds after the start."""

    at: float
    prompt: list[int]
    output: int


@dataclass(frozen=True)
class Overload:
    """The load, the promise, and the pools it is too much for. seconds: all its work, at this machine's speed."""

    speed: Speed

    asks: tuple[Ask, ...]
    slo: SLO
    kv_tokens: int
    dram_tokens: int
    seconds: float


@dataclass(frozen=True)
class Glance:
    """How a run stands: requests by where they are, promises kept and broken so far."""

    elapsed_s: float
    waiting: int
    computing: int
    in_host_memory: int
    finished: int
    kept: int
    broken: int
    total: int


@dataclass
class Outcome:
    """What came of one request. stages: (name, begin, end), seconds after the run's start, from the engine's trace."""

    ask: Ask
    timeline: TokenTimeline
    finished: float | None = None
    stages: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """Of a finished one."""
        assert self.finished is not None, "it has not finished"
        return self.timeline.verdict(self.finished)

    def broken(self, now: float) -> bool:
        """Whether its promise cannot be kept any more, `now` seconds after the run's start."""
        since = now - self.ask.at
        if self.finished is not None:
            return not self.verdict.met
        return since > 0 and (self.timeline.due(self.timeline.count) < since or not self.timeline.verdict(since).met)


@dataclass(frozen=True)
class PolicyRun:
    """One of the two runs. seconds: until the last token. alone_s: as in Speed, measured after it."""

    policy: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    rotations: int
    alone_s: float

    @property
    def ttft_kept(self) -> float:
        """Share of requests whose first token came in time."""
        return sum(outcome.verdict.ttft_met for outcome in self.outcomes) / len(self.outcomes)

    @property
    def kept(self) -> float:
        """Share of requests with every token in time."""
        return sum(outcome.verdict.met for outcome in self.outcomes) / len(self.outcomes)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens, over the run."""
        return sum(outcome.timeline.count for outcome in self.outcomes) / self.seconds

    def ttft(self) -> list[float]:
        """Seconds to each first token."""
        return [outcome.timeline.first for outcome in self.outcomes if outcome.timeline.first is not None]


async def measure_speed(address: str) -> tuple[Speed, ModelInfo]:
    """Of the engine at `address`, which should have nothing else to do; and what it is."""
    rng = random.Random(SEED)
    async with await AsyncEngineClient.connect(address, name="demo") as client:
        vocab = client.info.vocab_size
        await _times(client, _prompt(rng, 16, vocab), 4)  # warm up
        began = time.perf_counter()
        first = (await _times(client, _prompt(rng, MEASURED_PROMPT, vocab), 1))[0]
        prefill_s = (first - began) / MEASURED_PROMPT
        prompts = [_prompt(rng, MEASURED_PROMPT, vocab) for _ in range(RESIDENT)]
        arrivals = await asyncio.gather(*[_times(client, prompt, MEASURED_OUTPUT) for prompt in prompts])
        alone_s = await _alone(client)
    begin = max(times[0] for times in arrivals)
    gaps = [b - a for times in arrivals for a, b in itertools.pairwise(times) if a >= begin]
    return Speed(prefill_s, statistics.median(gaps), alone_s), client.info


async def _alone(client: AsyncEngineClient) -> float:
    """Seconds of a decode step of one request, while the engine has no other."""
    times = await _times(client, _prompt(random.Random(SEED + 2), 16, client.info.vocab_size), MEASURED_OUTPUT)
    return statistics.median(b - a for a, b in itertools.pairwise(times))


async def _times(client: AsyncEngineClient, prompt: list[int], output: int) -> list[float]:
    sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    request = Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling)
    return [time.perf_counter() async for delta in client.generate(request) for _ in delta.token_ids]


def _prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(10, vocab) for _ in range(length)]


def plan_overload(speed: Speed, vocab: int, *, seconds: float, page_size: int, max_model_len: int) -> Overload:
    """An overload of about `seconds` of work at this speed, the same for the same arguments."""
    rng = random.Random(SEED)
    request_token_s = speed.prefill_s + speed.step_s / RESIDENT / 2  # for each token of a prompt, its output included
    least, most = PROMPT_TOKENS
    prompt = max(least, min(most, int(seconds / (REQUESTS * request_token_s)), max_model_len // 2))
    output = prompt // 2
    whole_s = REQUESTS * prompt * request_token_s
    times = sorted(rng.uniform(0.0, WINDOW_SHARE * whole_s) for _ in range(REQUESTS))
    asks = tuple(Ask(at, _prompt(rng, prompt, vocab), round(output * rng.uniform(0.7, 1.3))) for at in times)
    ttft = TTFT_SHARE * whole_s
    longest = max(len(ask.prompt) + ask.output for ask in asks)
    kv_tokens = max(RESIDENT * (prompt + output), longest + page_size) // page_size * page_size
    return Overload(
        speed=speed,
        asks=asks,
        slo=SLO(ttft=ttft, tbt=(WHOLE_SHARE * whole_s - ttft) / output),
        kv_tokens=kv_tokens,
        dram_tokens=2 * REQUESTS * longest // page_size * page_size,
        seconds=whole_s,
    )


def run_policy(
    config: EngineConfig,
    overload: Overload,
    policy: str,
    on_glance: Callable[[Glance], None],
    on_start: Progress | None = None,
) -> PolicyRun:
    """The overload on an engine of its own. Raises what starting the engine raises."""
    with tempfile.TemporaryDirectory(prefix="superinfer-demo-") as folder:
        trace = Path(folder) / "trace.json"
        settings = msgspec.structs.replace(
            config,
            policy=policy,
            kv_tokens=overload.kv_tokens,
            dram_tokens=overload.dram_tokens,
            link_gbps=LINK_GBPS,
            max_batch_size=max(config.max_batch_size, REQUESTS),
            max_batch_tokens=max(config.max_batch_tokens, REQUESTS),
            trace=str(trace),
        )
        with launch_engine(settings, on_progress=on_start) as engine:
            outcomes, rotations, alone_s = asyncio.run(_play(engine.address, overload, on_glance))
        _add_stages(outcomes, trace)
    last = max(outcome.ask.at + (outcome.timeline.last or 0.0) for outcome in outcomes)
    return PolicyRun(policy, tuple(outcomes), last, rotations, alone_s)


async def _play(
    address: str, overload: Overload, on_glance: Callable[[Glance], None]
) -> tuple[list[Outcome], int, float]:
    outcomes = [Outcome(ask, TokenTimeline(overload.slo)) for ask in overload.asks]
    async with await AsyncEngineClient.connect(address, name="demo") as client:
        await _times(client, _prompt(random.Random(SEED + 1), 16, client.info.vocab_size), 4)  # warm up
        start = time.perf_counter()
        tasks = [asyncio.create_task(_one(client, outcome, start)) for outcome in outcomes]
        try:
            while not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=LOOK_EVERY_S, return_when=asyncio.ALL_COMPLETED)
                on_glance(_glance(outcomes, await client.stats(), time.perf_counter() - start))
        finally:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks)
        tiers = (await client.stats()).tiers
        alone_s = await _alone(client)
    return outcomes, tiers.rotations_out if tiers is not None else 0, alone_s


async def _one(client: AsyncEngineClient, outcome: Outcome, start: float) -> None:
    ask = outcome.ask
    await asyncio.sleep(max(0.0, start + ask.at - time.perf_counter()))
    sampling = SamplingParams(max_tokens=ask.output, temperature=0, ignore_eos=True)
    request = Generate(request_id=new_request_id(), prompt=ask.prompt, sampling=sampling, slo=outcome.timeline.slo)
    async for delta in client.generate(request):
        outcome.timeline.tokens(len(delta.token_ids), time.perf_counter() - start - ask.at)
    outcome.finished = time.perf_counter() - start - ask.at


def _glance(outcomes: list[Outcome], stats: StatsReport, elapsed_s: float) -> Glance:
    tiers = stats.tiers
    in_host = tiers.rotations_out - tiers.rotations_in if tiers is not None else 0
    finished = [outcome for outcome in outcomes if outcome.finished is not None]
    broken = sum(outcome.broken(elapsed_s) for outcome in outcomes)
    kept = sum(not outcome.broken(elapsed_s) for outcome in finished)
    return Glance(
        elapsed_s=elapsed_s,
        waiting=max(0, stats.waiting - in_host),
        computing=stats.running,
        in_host_memory=in_host,
        finished=len(finished),
        kept=kept,
        broken=broken,
        total=len(outcomes),
    )


def _add_stages(outcomes: list[Outcome], trace: Path) -> None:
    """Each request's stages as the engine drew them. Requests reach the engine in the order in which they were sent:
    one before these, to warm up, and one after them."""
    events = [event for event in json.loads(trace.read_text()) if event.get("cat") == "request"]
    ids = sorted({event["id"] for event in events})[1:-1]
    by_id = dict(zip(ids, outcomes, strict=True))
    first = min(event["ts"] for event in events if event["id"] in by_id)
    origin = first / 1e6 - outcomes[0].ask.at
    begun: dict[int, float] = {}
    for event in events:
        outcome = by_id.get(event["id"])
        if outcome is None or event["name"].startswith("request "):
            continue
        at = event["ts"] / 1e6 - origin
        if event["ph"] == "b":
            begun[event["id"]] = at
        else:
            outcome.stages.append((event["name"], begun[event["id"]], at))
