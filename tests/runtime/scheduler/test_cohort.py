"""Decodes that are planned and committed as arrays: whenever somebody looks, they are as if it were one by one."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_executor import MemoryExecutor, expected_output

from superinfer.runtime.engine.outgoing import Outgoing
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.scheduler.timelines import Timelines
from superinfer.runtime.slo import SLO, TokenTimeline

seconds = st.floats(0.01, 3.0, allow_nan=False)
slos = st.none() | st.builds(SLO, ttft=st.none() | seconds, tbt=st.none() | seconds, deadline=st.none() | seconds)


def state(timeline: TokenTimeline) -> tuple:
    late = timeline.verdict(timeline.last)
    return timeline.count, timeline.last, timeline.max_tbt, timeline.lag, timeline.is_late, timeline.first, late


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(slos, seconds), min_size=1, max_size=5),
    st.lists(st.tuples(seconds, st.sets(st.integers(0, 4)), st.booleans()), max_size=12),
)
def test_timelines_together_are_each_what_it_is_alone(streams, steps):
    together, alone = ([TokenTimeline(slo) for slo, _ in streams] for _ in range(2))
    many = Timelines(len(streams))
    for slot, (_, arrival) in enumerate(streams):
        together[slot].tokens(1, 0.5)
        alone[slot].tokens(1, 0.5)
        many.take(slot, arrival, together[slot])
    now, everybody = 4.0, np.arange(len(streams))
    for pause, some, looks in steps:
        now += pause
        slots = np.array(sorted(slot for slot in some if slot < len(streams)), dtype=np.int64) if some else everybody
        many.note(slots, now)
        for slot in slots.tolist():
            alone[slot].tokens(1, now - streams[slot][1])
        assert many.late().tolist() == [timeline.is_late for timeline in alone]
        if looks:
            many.give(0, together[0])
            assert state(together[0]) == state(alone[0])
    assert many.late().tolist() == [timeline.is_late for timeline in alone]
    many.give_all(everybody.tolist(), together)
    assert list(map(state, together)) == list(map(state, alone))


def play(least: int, jobs, events, overlap: int, page: int, forces: bool, cached: bool) -> list:
    """What every sequence was seen to be after each step: positions, tokens in flight and known, timeline, status.

    cached: prefixes are, and there is room for all. Where there is not, who must go depends on which idle block went
    first, and of those that two sequences left in the same step either may.
    """
    blocks, slots = (320 if cached else 80) // page, 4
    kv = KVCache(blocks, page, prefix_cache=cached)
    scheduler = build_scheduler("fcfs", kv, SchedulerLimits(slots, 16, blocks * page))
    scheduler.least_cohort = least
    executor = MemoryExecutor(blocks, page, forces)
    sequences, seen, under_way, now = [], [], [], 0.0
    for number, (prompt, most) in enumerate(jobs):
        slo = SLO(ttft=0.05, tbt=0.03)
        sequence = Sequence(id=number, prompt=prompt, max_tokens=most, arrival=0.0, slo=slo, stop_ids=(3, 7))
        sequences.append(sequence)
        scheduler.add(sequence)
    for turn in range(400):
        now += 0.01 + 0.01 * (turn % 3)
        event, who = events.get(turn, ("", 0))
        sequence = sequences[who % len(sequences)]
        if event == "cancel":
            scheduler.cancel(sequence, now)
        plan = scheduler.plan(now)
        is_over = plan is None and not under_way
        if plan is not None:
            executor.fail_next = event == "fail"
            try:
                executor.submit(plan)
                under_way.append(plan.step)
            except RuntimeError:
                scheduler.abort(plan.step, now)
        if under_way and (plan is None or len(under_way) > overlap):
            under_way.pop(0)
            told = sorted((u.sequence.id, *u.token_ids) for u in scheduler.commit(executor.collect(), now))
            seen.append(told)
        if event == "look":
            seen.append(
                (sequence.scheduled, sequence.in_flight, sequence.length, sequence.num_output, sequence.is_late)
            )
            seen.append((sequence.tokens.tolist(), state(sequence.timeline), sequence.status, sequence.finish_reason))
        if is_over:
            break
    seen += [(s.tokens.tolist(), state(s.timeline), s.status, s.finish_reason, s.in_flight) for s in sequences]
    assert all(s.status is Status.FINISHED for s in sequences)
    return seen


prompts = st.lists(st.integers(10, 13), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 25)), min_size=1, max_size=7),
    events=st.dictionaries(
        st.integers(0, 40),
        st.tuples(st.sampled_from(["look", "look", "cancel", "fail"]), st.integers(0, 6)),
        max_size=12,
    ),
    overlap=st.integers(0, 2),
    page=st.sampled_from([1, 2, 4, 16]),
    forces=st.booleans(),
    cached=st.booleans(),
)
def test_who_looks_at_a_sequence_cannot_tell_whether_it_is_in_a_cohort(jobs, events, overlap, page, forces, cached):
    one_by_one, together = (play(least, jobs, events, overlap, page, forces, cached) for least in (1000, 1))
    assert together == one_by_one


def steady(count: int, tokens: int, **given) -> tuple[BatchScheduler, MemoryExecutor, list[Sequence]]:
    page, blocks = 4, count * (tokens // 4 + 4)
    scheduler = build_scheduler("fcfs", KVCache(blocks, page), SchedulerLimits(count, 256, blocks * page))
    scheduler.least_cohort = 1
    sequences = [Sequence(id=at, prompt=[at, 20], max_tokens=tokens, arrival=0.0, **given) for at in range(count)]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, MemoryExecutor(blocks, page), sequences


def test_steady_decodes_come_as_arrays_and_last_longer_than_the_history_of_their_tokens():
    scheduler, executor, sequences = steady(5, 200)
    arrays = 0
    for turn in range(500):
        plan = scheduler.plan(turn * 0.01)
        if plan is None:
            break
        arrays += len(plan.decodes) == 5 and not plan.others
        executor.submit(plan)
        scheduler.commit(executor.collect(), turn * 0.01)
    assert arrays == 198  # all but each one's first token and last
    assert [s.tokens.tolist()[2:] for s in sequences] == [expected_output([s.id, 20], 200) for s in sequences]


def test_those_that_end_long_before_they_must_are_let_go():
    """Each might have had thousands of tokens more: no list of what is to come holds on to it until then."""
    scheduler, executor, sequences = steady(4, 100_000)
    ended = []
    for turn in range(400):
        executor.submit(scheduler.plan(turn * 0.01))
        scheduler.commit(executor.collect(), turn * 0.01)
        if turn % 10 == 9:
            assert sequences[0].cohort is not None
            ended.append(weakref.ref(sequences[0].tokens))
            scheduler.cancel(sequences.pop(0), turn * 0.01)
            sequences.append(Sequence(id=4 + turn, prompt=[turn % 7, 20], max_tokens=100_000, arrival=turn * 0.01))
            scheduler.add(sequences[-1])
    gc.collect()
    assert sum(tokens() is not None for tokens in ended) <= 4, "no more than the last steps computed"


def test_a_result_may_have_the_tokens_of_decodes_as_an_array():
    scheduler, executor, sequences = steady(3, 30)
    for turn in range(100):
        plan = scheduler.plan(turn * 0.01)
        if plan is None:
            break
        executor.submit(plan)
        result = executor.collect()
        result.decoded = np.array([result.tokens.pop(slot) for slot in plan.decodes.slots.tolist()], dtype=np.int64)
        scheduler.commit(result, turn * 0.01)
    assert [s.tokens.tolist()[2:] for s in sequences] == [expected_output([s.id, 20], 30) for s in sequences]


@pytest.mark.parametrize("paced", [False, True])
def test_deltas_that_are_used_again_hold_what_is_new(paced):
    outgoing = Outgoing()
    sequences = [
        Sequence(id=at, prompt=[1], max_tokens=9, arrival=0.0, request_id=f"r{at}", owner=b"ab"[at % 2 : at % 2 + 1])
        for at in range(4)
    ]
    if paced:
        outgoing.pace(sequences[1:2], 5.0)

    def told(whom: list[Sequence], tokens: list[int], now: float = 0.0) -> tuple[dict, list]:
        by_client, due = outgoing.steady(whom, tokens, now)
        deltas = {
            client: [(delta.request_id, list(delta.token_ids)) for delta in deltas]
            for client, deltas in by_client.items()
        }
        return deltas, [(update.sequence.id, outgoing.all_of(update)[0]) for update in due]

    r1 = [] if paced else [("r1", [2])]
    assert told(sequences, [1, 2, 3, 4]) == (
        {b"a": [("r0", [1]), ("r2", [3])], b"b": [*r1, ("r3", [4])]},
        [],
    )
    assert told(sequences, [5, 6, 7, 8], 4.9)[0][b"a"] == [("r0", [5]), ("r2", [7])]
    assert told(sequences[2:], [9, 10], 4.9) == ({b"a": [("r2", [9])], b"b": [("r3", [10])]}, [])
    assert told(sequences[:2], [11, 12], 5.0)[1] == ([(1, [2, 6, 12])] if paced else []), "what was kept comes with it"
