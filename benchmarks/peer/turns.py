"""Conversations of several turns, from the Mooncake trace: how soon a turn begins whose history was served before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import msgspec
from arms import PAGE
from open_loop import raw, settle
from plan import Bench
from servers import moved

from superinfer.bench.load_report import Spread, report
from superinfer.runtime.sim.workload import MOONCAKE_BLOCK, Job, read_mooncake


class Replay(NamedTuple):
    """jobs: turns in the trace's order. returns: of each, whether an earlier turn of its conversation is among them.

    working_set: tokens of all their different blocks. reusable: share of prompt tokens that an earlier turn had.
    """

    jobs: list[Job]
    returns: list[bool]
    working_set: int
    reusable: float


def turns(bench: Bench) -> dict[str, Any]:
    """The first conversations of several turns, as many as make `turns_set` times the pool, at the trace's times,
    compressed."""
    plan = bench.plan
    room = bench.described.max_model_len or 1 << 30
    pool = bench.blocks * PAGE
    replay = conversations(_shapes(bench), plan.turns_scale, plan.turns_set * pool, room, plan.turns_s)
    before = bench.server.counters()
    outcome = bench.run(replay.jobs, plan.seed + 60_000, drain_s=plan.drain_s, window_s=plan.turns_s)
    counted = moved(before, bench.server.counters())
    settle(bench)
    found = report(outcome.samples, outcome.delay)
    first = [sample.timeline.first for sample in outcome.samples]
    back = [t for t, again in zip(first, replay.returns, strict=True) if again and t is not None]
    new = [t for t, again in zip(first, replay.returns, strict=True) if not again and t is not None]
    bench.say(
        f"turns: working set {replay.working_set:,} tokens on a pool of {pool:,}; TTFT p50 of returning turns "
        f"{_p50(back)}, of first ones {_p50(new)}, of all {_p50([*back, *new])}; {found.failed} given up"
    )
    return {
        "pool_tokens": pool,
        "working_set_tokens": replay.working_set,
        "reusable": replay.reusable,
        "turns": len(replay.jobs),
        "returning": sum(replay.returns),
        "ttft_returning": msgspec.to_builtins(Spread.of(back)),
        "ttft_first": msgspec.to_builtins(Spread.of(new)),
        "report": msgspec.to_builtins(found),
        "counters": counted,
        "samples": raw(outcome.samples) | {"returns": [int(again) for again in replay.returns]},
    }


def conversations(shapes: Sequence[Any], scale: float, wanted: int, room: int, seconds: float) -> Replay:
    """Turns of conversations that have more than one, until their different blocks are `wanted` tokens.

    A turn returns where at least two blocks, and half, of its prompt are what an earlier request began with: the
    trace's first block is the same for all. Longer than `room` tokens: left out, its conversation's others are not.
    seconds: the last arrival.
    """
    owner: dict[int, int] = {}
    after: dict[int, int] = {}  # a returning request's predecessor
    for number, shape in enumerate(shapes):
        known = next((at for at, block in enumerate(shape.blocks) if block not in owner), len(shape.blocks))
        if known >= 2 and 2 * known >= len(shape.blocks):
            after[number] = owner[shape.blocks[known - 1]]
        owner.update(dict.fromkeys(shape.blocks, number))
    members = set(after) | set(after.values())
    size = max(1, round(MOONCAKE_BLOCK * scale))
    jobs: list[Job] = []
    taken: set[int] = set()
    seen: set[int] = set()
    returns: list[bool] = []
    again = total = 0
    for number in sorted(members):
        shape = shapes[number]
        prompt = min(max(1, round(shape.prompt_length * scale)), size * len(shape.blocks))
        output = max(1, round(shape.output_length * scale))
        if prompt + output > room:
            continue
        known = next((at for at, block in enumerate(shape.blocks) if block not in seen), len(shape.blocks))
        returns.append(after.get(number) in taken)
        again, total = again + min(known * size, prompt), total + prompt
        seen.update(shape.blocks)
        taken.add(number)
        jobs.append(Job(shape.at, prompt, output, tuple(shape.blocks), size))
        if len(seen) * size >= wanted:
            break
    span = max(jobs[-1].at - jobs[0].at, 1e-9)
    base = jobs[0].at
    # The trace's clock ticks in seconds: those of one tick are spread over it, in order.
    jobs = [job._replace(at=(job.at - base) / span * seconds) for job in _spread(jobs)]
    assert all(one.at <= two.at for one, two in pairwise(jobs))
    return Replay(jobs, returns, len(seen) * size, again / max(1, total))


def _spread(jobs: list[Job]) -> list[Job]:
    found: list[Job] = []
    groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.at)]
    for group, following in zip(groups, [*groups[1:], groups[-1]], strict=True):
        step = (following[0].at - group[0].at) / len(group)
        found += [job._replace(at=job.at + step * number) for number, job in enumerate(group)]
    return found


def _shapes(bench: Bench) -> Sequence[Any]:
    return read_mooncake(bench.plan.mooncake)


def _p50(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e3:,.0f} ms" if values else "none"
