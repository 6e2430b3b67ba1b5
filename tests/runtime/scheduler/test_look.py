"""A look at all live sequences comes in slices: what it comes to, whatever happens between them, and what it costs."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import Hints
from superinfer.runtime.scheduler import line, standing, triage
from superinfer.runtime.scheduler import looks as module
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.roster import Columns
from superinfer.runtime.scheduler.rota import Rota
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.scheduler.slices import finish
from superinfer.runtime.scheduler.standing import Standing
from superinfer.runtime.scheduler.triage import Demand
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
LIMITS = SchedulerLimits(4, 64, 4096)
SLOS = [
    None,
    STREAM,
    SLO(ttft=0.3, tbt=0.02, weight=3.0),
    SLO(tbt=0.05),
    SLO(ttft=0.5),
    SLO(deadline=2.0),
    SLO(deadline=20.0, ttft=0.5, tbt=0.2),
]


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """What a look finds is of its own time alone, so that two looks can be compared."""
    monkeypatch.setattr(standing, "FRESH_S", 0.0)


class Crowd:
    """Sequences of a Standing that come, run, produce, are moved out and end, without a scheduler."""

    def __init__(self) -> None:
        self.kv = KVCache(64, 16)
        self.standing = Standing(self.kv, LIMITS, StepCost(StepRates.unknown()))
        self.live: list[Sequence] = []
        self.residents: list[Sequence] = []
        self.now, self.number = 0.0, 0

    def act(self, what: str, who: int, amount: int) -> None:
        self.now += 0.01
        roster = self.standing.roster
        if what == "come":
            sequence = Sequence(
                id=self.number,
                prompt=[1] * (20 + 13 * amount + self.number),  # no two are alike
                max_tokens=200,
                arrival=self.now,
                slo=SLOS[amount % len(SLOS)],
                program=f"p{amount % 3}",
                hints=Hints(expected_tokens=30.0) if amount % 5 == 0 else None,
            )
            self.number += 1
            roster.add(sequence, sequence.num_prompt)
            if sequence.kept:
                self.standing.forecast.saw(sequence, sequence.num_prompt)
            self.live.append(sequence)
        elif self.live:
            sequence = self.live[who % len(self.live)]
            runs = sequence in self.residents
            if what == "run" and not runs:
                sequence.status, sequence.kept = (
                    Status.RUNNING,
                    bool(roster.kept[sequence.row]),
                )  # as who lets it in does
                sequence.resume_at = sequence.compute_length
                self.residents.append(sequence)
            elif what == "produce" and runs:
                sequence.tokens.extend([5] * (1 + amount))
                sequence.timeline.tokens(1 + amount, self.now - sequence.arrival)
                sequence.scheduled = sequence.resume_at = sequence.compute_length
            elif what == "leave" and runs:
                sequence.status = Status.WAITING
                self.residents.remove(sequence)
                roster.update(Residents([sequence]))
                roster.load[sequence.row] = amount % 4
            elif what == "end":
                self.live.remove(sequence)
                if runs:
                    self.residents.remove(sequence)
                    self.standing.lengths.learn((sequence.program,), sequence.num_output + 1)
                sequence.status = Status.FINISHED
                roster.remove(sequence)

    def look(self) -> None:
        finish(self.standing.look(Residents(self.residents), 1e-3, self.now))


def outcome(standing: Standing, live: list[Sequence]) -> dict[str, object]:
    """All that a look says."""
    roster = standing.roster
    return {
        "kept": [s.id for s in live if roster.kept[s.row]],
        "whole": [s.id for s in live if roster.whole[s.row]],
        "hopeful": [s.id for s in live if roster.hopeful[s.row]],
        "told": [s.id for s in live if s.status is Status.RUNNING and s.kept],
        "left": {s.id: roster.left[s.row] for s in live},
        "next": [(start, id) for start, id, _ in standing.line.kept(-math.inf)],
        "rest": [s.id for s in standing.line.rest()],
        "victims": {s.id for s in standing.victims()},
        "aged": standing.aged and standing.aged.id,
        "promised": standing.promised,
        "numbers": [standing.tightest, standing.next_return, standing.kept_s, *standing.verdicts[2:]],
        "asked": standing.asked,
    }


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    assert one.pop("numbers") == pytest.approx(other.pop("numbers"))
    assert one == other


def made_anew(crowd: Crowd) -> Standing:
    """A Standing that has seen nothing, told of everybody who is live."""
    anew = Standing(crowd.kv, LIMITS, StepCost(StepRates.unknown()))
    anew.lengths, anew.forecast, anew.aged = crowd.standing.lengths, crowd.standing.forecast, crowd.standing.aged
    before = crowd.standing.roster
    for sequence in crowd.live:
        old, kept = sequence.row, sequence.kept
        anew.roster.add(sequence, int(before.prefill[old]))
        new, sequence.kept = sequence.row, kept
        for name in ("produced", "context", "load", "left", "base"):
            getattr(anew.roster, name)[new] = getattr(before, name)[old]
        if before.late[old]:
            anew.roster.give_up(new)
        elif math.isfinite(before.base[old]):
            anew.roster.hopeful[new] = True
    return anew


acts = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "come", "run", "run", "produce", "produce", "leave", "end", "slice", "look"]),
        st.integers(0, 50),
        st.integers(0, 9),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(acts)
def test_what_is_kept_up_to_date_is_what_would_be_made_from_nothing(acts):
    crowd = Crowd()
    looking = None
    for what, who, amount in acts:
        if what == "slice":
            looking = looking or crowd.standing.look(Residents(crowd.residents), 1e-3, crowd.now)
            looking = looking if next(looking, None) is not None else None
        elif what == "look":
            if looking is not None:  # one at a time, as in `Looks`: they share the roster's copy of its columns
                finish(looking)
                looking = None
            crowd.look()
        else:
            crowd.act(what, who, amount)
    if looking is not None:
        finish(looking)
    roster = crowd.standing.roster
    assert sorted(np.flatnonzero(roster.live)) == sorted(s.row for s in crowd.live)
    assert not (roster.kept | roster.hopeful)[~roster.live].any()
    assert not roster.produced[~roster.live].any()
    crowd.look()
    seen = outcome(crowd.standing, crowd.live)
    asked = crowd.standing.asked
    for sequence in crowd.live:
        sequence.kept = bool(roster.kept[sequence.row])
    anew = made_anew(crowd)
    anew.asked = asked
    finish(anew.look(Residents(crowd.residents), 1e-3, crowd.now))
    assert_same(outcome(anew, crowd.live), seen)


@settings(max_examples=100, deadline=None)
@given(acts, st.integers(2, 12), acts)  # the first has taken everybody in
def test_between_slices_anyone_may_come_move_or_end(before, slices, between):
    """Those who end are forgotten, those who come keep what they came with, all others hear what came of it."""
    crowd = Crowd()
    for act in before:
        crowd.act(*act)
    there = list(crowd.live)
    looking = crowd.standing.look(Residents(crowd.residents), 1e-3, crowd.now)
    for _ in range(slices):
        next(looking, None)
    for act in between:
        crowd.act(*act)
    finish(looking)
    roster = crowd.standing.roster
    for sequence in crowd.live:
        if sequence not in there and sequence.status is Status.WAITING and sequence.num_output == 0:
            assert roster.kept[sequence.row] == (sequence.slo is not None) or crowd.standing.aged is sequence
        if sequence in crowd.residents:
            assert sequence.kept == roster.kept[sequence.row] or sequence not in there
    live = set(crowd.live)
    assert not roster.kept[~roster.live].any()
    assert all(s in live for _, _, s in crowd.standing.line.kept(-math.inf))
    assert all(s in live for s in crowd.standing.victims())


def run_scheduler(scheduler: Rota, seconds: float, step_s: float = 0.02, start: float = 0.0) -> None:
    now = start
    while now < start + seconds:
        plan = scheduler.plan(now)
        now += step_s
        if plan is not None:
            tokens = {work.slot: 5 for work in plan.work if work.sample}
            scheduler.commit(StepResult(plan.step, tokens, elapsed=step_s), now)


@pytest.fixture
def crowded():
    """16,000 live: 64 run, all came at about the same time."""
    rng = random.Random(0)
    scheduler = build_scheduler("rota", KVCache(2000, 16), SchedulerLimits(64, 2048, 4096))
    for number in range(16_000):
        prompt = [number] * rng.randrange(50, 400)
        slo = STREAM if number % 3 else None
        scheduler.add(Sequence(id=number, prompt=prompt, max_tokens=500, arrival=number * 1e-5, slo=slo))
    return scheduler


def test_however_many_are_live_a_plan_looks_for_its_time_or_one_slice(crowded, monkeypatch):
    """Counted in what slices say they cost, which depends on the rows they go through."""
    plans: list[list[int]] = []
    look = Standing.look

    def counted(self, residents, block_s, now):
        slices = look(self, residents, block_s, now)
        for part in slices:
            yield part
            plans[-1].append(part.us)  # it is about to be done

    plan = Rota.plan
    monkeypatch.setattr(Standing, "look", counted)
    monkeypatch.setattr(Rota, "plan", lambda self, now: (plans.append([]), plan(self, now))[1])
    run_scheduler(crowded, 2.0)
    assert sum(len(done) for done in plans) > 30
    most = max(module.PLAN_US, module.PLAN_SHARE * 1e6 * crowded._standing.step_s)
    assert max(sum(done) for done in plans if len(done) > 1) <= most
    assert max(sum(done) for done in plans) < 2500.0
    assert sum(map(sum, plans)) / len(plans) < most


def test_no_plan_asks_thousands_when_their_work_must_begin(crowded, monkeypatch):
    calls = [0]
    start_by = Rota._start_by
    monkeypatch.setattr(
        Rota, "_start_by", lambda self, sequence: (calls.__setitem__(0, calls[0] + 1), start_by(self, sequence))[1]
    )
    now, most = 3.0, 0
    for _ in range(20):
        calls[0] = 0
        plan = crowded.plan(now)
        most = max(most, calls[0])
        now += 0.02
        tokens = {work.slot: 5 for work in plan.work if work.sample}
        crowded.commit(StepResult(plan.step, tokens, elapsed=0.02), now)
    assert most <= 2 * line.HEAD


def looks_of(scheduler: Rota) -> list[float]:
    """When looks begin from now on."""
    looks: list[float] = []
    look = scheduler._standing.look
    scheduler._standing.look = lambda residents, block_s, now: (looks.append(now), look(residents, block_s, now))[1]
    return looks


def steady(count: int, slots: int) -> Rota:
    """So many streams, all of which can be kept, have run or waited for half a second."""
    scheduler = build_scheduler("rota", KVCache(4000, 16), SchedulerLimits(slots, 2048, 4096))
    for number in range(count):
        slo = SLO(ttft=30.0, tbt=0.1)
        scheduler.add(Sequence(id=number, prompt=[number] * 50, max_tokens=900, arrival=0.0, slo=slo))
    run_scheduler(scheduler, 0.5)
    return scheduler


def test_while_all_that_may_be_kept_run_looks_are_seldom_until_somebody_comes():
    scheduler = steady(40, slots=64)
    looks = looks_of(scheduler)
    run_scheduler(scheduler, 1.0, start=0.5)
    gaps = np.diff(looks)
    assert len(gaps) >= 3 and gaps.min() >= 0.99 * module.SETTLED_S
    scheduler.add(Sequence(id=100, prompt=[100] * 50, max_tokens=4, arrival=1.5, slo=STREAM))
    run_scheduler(scheduler, 0.1, start=1.5)
    assert 1.5 <= looks[len(gaps) + 1] <= 1.54


def test_while_one_that_may_be_kept_waits_looks_are_as_often_as_ever():
    scheduler = steady(41, slots=40)
    looks = looks_of(scheduler)
    run_scheduler(scheduler, 1.0, start=0.5)
    assert np.diff(looks).max() <= 2.0 * module.TRIAGE_S


def test_when_one_has_ended_the_next_look_is_no_later_than_ever():
    scheduler = steady(40, slots=64)
    looks = looks_of(scheduler)
    run_scheduler(scheduler, 0.5, start=0.5)
    scheduler.cancel(scheduler._running[0], looks[-1] + 0.02)
    before = len(looks)
    run_scheduler(scheduler, 0.2, start=looks[-1] + 0.04)
    assert looks[before] - looks[before - 1] <= 2.0 * module.TRIAGE_S


def test_who_is_no_longer_kept_leaves_those_who_are_and_all_others_stay_together():
    scheduler = steady(40, slots=64)
    together = len(scheduler._cohort)  # none where all are planned one by one
    gone = scheduler._running[:3]
    for sequence in gone:
        scheduler._roster.give_up(sequence.row)
    scheduler._look(0.5)
    assert [s for s in scheduler._running if not s.kept] == gone
    assert len(scheduler._cohort) == max(0, together - 3) and all(s.cohort is None for s in gone)
    plan = scheduler.plan(0.5)
    assert {work.slot for work in plan.work} >= {s.slot for s in scheduler._running if s.kept}


def test_slices_of_a_look_change_no_verdict():
    crowd, whole = Crowd(), Crowd()
    rng = random.Random(1)
    for _ in range(300):
        act = rng.choice(["come", "come", "run", "produce"]), rng.randrange(50), rng.randrange(10)
        crowd.act(*act)
        whole.act(*act)
    slices = list(crowd.standing.look(Residents(crowd.residents), 1e-3, crowd.now))
    whole.look()
    assert len(slices) >= 8
    assert_same(outcome(crowd.standing, crowd.live), outcome(whole.standing, whole.live))


def test_who_comes_while_a_look_is_under_way_does_not_wait_for_its_end(monkeypatch):
    monkeypatch.setattr(module, "PLAN_SHARE", 0.0)
    monkeypatch.setattr(module, "PLAN_US", 0.0)  # a slice a plan
    scheduler = build_scheduler("rota", KVCache(2000, 16), SchedulerLimits(64, 2048, 4096))
    for number in range(40):
        scheduler.add(Sequence(id=number, prompt=[number] * 50, max_tokens=500, arrival=0.0, slo=STREAM))
    run_scheduler(scheduler, 0.1)
    urgent = Sequence(id=100, prompt=[100] * 50, max_tokens=4, arrival=0.1, slo=STREAM)
    assert scheduler._looks.is_under_way
    scheduler.add(urgent)
    plan = scheduler.plan(0.1)
    assert urgent in scheduler._planned[plan.step]


def test_columns_name_all_of_a_row():
    crowd = Crowd()
    crowd.act("come", 0, 1)
    roster = crowd.standing.roster
    columns = Columns(*roster.columns(np.array([crowd.live[0].row])))
    assert columns.prompt == [33.0] and columns.pace == [0.1] and columns.base == pytest.approx([1.01])


def overloaded(monkeypatch) -> Rota:
    """Four seconds of prompts are to be computed within one; the look that says so is over. Then a slice a plan."""
    scheduler = build_scheduler("rota", KVCache(40_000, 16), SchedulerLimits(64, 2048, 8192))
    for number in range(200):
        scheduler.add(Sequence(id=number, prompt=[number] * 1000, max_tokens=100, arrival=0.0, slo=STREAM))
    scheduler._look(0.0)
    monkeypatch.setattr(module, "PLAN_SHARE", 0.0)
    monkeypatch.setattr(module, "PLAN_US", 0.0)
    return scheduler


def test_who_comes_dearer_than_those_let_go_is_not_kept_before_it_is_looked_at(monkeypatch):
    scheduler = overloaded(monkeypatch)
    roster = scheduler._roster
    assert 0 < scheduler._standing.promised < 200
    dear = Sequence(id=300, prompt=[300] * 4000, max_tokens=100, arrival=0.0, slo=STREAM)
    cheap = Sequence(id=301, prompt=[301] * 20, max_tokens=100, arrival=0.0, slo=STREAM)
    for sequence in (dear, cheap):
        scheduler.add(sequence)
    assert (dear.kept, cheap.kept) == (False, True)
    scheduler._look(0.0)
    assert (roster.kept[dear.row], roster.kept[cheap.row]) == (False, True)


@given(
    st.floats(0.1, 10.0),
    st.sampled_from([0.0, 0.5]),
    st.floats(1.0, 500.0),
    st.floats(1e-5, 1e-2),
    st.floats(1e-4, 5.0),
)
def test_a_newcomer_is_priced_as_in_a_triage(worth, first, left, token_s, prefill_s):
    columns = {"left": left, "token_s": token_s, "prefill_s": prefill_s, "worth": worth, "first": first}
    demand = Demand(*(np.full(1, columns.get(name, 0.0)) for name in Demand._fields[:-2]))
    price = triage.prefill_price(worth, first, left * token_s, prefill_s)
    assert triage._price(demand)[1] == pytest.approx(price, rel=1e-9)


@pytest.mark.parametrize("is_looked_at", [True, False])
def test_who_is_too_late_by_now_is_not_let_in_before_the_next_look_says_so(monkeypatch, is_looked_at):
    scheduler = build_scheduler("rota", KVCache(400, 16), SchedulerLimits(1, 64, 4096))
    late = Sequence(id=1, prompt=[1] * 40, max_tokens=50, arrival=0.0, slo=STREAM)
    scheduler.add(late)
    if is_looked_at:
        scheduler._look(0.0)
    monkeypatch.setattr(module, "PLAN_SHARE", 0.0)
    monkeypatch.setattr(module, "PLAN_US", 0.0)  # the look that the next plan begins is not over with it
    good = Sequence(id=2, prompt=[2] * 40, max_tokens=50, arrival=2.0, slo=STREAM)
    scheduler.add(good)
    plan = scheduler.plan(2.0)
    assert list(scheduler._planned[plan.step]) == [good]
    assert is_looked_at or not late.kept


def test_who_was_let_in_while_a_look_was_under_way_is_not_let_go_by_it():
    """It was dearer when the look took it in, before its prompt was computed."""
    crowd = Crowd()
    crowd.act("come", 0, 1)
    sequence, roster = crowd.live[0], crowd.standing.roster
    roster.prefill[sequence.row] = 1e6  # seconds of prefill within one
    looking = crowd.standing.look(Residents(crowd.residents), 1e-3, crowd.now)
    next(looking), next(looking)
    crowd.act("run", 0, 0)
    roster.fresh.append(sequence.row)  # as who lets it in does
    finish(looking)
    assert sequence.kept and roster.kept[sequence.row]


def test_what_has_ended_is_under_way_no_longer():
    crowd = Crowd()
    for act in (("come", 0, 1), ("run", 0, 0), ("produce", 0, 9)):
        crowd.act(*act)
    crowd.look()
    assert crowd.standing.roster.produced.sum() == 10
    crowd.act("end", 0, 0)
    assert not crowd.standing.roster.produced.any()


def test_a_stream_without_a_ttft_may_be_kept_from_its_first_token_on():
    crowd = Crowd()
    crowd.act("come", 0, 3)  # SLO(tbt=0.05)
    crowd.act("run", 0, 0)
    crowd.look()
    assert not crowd.residents[0].kept
    crowd.act("produce", 0, 0)
    crowd.look()
    assert crowd.residents[0].kept


def test_who_gets_the_row_of_one_that_ended_meanwhile_is_not_taken_for_it():
    crowd = Crowd()
    crowd.act("come", 0, 1)
    roster, row = crowd.standing.roster, crowd.live[0].row
    roster.prefill[row] = 1e6  # it is too late
    looking = crowd.standing.look(Residents(crowd.residents), 1e-3, crowd.now)
    next(looking), next(looking)
    crowd.act("end", 0, 0)
    crowd.act("come", 0, 1)
    assert crowd.live[0].row == row
    finish(looking)
    assert roster.hopeful[row] and roster.kept[row]
    assert not roster.late[row]


def test_of_a_burst_only_so_many_are_in_order_before_they_are_looked_at():
    scheduler = build_scheduler("rota", KVCache(400, 16), SchedulerLimits(4, 64, 4096))
    for number in range(1000):
        scheduler.add(Sequence(id=number, prompt=[number], max_tokens=5, arrival=1e-3 * (1000 - number), slo=STREAM))
    first = [id for _, id, _ in scheduler._looks.joined.entries()]
    assert first == list(range(999, 999 - line.HEAD, -1))  # the most urgent
