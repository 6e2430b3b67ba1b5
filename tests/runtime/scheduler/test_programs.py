"""Calls of one program are kept or let go as a whole, with what must follow them."""

from __future__ import annotations

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import Hints
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.slo import SLO

LEADS_ON = Hints(rest_tokens=10.0, rest_s=0.1, expected_tokens=4.0)


def look_at(calls: list[Sequence]):
    """A scheduler that has come to know these calls and made its first plan, at 0."""
    scheduler = build_scheduler("rota", KVCache(4000, 16), SchedulerLimits(64, 512, 8192))
    for call in calls:
        scheduler.add(call)
    scheduler._look(0.0)  # all of it, before the first plan
    assert scheduler.plan(0.0) is not None
    return scheduler


def call(number: int, program: str, prompt: int, hints: Hints | None, deadline: float = 1.0, weight: float = 1.0):
    """One whose prompt takes 20 µs a token; nobody else has its tokens."""
    slo = SLO(deadline=deadline, weight=weight)
    tokens = [number] * prompt
    return Sequence(id=number, prompt=tokens, max_tokens=4, arrival=0.0, slo=slo, hints=hints, program=program)


def kept(scheduler, calls: list[Sequence]) -> list[bool]:
    return [bool(scheduler._roster.kept[c.row]) for c in calls]


def test_where_not_all_programs_fit_whole_ones_are_let_go():
    """Six programs of eight calls, each of 1,000 to 4,500 tokens: 0.5 s of prompts each, to be done in 3 s with what
    follows them."""
    calls = [call(8 * p + i, f"p{p}", 1000 + 500 * i, LEADS_ON, 3.0) for p in range(6) for i in range(8)]
    flags = kept(look_at(calls), calls)
    by_program = [flags[8 * p : 8 * p + 8] for p in range(6)]
    assert [all(of) for of in by_program].count(True) == 3
    assert [any(of) for of in by_program].count(True) == 3


def test_without_what_callers_say_of_programs_the_dearest_calls_go_whosever_they_are():
    calls = [call(8 * p + i, f"p{p}", 1000 + 500 * i, None, 1.0) for p in range(6) for i in range(8)]
    flags = kept(look_at(calls), calls)
    assert 0 < sum(flags) < len(flags)
    assert not any(all(flags[8 * p : 8 * p + 8]) for p in range(6))


def test_what_follows_a_call_is_work_that_must_fit_too():
    """Forty calls that would fit by themselves, 0.4 s of work; what follows each is as much as 2,000 output tokens."""
    calls = [call(i, f"p{i}", 500, LEADS_ON, deadline=4.0) for i in range(40)]
    assert all(kept(look_at(calls), calls))
    much = Hints(rest_tokens=2000.0, rest_s=1.0, expected_tokens=4.0)
    calls = [call(i, f"p{i}", 500, much, deadline=4.0) for i in range(40)]
    assert 0 < sum(kept(look_at(calls), calls)) < 40


def test_a_program_of_which_one_call_is_late_for_good_is_let_go():
    late = call(0, "a", 5000, LEADS_ON, deadline=0.05)  # 0.1 s of prompt
    with_it, others = call(1, "a", 100, LEADS_ON), call(2, "b", 100, LEADS_ON)
    scheduler = look_at([late, with_it, others])
    assert kept(scheduler, [late, with_it, others]) == [False, False, True]


def test_a_call_whose_program_goes_on_leaves_it_its_part_of_the_time_to_spare():
    """Of two calls that could end as late, the one that others must follow begins first; and of two with nothing after
    them, the one whose length is less sure."""
    goes_on = Hints(rest_tokens=100.0, rest_s=1.0, expected_tokens=4.0)
    unsure = Hints(spread_s=0.2, expected_tokens=4.0)
    sure = Hints(expected_tokens=4.0)
    calls = [call(0, "a", 100, sure, 5.0), call(1, "b", 100, goes_on, 5.0), call(2, "c", 100, unsure, 5.0)]
    scheduler = look_at(calls)
    assert [c.id for c in sorted(calls, key=scheduler._start_by)] == [1, 2, 0]


def test_requests_that_were_announced_are_not_foreseen_a_second_time():
    scheduler = look_at([call(0, "a", 100, LEADS_ON)])
    foreseen = scheduler._standing.forecast._count
    scheduler.add(call(1, "a", 100, Hints(follows=True)))
    assert scheduler._standing.forecast._count == foreseen
    scheduler.add(call(2, "b", 100, LEADS_ON))
    assert scheduler._standing.forecast._count == foreseen + 1


def test_programs_that_have_ended_leave_nothing_behind():
    calls = [call(i, f"p{i % 3}", 100, LEADS_ON) for i in range(300)]
    scheduler = look_at(calls)
    assert scheduler._standing.programs
    for each in calls:
        scheduler.cancel(each, 0.1)
    scheduler.plan(0.2)
    assert not scheduler._standing.programs
    assert not scheduler._standing.programs._live
