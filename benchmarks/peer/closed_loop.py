"""Phases that send everything at once: TPOT by batch, prefill throughput, offline throughput."""

from __future__ import annotations

import statistics
from itertools import accumulate
from typing import Any

import numpy as np
from clients import Outcome
from plan import Bench, check, closed

from superinfer.bench.openai_stream import Sample
from superinfer.runtime.sim.workload import Job

SHORT = 40  # tokens: more steps than the batch's prefill takes, so that all decode together at the end of a short run


def tpot(bench: Bench) -> dict[str, Any]:
    """Time per output token by batch size, found in two ways.

    streamed: as a client sees it, in the stretch in which all requests of the batch decode; servers and clients pay for
    every token's event. steps: without streams, the additional time of longer answers over their additional tokens;
    what is left is the engine's own.
    """
    plan, rows = bench.plan, []
    long = plan.output
    short = min(SHORT, long // 4)
    for batch in plan.batches:
        rounds = []
        for number in range(plan.rounds):
            seed = plan.seed + 10_000 + 100 * batch + 10 * number
            streamed = bench.run(closed(batch, plan.prompt, long), seed)
            check(streamed)
            times = {}
            for at, length in enumerate((short, long)):
                whole = bench.run(closed(batch, plan.prompt, length), seed + 1 + at, stream=False)
                check(whole)
                times[length] = _last(whole)
            one = _together(streamed.samples)
            one["steps_ms"] = (times[long] - times[short]) / (long - short) * 1e3
            one["client"] = streamed.client()
            rounds.append(one)
        found = {
            name: statistics.median(one[name] for one in rounds if one[name] is not None)
            for name in ("streamed_ms", "steps_ms")
            if any(one[name] is not None for one in rounds)
        }
        rows.append({"batch": batch, **found, "rounds": rounds})
        bench.say(
            f"TPOT at batch {batch:4d}: {found['steps_ms']:7.2f} ms a step, streamed "
            f"{found.get('streamed_ms', float('nan')):7.2f} ms (clients at {rounds[-1]['client']['busiest_cpu']:.0%})"
        )
    return {"prompt_tokens": plan.prompt, "output_tokens": long, "short_output_tokens": short, "tpot": rows}


def _together(samples: list[Sample]) -> dict[str, Any]:
    """Median gap between tokens while all decode. None where they never do."""
    arrivals = []
    for sample in samples:
        first = sample.timeline.first
        assert first is not None
        arrivals.append(list(accumulate(sample.gaps, initial=first)))
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    per_chunk = sum(sample.tokens for sample in samples) / sum(len(times) for times in arrivals)
    inside = [[time for time in times if begin <= time <= end] for times in arrivals]
    tpots = [(times[-1] - times[0]) / (len(times) - 1) / per_chunk * 1e3 for times in inside if len(times) > 1]
    return {
        "streamed_ms": statistics.median(tpots) if tpots else None,
        "window_s": end - begin,
        "tokens_per_chunk": per_chunk,
        "streamed_each_ms": [round(tpot, 3) for tpot in tpots],
    }


def prefill(bench: Bench) -> dict[str, Any]:
    """Prompts at once, one token each: from the first sent to the last answered."""
    plan, rows = bench.plan, []
    for count, length in plan.prefill:
        rates = []
        for number in range(plan.prefill_rounds):
            outcome = bench.run(closed(count, length, 1), plan.seed + 20_000 + length + number, stream=False)
            check(outcome)
            rates.append(count * length / _last(outcome))
        rows.append({"prompts": count, "tokens": length, "tokens_per_s": statistics.median(rates), "rounds": rates})
        bench.say(f"prefill {count} x {length}: {rows[-1]['tokens_per_s']:,.0f} tokens/s")
    return {"prefill": rows}


def offline(bench: Bench) -> dict[str, Any]:
    """Many requests of mixed lengths at once, answers in one piece: output tokens/s from the first sent to the last."""
    plan = bench.plan
    count, low, high = plan.offline
    rng = np.random.default_rng(plan.seed)
    lengths = rng.integers(low, high + 1, (count, 2)).tolist()
    jobs = [Job(0.0, prompt, output, (-1 - at,), prompt) for at, (prompt, output) in enumerate(lengths)]
    outcome = bench.run(jobs, plan.seed + 30_000, stream=False)
    check(outcome)
    seconds, tokens = _last(outcome), sum(sample.tokens for sample in outcome.samples)
    bench.say(f"offline: {tokens / seconds:,.0f} output tokens/s, {count} requests in {seconds:.1f} s")
    return {
        "requests": count,
        "seconds": seconds,
        "output_tokens": tokens,
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "output_tokens_per_s": tokens / seconds,
        "finished_s": sorted(round(sample.finished, 3) for sample in outcome.samples if sample.finished is not None),
        "client": outcome.client(),
    }


def _last(outcome: Outcome) -> float:
    """When the last answer was there, seconds after the start."""
    return max(sample.due + sample.finished for sample in outcome.samples if sample.finished is not None)
