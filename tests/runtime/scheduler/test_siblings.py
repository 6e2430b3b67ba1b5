"""Requests made together over a common prefix are counted, and let in, as what they are: one prefix and many ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rotation_bench import Bench

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import Hints
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.siblings import Siblings
from superinfer.runtime.slo import SLO

PAGE = 16
FORK = Hints(group="fork")


def sibling(number: int, prompt: list[int], hints: Hints | None = FORK, slo: SLO | None = None, **kw) -> Sequence:
    return Sequence(id=number, prompt=prompt, max_tokens=4, arrival=0.0, slo=slo, hints=hints, **kw)


def kept_at_first_sight(hints: Hints | None) -> int:
    """Of eight prompts of 1,600 equal tokens and ten of their own, how many first tokens are thought to be in time.
    A prompt alone takes 33 ms on a machine of 20 µs a token, and they are due in 80 ms."""
    scheduler = build_scheduler("rota", KVCache(2000, PAGE), SchedulerLimits(16, 512, 8192))
    for number in range(8):
        prompt = [7] * 1600 + [100 + number] * 10
        scheduler.add(sibling(number, prompt, hints, SLO(ttft=0.08, tbt=1.0)))
    scheduler._look(0.0)
    assert scheduler.plan(0.0) is not None
    return sum(s.kept for s in [*scheduler._running, *scheduler._waiting_kept(0.0)])


def test_a_fork_whose_prefix_need_be_computed_once_is_not_taken_for_as_many_prompts():
    assert kept_at_first_sight(FORK) == 8
    assert kept_at_first_sight(None) < 4


def test_a_prefix_is_computed_once_for_all_siblings_and_they_follow_each_other():
    bench = Bench(blocks=60, dram=0, slots=8, batch_tokens=12, policy="rota")
    common = [5] * 24
    fork = [bench.add([*common, 10 + number], max_tokens=3, hints=FORK) for number in range(4)]
    others = [bench.add([50 + number] * 20, max_tokens=3) for number in range(2)]
    bench.run()
    assert [s.cached for s in fork] == [0, 24, 24, 24]
    bench.check([*fork, *others])
    bench.check_all_given_back()
    assert len(bench.scheduler._siblings) == 0


def test_siblings_go_when_their_first_would_have_gone_although_little_is_left_of_them_to_compute():
    """With promises alike, somebody who came a moment later does not get between the first of a fork and the others."""
    scheduler = build_scheduler("rota", KVCache(2000, PAGE), SchedulerLimits(16, 512, 8192))
    slo = SLO(ttft=2.0, tbt=0.1)
    fork = [sibling(number, [7] * 1600 + [100 + number] * 10, slo=slo) for number in range(3)]
    between = Sequence(id=9, prompt=[9] * 800, max_tokens=4, arrival=0.001, slo=slo)
    for sequence in (*fork, between):
        scheduler.add(sequence)
    order = sorted((*fork, between), key=scheduler._start_by)
    assert [s.id for s in order] == [0, 1, 2, 9]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_what_is_shared_is_whole_blocks_both_have_and_never_the_last_token(one, other):
    siblings = Siblings(4)
    assert siblings.join(sibling(1, one)) == 0
    shared = siblings.join(sibling(2, other))
    assert shared % 4 == 0
    assert shared < len(other)
    assert one[:shared] == other[:shared]
    longer = shared + 4
    assert one[:longer] != other[:longer] or len(other) <= longer or len(one) < longer


@pytest.mark.parametrize("salt", ["", "a"])
def test_who_is_not_of_the_group_or_has_another_salt_shares_nothing(salt):
    siblings = Siblings(4)
    siblings.join(sibling(1, [3] * 20, salt="b"))
    assert siblings.join(sibling(2, [3] * 20, salt=salt)) == 0
    assert siblings.join(sibling(3, [3] * 20, hints=None)) == 0
    assert siblings.join(sibling(4, [3] * 20, hints=Hints(group="another"), salt="b")) == 0
    assert siblings.join(sibling(5, [3] * 20, salt="b")) == 16


def test_a_group_is_forgotten_with_its_last_member():
    siblings = Siblings(4)
    members = [sibling(number, [3] * 20) for number in range(3)]
    for member in members:
        siblings.join(member)
    for member in members:
        assert len(siblings) == 1
        siblings.leave(member)
    assert len(siblings) == 0
