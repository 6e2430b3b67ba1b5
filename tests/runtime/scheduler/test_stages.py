"""Every second of a request's life is in one stage, whatever rotates, fails or waits; and the right stage is blamed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiered_executor import TieredMemoryExecutor

from superinfer.runtime.kv.copies import LinkUse
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.stages import StageClock
from superinfer.runtime.slo import SLO

PAGE = 4
STAGE_FIGURES = ("queue_s", "prefill_s", "rotated_s", "copy_wait_s", "preempted_s", "decode_s")

jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 14), st.integers(0, 4)),
    min_size=2,
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(
    jobs,
    st.sampled_from(["lru", "fcfs", "edf", "rota"]),
    st.integers(1, 40),
    st.sampled_from([0, 1, 8]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.05]),
    st.lists(st.floats(0.001, 0.1), min_size=8, max_size=8),
)
def test_the_stages_sum_to_the_whole(work, policy, dram, max_waits, eager, fails, steps):
    kv = DuplexCache(10, dram, PAGE)
    scheduler = build_scheduler(policy, kv, SchedulerLimits(3, 12, 10 * PAGE))
    scheduler.quantum = 1
    scheduler._rotation.max_waits = max_waits
    executor = TieredMemoryExecutor(10, dram, PAGE, seed=len(work), eager=eager)
    executor.fails = fails
    now, pending, sequences, spans = 0.0, list(work), [], {}
    for turn in range(5000):
        if pending and turn % (1 + pending[0][2]) == 0:
            prompt, length, _ = pending.pop(0)
            sequence = Sequence(
                id=turn, prompt=prompt, max_tokens=length, arrival=now, slo=SLO(ttft=0.2, tbt=0.01, deadline=2.0)
            )
            spans[turn] = []
            sequence.stages.watch = lambda stage, begin, end, to=spans[turn]: to.append((stage, begin, end))
            scheduler.add(sequence)
            sequences.append(sequence)
        now += steps[turn % 8]
        plan = scheduler.plan(now)
        if plan is None:
            if not pending:
                break
            continue
        executor.submit(plan)
        now += steps[(turn + 3) % 8]
        result = executor.collect()
        result.link = LinkUse(stall_s=steps[turn % 8] if plan.waits else 0.0)
        scheduler.commit(result, now)
    for sequence in sequences:
        report = sequence.report(now + 1.0)
        figures = [getattr(report, name) for name in STAGE_FIGURES]
        assert min(figures) >= 0.0
        assert sum(figures) == pytest.approx(report.e2e_s, abs=1e-9)
        assert (report.rotated_s > 0) <= (report.rotations > 0)  # one may come back with the plan that sent it away
        assert (report.preempted_s > 0) <= (report.preemptions > 0)
        assert bool(report.why) == (report.met is False)
        *told, over = spans[sequence.id]
        ends = [sequence.arrival] + [end for _, _, end in told]
        assert [begin for _, begin, _ in told] == ends[:-1] and ends[-1] == sequence.finished_at
        assert over == ("", sequence.finished_at, sequence.finished_at)


def test_time_in_the_second_tier_is_counted_as_such():
    kv = DuplexCache(8, 40, PAGE)
    scheduler = build_scheduler("lru", kv, SchedulerLimits(4, 16, 8 * PAGE))
    scheduler.quantum = 1
    executor = TieredMemoryExecutor(8, 40, PAGE, seed=3)
    sequences = [Sequence(id=at, prompt=[at] * 9, max_tokens=12, arrival=0.0) for at in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    now, away = 0.0, dict.fromkeys(range(4), 0.0)
    while (plan := scheduler.plan(now)) is not None:
        out = [s.id for s in sequences if s.table is not None and s.table.parked]
        executor.submit(plan)
        now += 0.01
        for id in out:
            away[id] += 0.01
        scheduler.commit(executor.collect(), now)
    assert {s.id: s.report(now).rotated_s for s in sequences} == pytest.approx(away) and sum(away.values()) > 0.1


def test_rotation_and_waiting_for_copies_are_told_apart_from_computing():
    clock = StageClock(10.0)
    clock.work(11.0)  # 1 s in the queue
    clock.first_token(13.0)  # 2 s of prefill
    clock.enter("rotated out", 14.0)  # 1 s of decode
    clock.work(18.0)  # 4 s rotated out
    clock.enter("copy wait", 18.0)
    clock.work(18.5)
    clock.stalled(0.25, 20.0)  # of 1.5 s in a step, a quarter second waited for copies
    clock.end(20.0)
    assert clock.seconds == {"queue": 1.0, "prefill": 2.0, "decode": 2.25, "rotated out": 4.0, "copy wait": 0.75}
    assert clock.before == {"queue": 1.0, "prefill": 2.0}


def test_a_step_cannot_have_waited_longer_than_it_took():
    clock = StageClock(0.0)
    clock.work(0.0)
    clock.stalled(5.0, 1.0)
    assert clock.seconds == {"queue": 0.0, "prefill": 0.0, "copy wait": 1.0}


def test_the_stage_it_is_in_counts_up_to_now():
    clock = StageClock(0.0)
    clock.work(1.0)
    assert clock.so_far(3.0) == {"queue": 1.0, "prefill": 2.0}
