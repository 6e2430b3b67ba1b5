"""Phases in which requests come when they are due: latency with room for all, promises where there is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from plan import Bench
from servers import moved

from superinfer.bench.load_report import columns, report
from superinfer.bench.openai_stream import Sample
from superinfer.bench.workload import Load, Span, make_load
from superinfer.runtime.sim.workload import Job

QUIET_S = 0.5  # a first token within this: what was given up before is gone
SETTLE_S = 15.0
AROUND_S = 3.0  # making prompts, settling


def online(bench: Bench, only: Sequence[float] = ()) -> dict[str, Any]:
    """Azure's conversation lengths, Poisson arrivals, a pool that does not bind. only: of the plan's rates."""
    return _rates(bench, bench.plan.online_rates, only, bench.plan.online_s, 40_000)


def slo(bench: Bench, only: Sequence[float] = ()) -> dict[str, Any]:
    """The same with a pool that binds. What is not finished `drain_s` after the last arrival is given up: it failed."""
    return _rates(bench, bench.plan.slo_rates, only, bench.plan.slo_s, 50_000)


def _rates(bench: Bench, rates: Sequence[float], only: Sequence[float], duration: float, seed: int) -> dict[str, Any]:
    """One after another, the ones that time allows."""
    runs, left_out = [], []
    for rate in [rate for rate in rates if rate in only] or rates:
        if bench.left_s() < duration + bench.plan.drain_s + AROUND_S:
            left_out.append(rate)
            bench.say(f"{rate:g}/s left out: {bench.left_s():.0f} s are left")
            continue
        runs.append(_at_rate(bench, rate, duration, seed))
    return {"runs": runs, "rates_left_out": left_out}


def _at_rate(bench: Bench, rate: float, duration: float, seed: int) -> dict[str, Any]:
    plan = bench.plan
    load = Load(
        workload="azure",
        trace=plan.azure,
        prompt_tokens=Span(1, 1),
        output_tokens=Span(1, 1),
        scale=plan.scale,
        arrivals="poisson",
        duration=duration,
        seed=plan.seed,
        slos=((1.0, plan.slo),),
    )
    jobs = fitting(make_load(load, rate), bench)
    before = bench.server.counters()
    # Prompts of their own for each rate: no run finds another's in a cache.
    outcome = bench.run(jobs, plan.seed + seed + round(10 * rate), drain_s=plan.drain_s, window_s=duration)
    found = report(outcome.samples, outcome.delay)
    counted = moved(before, bench.server.counters())
    settled = settle(bench)
    steady = (outcome.window_tokens or 0) / duration
    ttft, tpot = found.ttft, found.tpot
    warning = f"; {found.client_warning}" if found.client_warning else ""
    bench.say(
        f"{rate:g}/s: TTFT p50 {_ms(ttft, 'p50')}, p99 {_ms(ttft, 'p99')}, met {_share(found.attainment.ttft_met)}; "
        f"timeline met {_share(found.attainment.met)}; TPOT p50 {_ms(tpot, 'p50')}; "
        f"{steady:,.0f} tokens/s in the window; {found.failed} given up{warning}"
    )
    return {
        "rate": rate,
        "duration_s": duration,
        "jobs": len(jobs),
        "window_tokens_per_s": steady,
        "report": msgspec.to_builtins(found),
        "counters": counted,
        "settled_s": settled,
        "samples": raw(outcome.samples),
    }


def raw(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The raw samples of a run, to a tenth of a millisecond, kinds of failures and lateness as numbers of a list: files
    that go into a repository."""
    found = columns(samples)
    kept: dict[str, list[Any]] = {}
    for name in ("due", "ttft", "e2e", "tpot", "max_tbt"):
        kept[name] = [None if value is None else round(value, 4) for value in found[name]]
    kept |= {name: found[name] for name in ("prompt_tokens", "output_tokens")}
    for name in ("met", "ttft_met"):
        kept[name] = [None if value is None else int(value) for value in found[name]]
    for name in ("why", "error"):
        kinds = sorted(set(found[name]))
        kept[f"{name}_kinds"], kept[name] = kinds, [kinds.index(kind) for kind in found[name]]
    return kept


def fitting(jobs: Sequence[Job], bench: Bench) -> list[Job]:
    """Those that the server's context holds; the same for all arms, as all have the same context."""
    room = bench.described.max_model_len or 1 << 30
    return [job for job in jobs if job.prompt_length + job.output_length <= room]


def settle(bench: Bench) -> float:
    """Wait until a small request is answered at once: what clients gave up is no longer computed. Returns seconds."""
    began = time.perf_counter()
    for number in range(100):
        outcome = bench.run([Job(0.0, 8, 1, (-1,), 8)], 90_000 + number, drain_s=SETTLE_S)
        first = outcome.samples[0].timeline.first
        if (first is not None and first < QUIET_S) or time.perf_counter() - began > SETTLE_S:
            break
    return time.perf_counter() - began


def _ms(spread: Any, which: str) -> str:
    return "none" if spread is None else f"{getattr(spread, which) * 1e3:,.0f} ms"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"
