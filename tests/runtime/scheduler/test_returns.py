"""A turn whose caller said it will go on: its KV outlasts that of others, and is in HBM again when it is expected."""

from __future__ import annotations

import gc

import pytest
from rotation_bench import PAGE, Bench

from superinfer.runtime.kv.drop_order import FEW
from superinfer.runtime.kv.tiers import TierNode
from superinfer.runtime.protocol import Hints
from superinfer.runtime.scheduler import returns

TURN = [1] * 16


def crowd(bench: Bench, count: int, first: int = 10) -> None:
    """Others, one after another, that fill both tiers with what nobody will ask for."""
    for number in range(count):
        bench.add([first + number] * 24, max_tokens=2)
        bench.run()


def idle(bench: Bench, seconds: float) -> None:
    """Nothing comes for so long."""
    until = bench.now + seconds
    while bench.now < until:
        bench.step()


def second_turn(hints: Hints | None, away_s: float, others: int, policy: str = "rota"):
    """Of TURN, continued after `away_s`, with `others` in between. Returns the bench and the turn that goes on."""
    bench = Bench(blocks=16, dram=24, policy=policy)
    first = bench.add(TURN, max_tokens=5, hints=hints)
    bench.run()
    crowd(bench, others)
    idle(bench, max(0.0, away_s - bench.now))
    again = bench.add([*first.tokens, 2, 2, 2], max_tokens=3)
    return bench, again


@pytest.mark.parametrize("policy", ["rota", "fcfs"])
def test_a_turn_that_will_go_on_is_not_dropped_from_host_memory_before_what_nobody_wants(policy):
    bench, again = second_turn(Hints(keep_s=2.0), 2.0, others=8, policy=policy)
    forgotten, other = second_turn(None, 2.0, others=8, policy=policy)
    for each in (bench, forgotten):
        each.run()
    assert again.cached == 20
    assert other.cached == 0
    bench.check([again])
    bench.check_all_given_back()


def test_it_is_back_in_hbm_when_it_is_expected_and_not_long_before():
    bench, _ = second_turn(Hints(keep_s=3.0), 0.0, others=8)
    path = bench.kv.match(second_tokens(bench), "", 20)
    assert len(path) == 20 // PAGE
    assert bench.kv.absent(path)[0], "the crowd took its room in HBM"
    idle(bench, 2.0 - bench.now)
    assert bench.kv.absent(path)[0], "it is not wanted yet"
    idle(bench, 3.0 - bench.now)
    assert not bench.kv.absent(path)[0]
    assert bench.kv.totals.prefetched > 0


def second_tokens(bench: Bench):
    """Of the turn that goes on, which has been added and not been planned yet; it is taken away again."""
    sequence = next(iter(bench.scheduler._waiting))
    bench.scheduler.cancel(sequence, bench.now)
    return sequence.tokens


@pytest.mark.parametrize(
    ("step_s", "keep_s", "is_mirrored"), [(0.01, None, True), (1e-4, None, False), (1e-4, 9.0, True)]
)
def test_where_computing_is_quicker_than_copies_only_turns_that_are_expected_are_copied_out_ahead(
    step_s, keep_s, is_mirrored
):
    """A copy takes 1 ms, a step of up to 12 tokens, three blocks, `step_s`. Until that is known a few blocks go out."""
    bench = Bench(blocks=60, dram=60, policy="rota")
    bench.executor.step_s = step_s
    bench.add(TURN, max_tokens=8, hints=Hints(keep_s=keep_s) if keep_s else None)
    bench.run()
    crowd(bench, 4)
    assert (bench.kv.totals.mirrored > 16) == is_mirrored
    assert bench.kv.totals.mirrored > 0


def test_a_turn_that_does_not_come_back_is_dropped_like_any_other():
    bench, again = second_turn(Hints(keep_s=0.2), 3.0, others=1)
    bench.scheduler.cancel(again, bench.now)
    assert bench.kv._order.num_kept == 0
    crowd(bench, 8, first=40)
    assert len(bench.kv.match(again.tokens, "", 20)) == 0
    assert len(bench.scheduler._returns) == 0
    bench.check_all_given_back()


def test_without_room_that_nobody_needs_nothing_is_brought_back():
    bench, again = second_turn(Hints(keep_s=0.5), 0.0, others=8)
    bench.scheduler.cancel(again, bench.now)
    busy = bench.add([3] * 50, max_tokens=12)  # holds all but a block or two of HBM
    bench.run()
    bench.check([busy])
    bench.check_all_given_back()


def nodes_in_memory() -> int:
    gc.collect()
    return sum(isinstance(found, TierNode) for found in gc.get_objects())


def test_turns_expected_back_in_hours_leave_no_more_behind_than_there_is_room_for():
    before = nodes_in_memory()
    bench = Bench(blocks=16, dram=24, policy="fcfs")
    for number in range(1500):
        bench.add([number % 90, number // 90, *[1] * 10], max_tokens=2, hints=Hints(keep_s=36_000.0))
        bench.run()
    assert bench.kv._order.num_kept > 0
    assert nodes_in_memory() - before <= 16 + 24 + FEW
    bench.check_all_given_back()


def test_who_comes_back_soon_is_brought_back_however_many_come_back_late(monkeypatch):
    monkeypatch.setattr(returns, "MOST", 3)
    bench = Bench(blocks=16, dram=60, policy="fcfs")
    for number in range(4):
        bench.add([60 + number] * 8, max_tokens=2, hints=Hints(keep_s=36_000.0))
        bench.run()
    soon = bench.add(TURN, max_tokens=5, hints=Hints(keep_s=3.0))
    bench.run()
    crowd(bench, 8)
    path = bench.kv.match(soon.tokens, "", 20)
    assert len(path) == 20 // PAGE and bench.kv.absent(path)[0], "the crowd took its room in HBM"
    idle(bench, 3.0 - bench.now)
    assert not bench.kv.absent(path)[0]
    assert len(bench.scheduler._returns) == 2, "the others that come back soonest"
