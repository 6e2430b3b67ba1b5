"""The waiting queue keeps its order, and no step's work grows with its length."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.batching import MAX_LOOKED_AT
from superinfer.runtime.scheduler.fcfs import FCFS
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.queue import WaitingQueue
from superinfer.runtime.scheduler.sequence import Sequence, Status


def sequence(id: int, prompt: list[int] | None = None, max_tokens: int = 2) -> Sequence:
    return Sequence(id=id, prompt=prompt or [id], max_tokens=max_tokens, arrival=float(id))


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(st.integers(0, 5), max_size=30), leaving=st.sets(st.integers(0, 29)))
def test_it_is_in_order_of_keys_then_ids_whoever_leaves(keys, leaving):
    queue = WaitingQueue()
    members = [(key, sequence(id)) for id, key in enumerate(keys)]
    for key, member in reversed(members):
        queue.add(member, (float(key),))
    for id in leaving & set(range(len(keys))):
        queue.remove(members[id][1])
    expected = sorted((key, member.id) for key, member in members if member.id not in leaving)
    assert [member.id for member in queue] == [id for _, id in expected]
    assert len(queue) == len(expected)


class CountingFCFS(FCFS):
    """FCFS that counts how often it is asked for a rank."""

    calls = 0

    def rank(self, sequence, now):
        self.calls += 1
        return super().rank(sequence, now)


def step(scheduler, now):
    plan = scheduler.plan(now)
    if plan is not None:
        scheduler.commit(StepResult(plan.step, {work.slot: 1 for work in plan.work if work.sample}), now)
    return plan


def test_a_long_queue_that_finds_no_room_is_not_ranked_again_each_step():
    scheduler = CountingFCFS(KVCache(8, 4), SchedulerLimits(16, 64, 32))
    for id in range(2000):
        scheduler.add(sequence(id, [id] * 13, 8))
    before = scheduler.calls
    for now in range(50):
        step(scheduler, float(now))
    assert scheduler.counts().waiting > 1900
    assert scheduler.calls - before < 50 * 16


def test_more_sharers_of_one_prefix_than_a_step_looks_at_all_come_to_their_end():
    scheduler = FCFS(KVCache(64, 4), SchedulerLimits(8, 8, 64))
    sharers = [sequence(id, [7] * 20 + [id]) for id in range(2 * MAX_LOOKED_AT)]
    other = sequence(len(sharers), [9, 9])
    for member in [*sharers, other]:
        scheduler.add(member)
    now = 0.0
    while step(scheduler, now) is not None:
        now += 1.0
    assert all(member.status is Status.FINISHED for member in [*sharers, other])
