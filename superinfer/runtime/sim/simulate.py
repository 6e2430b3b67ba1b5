"""Discrete events around the real scheduler and KV bookkeeping: only the clock and the device are simulated."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.runtime.collector import spared_collector
from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.engine.plan_timing import PlanTiming
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.kv.link import VirtualLink
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import Scheduler, SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepLoad, StepRates
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.rota import Rota
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate
from superinfer.runtime.sim.executor import END_TOKEN, NO_QUIRKS, Quirks, SimExecutor
from superinfer.runtime.sim.hardware import HardwareProfile
from superinfer.runtime.sim.result import Movement, Passed, Quantiles, Residency, SimResult
from superinfer.runtime.sim.shapes import ModelShape
from superinfer.runtime.sim.workload import Job
from superinfer.runtime.slo import SLO

IGNORE_EOS = SamplingParams(ignore_eos=True)
KV_SHARE = 0.9  # of device memory, for weights, KV and what a step needs beside
SAMPLE_S = 0.5
STEP_BYTES = 4e9  # activations, workspaces and the CUDA context, bytes


class HostTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds for which the engine's thread is busy with a step.

    plan_s: planning it; plan_chunks_s: more, where it has prefill chunks. decodes_s, chunks_s: submitting it, without
        and with chunks, until the device begins.
    eager_s: launching the rest of one with more tokens than graphs take (`StepRates.captured`), while the device works.
    commit_s: taking in what came of it, and telling it.
    in_steps: what the device waits for while a step is launched is in the times of steps already, as it is in those
        that a `CudaExecutor` tells: a step begins when it is planned, and submitting it keeps the host alone.
    """

    plan_s: float = 0.0
    plan_chunks_s: float = 0.0
    decodes_s: float = 0.0
    chunks_s: float = 0.0
    eager_s: float = 0.0
    commit_s: float = 0.0
    in_steps: bool = False


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated engine. Defaults of the batch are vLLM's for a server on an H100-class GPU (8,192 and 1,024).

    kv_tokens: size of the KV pool; None: what the weights leave. dram_tokens: of a second tier behind the profile's
    link; 0: none. prefix_aware: whether policy "rota" decides by what of a prompt is cached; off only to measure what
    that is worth. depth: steps planned ahead of the results, as in the engine: 1 waits for each.
    plan_late: with depth 2, a step is planned just before the one before it ends (`EngineConfig.plan_late`), else as
        soon as that begins. host: what steps cost the host; what it takes here is measured, and not simulated.
    quirks: what the profile does not say of steps, of which the scheduler is not told.
    spread: standard deviation of a step's time, as a share of what it is to take, of which the scheduler is not told.
        spread_seed: of its draws.
    way_s: from the client to the engine. None: a request arrives when its client sends it. Else it arrives when the
        engine, between two steps, comes to read it, `way_s` after it was sent at the earliest; as far as the engine can
        tell it came when messages were read before.
    give_up_s: seconds after the last request was sent, when all that are left are given up. None: never.
    leave_at: seconds, in order, when the clients of all that are under way leave, while others still come.
    paces: (seconds, factor), in order: from then on steps take so many times as long as the profile says, of which the
        scheduler is told nothing.
    """

    policy: str = "fcfs"
    kv_tokens: int | None = None
    dram_tokens: int = 0
    page_size: int = 16
    max_batch_size: int = 1024
    max_batch_tokens: int = 8192
    max_model_len: int = 131072
    prefix_cache: bool = True
    prefix_aware: bool = True
    depth: int = 1
    plan_late: bool = False
    host: HostTimes = HostTimes()
    quirks: Quirks = NO_QUIRKS
    spread: float = 0.0
    spread_seed: int = 0
    way_s: float | None = None
    give_up_s: float | None = None
    leave_at: tuple[float, ...] = ()
    paces: tuple[tuple[float, float], ...] = ()


def simulate(
    jobs: Many[Job],
    profile: HardwareProfile,
    shape: ModelShape,
    config: SimConfig,
    on_end: Callable[[Sequence], None] | None = None,
    believed: HardwareProfile | None = None,
) -> SimResult:
    """Run the jobs to their end. on_end: told of each sequence that ended; its id is its place in `jobs`.

    believed: what the scheduler expects of the machine before it has seen a step; None: what it is.
    Raises InvalidRequestError if the model does not fit the machine, for an unknown policy, and for pools and batches
    without room for anything.
    """
    for name in ("max_batch_size", "max_batch_tokens"):
        if getattr(config, name) < 1:
            raise InvalidRequestError(f"{name}={getattr(config, name)} must be at least 1")
    rates = StepRates.seed(profile, shape)
    kv_tokens = config.kv_tokens if config.kv_tokens is not None else kv_room(profile, shape)
    num_blocks = kv_tokens // config.page_size
    if num_blocks < 1:
        raise InvalidRequestError(f"kv_tokens={kv_tokens} is less than one block of {config.page_size} tokens")
    limits = ExecutorLimits(
        num_blocks=num_blocks,
        page_size=config.page_size,
        num_slots=config.max_batch_size,
        max_model_len=min(config.max_model_len, num_blocks * config.page_size),
        vocab_size=shape.vocab,
    )
    tier = _tier(config, profile, shape)
    kv = build_cache(
        num_blocks,
        tier.num_blocks if tier else 0,
        config.page_size,
        prefix_cache=config.prefix_cache,
        link=tier.link if tier else None,
    )
    batch = SchedulerLimits(limits.num_slots, config.max_batch_tokens, limits.max_model_len)
    expected = StepCost(StepRates.seed(believed, shape) if believed is not None else rates)
    scheduler = build_scheduler(config.policy, kv, batch, expected)
    if isinstance(scheduler, Rota):
        scheduler.prefix_aware = config.prefix_aware
    link = _link(profile, tier.block_bytes) if tier else None
    executor = SimExecutor(
        rates, limits, depth=config.depth, tier=tier, link=link, paces=config.paces, quirks=config.quirks,
        spread=config.spread, seed=config.spread_seed, answers=[job.answer for job in jobs],
        lengths=[job.output_length if job.ends_early else 0 for job in jobs],
    )  # fmt: skip
    run = _Run(scheduler, executor, StepCost(rates), config, on_end)
    with spared_collector():  # as in the engine
        started = time.perf_counter()
        run.all(jobs)
        wall_s = time.perf_counter() - started
    return run.result(config.policy, wall_s)


def _tier(config: SimConfig, profile: HardwareProfile, shape: ModelShape) -> TierLimits | None:
    if not config.dram_tokens:
        return None
    if config.dram_tokens < config.page_size:
        raise InvalidRequestError(f"dram_tokens={config.dram_tokens} is less than one block of {config.page_size}")
    block_bytes = config.page_size * shape.kv_bytes_per_token
    slower = max(1.0, (profile.link_in + profile.link_out) / profile.link_duplex)
    alone, both = (profile.link_in, profile.link_out), (profile.link_in / slower, profile.link_out / slower)
    return TierLimits(
        config.dram_tokens // config.page_size, block_bytes, LinkProfile(profile.name, block_bytes, *alone, *both)
    )


def _link(profile: HardwareProfile, block_bytes: int) -> VirtualLink:
    return VirtualLink(
        block_bytes, profile.link_in, out_bytes_per_s=profile.link_out, total_bytes_per_s=profile.link_duplex
    )


def kv_room(profile: HardwareProfile, shape: ModelShape) -> int:
    """Tokens of KV that fit beside the weights. Raises InvalidRequestError if the weights alone do not fit."""
    usable = profile.memory_bytes * KV_SHARE - STEP_BYTES
    room = usable - shape.weight_bytes
    if room < shape.kv_bytes_per_token:
        raise InvalidRequestError(
            f"{shape.name} has {shape.weight_bytes / 1e9:.0f} GB of weights, too much for the "
            f"{profile.memory_bytes / 1e9:.0f} GB of {profile.name}, of which an engine uses {usable / 1e9:.0f}; "
            f"choose other hardware or give --kv-tokens"
        )
    return int(room / shape.kv_bytes_per_token)


@dataclass
class _Tally:
    """What is recorded while a run goes on."""

    first: float | None = None
    last: float = 0.0
    refused: int = 0
    live: int = 0
    peak_live: int = 0
    steps: int = 0
    tokens: int = 0
    plan_s: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("f"))
    finished: list[Sequence] = field(default_factory=list)
    given_up: list[Sequence] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    last_token: dict[int, float] = field(default_factory=dict)
    residency: list[Residency] = field(default_factory=list)
    dram_peak: float = 0.0


class _Run:
    """One scheduler, one executor and a clock."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: SimExecutor,
        cost: StepCost,
        config: SimConfig,
        on_end: Callable[[Sequence], None] | None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._cost = cost
        self._way_s = config.way_s
        self._timing = PlanTiming(late=config.plan_late)
        self._host = config.host
        self._give_up_s = config.give_up_s
        self._leave_at = config.leave_at
        self._on_end = on_end
        self._live: dict[int, Sequence] = {}
        self._tally = _Tally()
        self._under_way = 0

    def all(self, jobs: Many[Job]) -> None:
        """The event loop: an arrival, the end of a step, the host done with something; between two, time passes and
        nothing else."""
        now, at, tally, way_s, read, slept = 0.0, 0, self._tally, self._way_s or 0.0, 0.0, False
        until = jobs[-1].at + self._give_up_s if jobs and self._give_up_s is not None else math.inf
        leaving = deque(self._leave_at)
        while True:
            while at < len(jobs) and jobs[at].at + way_s <= now:
                came = now if slept or not self._under_way else read
                self._arrive(at, jobs[at], jobs[at].at if self._way_s is None else came)
                at += 1
            read, slept = now, False
            if now >= until and at == len(jobs):
                self._give_up(now, math.inf)
            while leaving and now >= leaving[0]:
                self._give_up(now, leaving.popleft())
                tally.passed.append(self._passed())
            self._record(self._scheduler.expire(now), now)
            self._sample(now)
            if self._under_way < self._executor.depth:
                wait_s = self._timing.wait_s(now) if self._under_way else 0.0
                if wait_s:
                    now, slept = min(now + wait_s, jobs[at].at + way_s if at < len(jobs) else math.inf), True
                    continue
                planned = self._plan(now)
                if planned is not None:
                    now = planned
                    if self._under_way < self._executor.depth:
                        continue  # read what has come, then plan the next one while this one runs
            if self._under_way:
                now = self._finish_step(now)
            elif at < len(jobs):
                now = max(now, jobs[at].at + way_s)
            elif tally.live:
                raise RuntimeError(f"{tally.live} requests are left and the scheduler plans nothing")
            else:
                return

    def _passed(self) -> Passed:
        counts, tier = self._scheduler.counts(), self._executor.tier
        if counts.tiers is None or tier is None:
            return Passed(self._tally.steps, counts.preemptions, 0, 0)
        totals = counts.tiers.totals
        rotations, blocks = totals.rotations_in + totals.rotations_out, totals.blocks_in + totals.blocks_out
        return Passed(self._tally.steps, counts.preemptions, rotations, blocks * tier.block_bytes)

    def _give_up(self, now: float, before: float) -> None:
        """The clients of all that arrived before then are gone."""
        for sequence in [sequence for sequence in self._live.values() if sequence.arrival < before]:
            self._scheduler.cancel(sequence, now)
            self._tally.live -= 1
            self._ended(sequence, self._tally.given_up)

    def _ended(self, sequence: Sequence, among: list[Sequence]) -> None:
        self._live.pop(sequence.id, None)
        among.append(sequence)
        if self._on_end is not None:
            self._on_end(sequence)

    def _arrive(self, number: int, job: Job, arrival: float) -> None:
        tally = self._tally
        room = self._executor.limits.max_model_len - job.prompt_length
        if job.output_length > room:
            tally.refused += 1
            return
        if tally.first is None:
            tally.first = job.at
        tally.live += 1
        tally.peak_live = max(tally.peak_live, tally.live)
        sequence = self._live[number] = Sequence(
            id=number,
            prompt=job.prompt(),
            arrival=arrival,
            max_tokens=min(max(job.max_tokens, job.output_length), room),
            sampling=IGNORE_EOS,
            slo=job.slo,
            seed=number,
            stop_ids=(END_TOKEN,) if job.ends_early else (),
        )
        self._scheduler.add(sequence)

    def _plan(self, now: float) -> float | None:
        """Plan and submit a step. Returns when the host is done with that; None where there is nothing to compute."""
        started = time.thread_time()  # other processes of the machine are no part of it
        plan = self._scheduler.plan(now)
        self._tally.plan_s.append(time.thread_time() - started)
        if plan is None:
            return None
        host, executor = self._host, self._executor
        load = StepLoad.of(plan)
        has_chunks, is_captured = load.tokens > load.decodes, load.tokens <= executor.rates.captured
        executor.now = planned = now + host.plan_s + (host.plan_chunks_s if has_chunks else 0.0)
        launched = planned + (host.chunks_s if has_chunks else host.decodes_s)
        if not host.in_steps:
            executor.now = launched
        executor.submit(plan)
        submitted = launched + (host.eager_s if has_chunks and not is_captured else 0.0)
        self._timing.submitted(self._scheduler.expected_s(plan.step), now, submitted)
        self._under_way += 1
        return submitted

    def _finish_step(self, now: float) -> float:
        """Collect the oldest step: when it ended, or now if it was over. Returns when the host is done with it."""
        result, step = self._executor.collect(), self._executor.last
        self._under_way -= 1
        now = max(now, step.end)
        self._timing.ended(result.elapsed - result.link.stall_s, now)
        if step.load.tokens:
            self._cost.observe(step.load, step.compute_s)
            self._tally.steps += 1
        self._record(self._scheduler.commit(result, now), now)
        return now + self._host.commit_s

    def _sample(self, now: float) -> None:
        """Note who is where, every SAMPLE_S."""
        tally = self._tally
        if tally.residency and now < tally.residency[-1].at + SAMPLE_S:
            return
        counts = self._scheduler.counts()
        waiting = counts.waiting - counts.rotated
        tally.residency.append(Residency(now, counts.running, counts.rotated, waiting, tally.tokens))
        if counts.tiers is not None:
            tally.dram_peak = max(tally.dram_peak, counts.tiers.dram_pinned / counts.tiers.dram_total)

    def _record(self, updates: Iterable[SequenceUpdate], now: float) -> None:
        tally = self._tally
        for update in updates:
            sequence, reason = update.sequence, update.finish_reason
            if update.token_ids:
                tally.tokens += 1
                before = tally.last_token.get(sequence.id)
                if before is not None:
                    tally.gaps.append(now - before)
                tally.last_token[sequence.id] = tally.last = now
            if reason is not None:
                tally.live -= 1
                tally.last_token.pop(sequence.id, None)
                self._ended(sequence, tally.finished)

    def result(self, policy: str, wall_s: float) -> SimResult:
        """Sum up."""
        tally = self._tally
        done = tally.finished
        ttft = [s.timeline.first for s in done if s.timeline.first is not None]
        spans = [(s.timeline.first, s.timeline.last, s.timeline.count) for s in done]
        tpot = [(b - a) / (n - 1) for a, b, n in spans if a is not None and b is not None and n > 1]
        duration = max(tally.last - (tally.first or 0.0), 1e-9)
        met, ttft_met, by_class = _attainment(done, tally.given_up)
        prompt_tokens = sum(s.num_prompt for s in done)
        return SimResult(
            policy=policy,
            requests=len(done),
            refused=tally.refused,
            duration=duration,
            ttft=Quantiles.of(ttft),
            tbt=Quantiles.of(tally.gaps),
            tpot=Quantiles.of(tpot),
            ttft_met=ttft_met,
            met=met,
            met_by_class=by_class,
            within_1s=_share([t <= 1.0 for t in ttft]),
            within_5s=_share([t <= 5.0 for t in ttft]),
            goodput=(met or 0.0) * sum(map(_promises, [*done, *tally.given_up])) / duration,
            tokens_per_s=tally.tokens / duration,
            preemptions=self._scheduler.counts().preemptions,
            steps=tally.steps,
            cached=sum(s.cached for s in done) / max(1, prompt_tokens),
            peak_live=tally.peak_live,
            plan_ms=Quantiles.of([seconds * 1e3 for seconds in tally.plan_s]),
            plan_ms_max=max(tally.plan_s, default=0.0) * 1e3,
            wall_s=wall_s,
            requests_per_wall_s=len(done) / max(wall_s, 1e-9),
            cost_error=self._cost.error(),
            moved=self._movement(duration),
            residency=tally.residency,
            given_up=len(tally.given_up),
            passed=tally.passed,
        )

    def _movement(self, duration: float) -> Movement | None:
        tiers, tier = self._scheduler.counts().tiers, self._executor.tier
        if tiers is None or tier is None:
            return None
        totals, link = tiers.totals, tiers.link
        bytes_in, bytes_out = totals.blocks_in * tier.block_bytes, totals.blocks_out * tier.block_bytes
        return Movement(
            rotations_out=totals.rotations_out,
            rotations_in=totals.rotations_in,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            mirrored=totals.mirrored * tier.block_bytes,
            gbps_in=bytes_in / duration / 1e9,
            gbps_out=bytes_out / duration / 1e9,
            busy_in=link.in_s / duration,
            busy_out=link.out_s / duration,
            busy_both=link.both_s / duration,
            stall_share=link.stall_s / duration,
            dram_peak=self._tally.dram_peak,
            dram_hits=totals.hits,
        )


def _promises(sequence: Sequence) -> bool:
    return sequence.slo is not None and sequence.slo.promises_anything


def _share(kept: Many[bool]) -> float:
    return sum(kept) / len(kept) if kept else float("nan")


def _attainment(done: Many[Sequence], given_up: Many[Sequence]) -> tuple[float | None, float | None, dict[str, float]]:
    """Shares with everything met and with the first token in time, and the former by class, of those that promised."""
    kept: dict[SLO | None, list[bool]] = {}
    ttft = []
    for sequence in filter(_promises, done):
        assert sequence.finished_at is not None
        verdict = sequence.timeline.verdict(sequence.finished_at - sequence.arrival)
        kept.setdefault(sequence.slo, []).append(verdict.met)
        if sequence.slo is not None and sequence.slo.ttft is not None:
            ttft.append(verdict.ttft_met)
    for sequence in filter(_promises, given_up):
        kept.setdefault(sequence.slo, []).append(False)
        if sequence.slo is not None and sequence.slo.ttft is not None:
            first = sequence.timeline.first
            ttft.append(first is not None and first <= sequence.slo.ttft)
    if not kept:
        return None, None, {}
    by_class = {msgspec.json.encode(slo).decode(): _share(values) for slo, values in kept.items()}
    everything = [met for values in kept.values() for met in values]
    return _share(everything), _share(ttft) if ttft else None, by_class
