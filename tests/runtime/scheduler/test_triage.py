"""Which promises are kept when not all can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.runtime.scheduler import triage as module
from superinfer.runtime.scheduler.triage import HORIZONS, Demand, triage


def demand(count: int, **given: object) -> Demand:
    """Streams of 100 tokens at 100 ms whose next token is due in a second; every array as given, else alike for all."""
    values = dict(
        due=1.0, pace=0.1, left=100.0, prefill_s=0.0, token_s=1e-4, link_s=0.0,
        worth=1.0, first=0.0, held=0.0, held_s=0.0,
    )  # fmt: skip
    return Demand(*(np.broadcast_to(np.asarray(v, dtype=float), (count,)).copy() for v in (values | given).values()))


def test_what_fits_is_kept_whole():
    verdicts = triage(demand(20, prefill_s=0.02))
    assert verdicts.streams.all() and verdicts.prefills.all()
    assert 0.0 < verdicts.load <= 1.0


def test_of_equal_worths_the_dearest_go_and_no_more_than_must():
    prefill_s = np.array([0.1, 0.5, 0.2, 0.3, 0.2])
    verdicts = triage(demand(5, prefill_s=prefill_s, left=1.0))
    assert verdicts.prefills.tolist() == [True, False, True, True, True]


def test_weight_counts_against_cost():
    verdicts = triage(demand(2, prefill_s=np.array([0.9, 0.3]), worth=np.array([10.0, 1.0]), left=1.0))
    assert verdicts.prefills.tolist() == [True, False]


def test_memory_runs_out_before_time_does():
    """Six streams, each in a third of the memory for half of the time: the machine is idle, and one too many."""
    many = demand(7, held=1 / 3, held_s=0.05 / 3, left=1000.0)
    assert triage(many._replace(held_s=np.zeros(7))).streams.all()
    verdicts = triage(many)
    assert 5 <= verdicts.streams.sum() <= 6
    assert verdicts.load < 0.1


def test_a_first_token_can_be_kept_where_the_stream_cannot():
    verdicts = triage(demand(10, prefill_s=0.01, token_s=0.05, left=1000.0, first=0.5))
    assert verdicts.prefills.all()
    assert 0 < verdicts.streams.sum() < 10


def test_a_stream_under_way_does_not_go_for_a_few_first_tokens_without_theirs():
    """Its next token takes 0.1 s of the 0.125 that there are; in its place three first tokens would be in time."""
    prompts = demand(5, due=0.1, left=1000.0, first=module.FIRST_TOKEN, prefill_s=0.04, token_s=0.5)
    own = prompts._replace(first=np.array([0.0, *prompts.first[1:]]), left=np.array([1.0, *prompts.left[1:]]))
    costs = own._replace(prefill_s=np.array([0.0, *own.prefill_s[1:]]), token_s=np.array([0.1, *own.token_s[1:]]))
    verdicts = triage(costs)
    assert verdicts.streams.tolist() == [True, False, False, False, False]
    assert verdicts.prefills[1:].sum() == 0


def test_what_is_never_due_asks_for_nothing():
    with np.errstate(all="raise"):
        verdicts = triage(demand(3, due=np.array([1.0, np.inf, np.inf]), prefill_s=50.0))
    assert verdicts.prefills.tolist() == [False, True, True]


def test_of_more_than_are_looked_at_the_most_worth_their_cost_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST", 8)
    prefill_s = np.linspace(1.0, 0.1, 40)
    verdicts = triage(demand(40, prefill_s=prefill_s, left=1.0))
    kept = np.flatnonzero(verdicts.prefills)
    assert 0 < len(kept) <= 8
    assert kept.tolist() == list(range(40 - len(kept), 40))


ask = st.tuples(
    st.floats(-1.0, 20.0), st.floats(0.01, 1.0), st.floats(1.0, 300.0), st.floats(0.0, 2.0), st.floats(0.0, 0.05)
)
asks = st.lists(ask, min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(asks, st.floats(0.2, 1.0))
def test_what_is_kept_fits_into_every_horizon_and_no_stream_without_its_prefill(asks, supply):
    due, pace, left, prefill_s, token_s = map(np.array, zip(*asks, strict=True))
    verdicts = triage(
        demand(len(asks), due=due, pace=pace, left=left, prefill_s=prefill_s, token_s=token_s, first=0.5), supply
    )
    assert not (verdicts.streams & ~verdicts.prefills).any()
    for horizon in HORIZONS:
        is_due = due <= horizon
        tokens = np.where(is_due, np.minimum(np.floor((horizon - due) / pace) + 1.0, left), 0.0)
        asked = (verdicts.prefills * is_due * prefill_s + verdicts.streams * tokens * token_s).sum()
        assert asked <= supply * horizon * (1 + 1e-6) + token_s.max() + 1e-6  # a token more or less for rounding


@pytest.mark.parametrize("count", [0, 1])
def test_few_are_no_special_case(count):
    assert len(triage(demand(count)).streams) == count


def test_a_reserve_takes_room_and_is_no_part_of_what_is_expected():
    """Of three prefills due in a second, the last is counted twice, lest more comes."""
    plain = demand(3, prefill_s=0.3, left=1.0)
    reserved = demand(3, prefill_s=np.array([0.3, 0.3, 0.6]), left=1.0)._replace(expected=np.array([1.0, 1.0, 0.5]))
    assert triage(plain).prefills.all()
    assert triage(reserved).prefills.tolist() == [True, True, False]
    fits = reserved._replace(prefill_s=np.array([0.1, 0.1, 0.6]))
    assert triage(fits).prefills.all()
    assert triage(fits).prefill_load == pytest.approx(0.5)
    assert triage(fits._replace(expected=None)).prefill_load == pytest.approx(0.8)
