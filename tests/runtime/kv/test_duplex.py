"""The bookkeeping of two tiers: whatever happens, blocks conserve, and no block is in use twice."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from superinfer.runtime.kv.cache import KVCache, Prefix
from superinfer.runtime.kv.copies import BlockCopy
from superinfer.runtime.kv.duplex import DuplexCache, build_cache
from superinfer.runtime.kv.tiers import TierNode, TierTable

PAGE = 4


def tokens_of(*blocks: int, tail: int = 0) -> array:
    """PAGE tokens for each block number, and `tail` more."""
    return array("i", [b * 100 + i for b in blocks for i in range(PAGE)] + [9] * tail)


def compute(kv: DuplexCache, tokens: array, salt: str = "") -> TierTable:
    """A table whose KV for `tokens` is computed and committed."""
    table = kv.open(salt)
    kv.adopt(table, kv.match(tokens, salt, len(tokens) - 1))
    assert kv.allocate(table, kv.blocks_for(len(tokens)) - len(table.blocks)) is not None
    kv.commit(table, tokens, len(tokens))
    return table


def hbm_of(prefix: Prefix) -> list[int]:
    """Its blocks' places in HBM, -1 where there is none."""
    return [block for node, length in prefix.parts() for block in (node.blocks + [-1] * length)[:length]]


def dram_of(prefix: Prefix) -> list[int]:
    """Its blocks' places in DRAM, -1 where there is none."""
    return [place for node, length in prefix.parts() for place in (node.dram + [-1] * length)[:length]]


def land(kv: DuplexCache, failed: tuple[int, ...] = ()) -> bool:
    """All pending copies are reported."""
    kv.take_copies()
    return kv.settle([id for id in sorted(kv.copies.pending) if id not in failed], failed)


def mirrored(kv: DuplexCache, *blocks: int, salt: str = "") -> None:
    """A finished sequence whose blocks are in both tiers."""
    table = compute(kv, tokens_of(*blocks, tail=1), salt)
    kv.mirror(100)
    kv.release(table)
    land(kv)


def fill(kv: DuplexCache) -> TierTable:
    """A table that holds all of HBM that can be had."""
    table = kv.open("filler")
    assert kv.allocate(table, kv.num_available) is not None
    return table


# ---------------------------------------------------------------------------- mirroring and finished turns


def test_a_mirrored_prefix_survives_in_dram_and_is_loaded():
    kv = DuplexCache(6, 10, PAGE)
    mirrored(kv, 1, 2, 3)
    kv.release(fill(kv))
    tokens = tokens_of(1, 2, 3, tail=1)
    path = kv.match(tokens, "", 12)
    assert hbm_of(path) == [-1, -1, -1]
    table = kv.open("")
    kv.adopt(table, path)
    assert kv.allocate(table, 1) is not None
    copies = kv.take_copies()
    assert [(copy.out, copy.hbm) for copy in copies] == [(False, block) for block in table.blocks[:3]]
    assert kv.awaits(table) == [copy.id for copy in copies]


def test_a_dirty_prefix_is_forgotten_when_hbm_is_wanted():
    kv = DuplexCache(6, 10, PAGE)
    kv.release(compute(kv, tokens_of(1, 2, 3, tail=1)))
    kv.release(fill(kv))
    assert len(kv.match(tokens_of(1, 2, 3, tail=1), "", 12)) == 0
    assert kv.totals.forgotten == 3


def test_salts_do_not_share_in_dram():
    kv = DuplexCache(6, 10, PAGE)
    mirrored(kv, 1, 2, salt="a")
    kv.release(fill(kv))
    assert len(kv.match(tokens_of(1, 2, tail=1), "b", 8)) == 0
    assert len(kv.match(tokens_of(1, 2, tail=1), "a", 8)) == 2


def test_dram_drops_the_oldest_but_gives_a_hit_one_more_round():
    kv = DuplexCache(8, 4, PAGE)
    mirrored(kv, 1, 2)
    mirrored(kv, 3, 4)
    kv.release(compute(kv, tokens_of(1, 2, tail=1)))  # hit
    kv.release(compute(kv, tokens_of(3, 4, tail=1), salt="other"))
    mirrored(kv, 5, 6)
    kv.release(fill(kv))
    found = {first: len(kv.match(tokens_of(first, first + 1, tail=1), "", 8)) for first in (1, 3, 5)}
    assert found == {1: 2, 3: 0, 5: 2}


def test_mirroring_keeps_to_its_budget_and_stops_when_dram_is_full_of_parked_blocks():
    kv = DuplexCache(12, 3, PAGE)
    table = compute(kv, tokens_of(1, 2, 3))
    assert kv.park(table, 12)
    other = compute(kv, tokens_of(4, 5, 6, 7))
    land(kv)
    kv.mirror(2)
    assert not kv.take_copies()
    kv.release(table)
    kv.mirror(2)
    assert len(kv.take_copies()) == 2
    kv.mirror(2)
    assert not kv.take_copies()
    kv.release(other)


def test_a_mirror_that_nobody_holds_may_give_its_place_to_the_next_of_the_same_plan_which_follows_it():
    kv = DuplexCache(6, 1, PAGE)
    kv.release(compute(kv, tokens_of(1, tail=1)))
    kv.release(compute(kv, tokens_of(2, tail=1)))
    kv.mirror(100)
    first, second = kv.take_copies()
    assert (first.dram, second.dram, second.after) == (0, 0, (first.id,))
    assert not land(kv, failed=(first.id,)) and known(kv, 1) == known(kv, 2) == 1


def test_a_prefix_longer_than_what_dram_has_idle_is_mirrored_from_its_root_on_and_does_not_drop_itself():
    kv = DuplexCache(6, 2, PAGE)
    kv.release(compute(kv, tokens_of(1, 2, 3, tail=1)))
    kv.mirror(100)
    assert len(kv.take_copies()) == 2
    kv.release(fill(kv))
    assert known(kv, 1, 2, 3) == 2


def test_a_report_of_a_copy_that_is_not_under_way_is_refused():
    kv = DuplexCache(6, 10, PAGE)
    compute(kv, tokens_of(1, 2))
    kv.mirror(100)
    ids = [copy.id for copy in kv.take_copies()]
    kv.settle(ids[:1], ())
    with pytest.raises(RuntimeError, match="of 2 copies reported, 1 are not under way"):
        kv.settle(ids, ())


# ---------------------------------------------------------------------------- rotation


def test_a_rotation_moves_only_what_is_not_mirrored():
    kv = DuplexCache(8, 10, PAGE)
    table = compute(kv, tokens_of(1, 2, 3, tail=2))
    kv.mirror(2)
    land(kv)
    last, tail_block = table.blocks[2:]
    assert kv.park(table, 14)
    assert [(copy.out, copy.hbm) for copy in kv.take_copies()] == [(True, last), (True, tail_block)]
    assert kv.num_available == 8
    assert (kv.totals.rotated, kv.totals.rotated_clean) == (4, 2)


def test_of_a_sequence_nine_tenths_of_which_are_mirrored_less_than_a_tenth_moves_when_it_leaves():
    kv = DuplexCache(120, 200, PAGE)
    table = compute(kv, tokens_of(*range(1, 100), tail=2))  # 100 blocks
    kv.mirror(91)
    land(kv)
    assert kv.park(table, 99 * PAGE + 2)
    assert len(kv.take_copies()) == 9  # 8 that are full, and the tail
    assert (kv.totals.rotated, kv.totals.rotated_clean) == (100, 91)


def test_a_block_given_up_is_waited_for_by_who_gets_it_next():
    kv = DuplexCache(2, 10, PAGE)
    table = compute(kv, tokens_of(1, tail=2))
    assert kv.park(table, 6)
    outs = {copy.hbm: copy.id for copy in kv.take_copies()}
    other = kv.open("")
    assert sorted(kv.allocate(other, 2)) == [0, 1]
    assert sorted(kv.awaits(other)) == sorted(outs.values())
    kv.release(other)
    assert kv.resume(table, 0)
    loads = kv.take_copies()
    assert all(outs[copy.hbm] in copy.after for copy in loads)


def test_what_is_still_in_hbm_is_not_loaded_again():
    kv = DuplexCache(8, 10, PAGE)
    table = compute(kv, tokens_of(1, 2, 3, tail=2))
    assert kv.park(table, 14)
    land(kv)
    other = kv.open("other")
    assert kv.allocate(other, 6) is not None  # one of three full blocks has to leave
    assert not kv.resume(table, 0)
    kv.release(other)
    assert kv.resume(table, 0)
    assert len(kv.take_copies()) == 2  # that block, and the tail
    assert len(table.blocks) == 4


def test_a_prefix_that_another_holds_stays_and_costs_nothing():
    kv = DuplexCache(8, 10, PAGE)
    first, second = compute(kv, tokens_of(1, 2, 3, tail=1)), compute(kv, tokens_of(1, 2, 4, tail=1))
    assert kv.park(second, 13)
    assert kv.num_available == 8 - 4
    assert hbm_of(second.prefix)[:2] == first.blocks[:2]


def test_without_room_in_dram_a_rotation_changes_nothing():
    kv = DuplexCache(8, 3, PAGE)
    table = compute(kv, tokens_of(1, 2, 3, tail=1))
    before = list(table.blocks)
    assert not kv.park(table, 13)
    assert (table.blocks, kv.num_dram_free, kv.num_dram_pinned, len(kv.take_copies())) == (before, 3, 0, 0)


def test_a_rotation_takes_the_mirrors_of_running_sequences_when_it_must():
    kv = DuplexCache(8, 4, PAGE)
    running = compute(kv, tokens_of(1, 2, 3, 4))
    kv.mirror(10)
    land(kv)
    table = compute(kv, tokens_of(5, 6, 7))
    assert kv.park(table, 12)
    assert (kv.num_dram_pinned, kv.num_dram_free) == (3, 0)
    assert [place >= 0 for place in dram_of(running.prefix)] == [True, False, False, False]
    land(kv)
    kv.release(table)
    kv.mirror(10)
    assert all(place >= 0 for place in dram_of(running.prefix)), "it is mirrored again once there is room"


def test_what_a_rotated_sequence_needs_stays_in_dram_when_another_that_shared_it_ends():
    kv = DuplexCache(8, 4, PAGE)
    table, sharing = compute(kv, tokens_of(1, 2, tail=1)), compute(kv, tokens_of(1, 2, tail=1))
    assert kv.park(table, 8)
    kv.release(sharing)
    land(kv)
    for at in range(3, 9, 2):  # all the room that is not needed, and more than once round
        mirrored(kv, at, at + 1)
    kv.release(fill(kv))
    assert kv.resume(table, 0) and kv.is_intact(table)
    assert len(kv.take_copies()) == 2


def test_what_is_computed_though_it_is_in_dram_is_in_hbm_for_all_without_a_copy():
    kv = DuplexCache(6, 10, PAGE)
    mirrored(kv, 1, 2)
    kv.release(fill(kv))
    table = kv.open("")
    kv.allocate(table, 2)
    kv.commit(table, tokens_of(1, 2), 8)
    assert hbm_of(kv.match(tokens_of(1, 2), "", 8)) == table.blocks
    assert not kv.take_copies()


def test_a_load_that_fails_after_its_block_was_computed_takes_nothing_away():
    kv = DuplexCache(3, 10, PAGE)
    mirrored(kv, 1, 2)
    kv.release(fill(kv))
    assert kv.prefetch(kv.match(tokens_of(1, 2), "", 8), most=2) == 2
    loads = [copy.id for copy in kv.take_copies()]
    kv.release(fill(kv))  # wants the room before they have come
    table = kv.open("")
    kv.allocate(table, 2)
    kv.commit(table, tokens_of(1, 2), 8)
    assert not kv.settle([], loads)
    assert kv.is_intact(table) and known(kv, 1, 2) == 2


# ---------------------------------------------------------------------------- failures


def test_a_failed_mirror_leaves_the_block_dirty_and_is_tried_again():
    kv = DuplexCache(8, 8, PAGE)
    table = compute(kv, tokens_of(1, 2))
    kv.mirror(10)
    assert not land(kv, failed=(1,))
    assert [place >= 0 for place in dram_of(table.prefix)] == [False, True]
    kv.mirror(10)
    assert [copy.hbm for copy in kv.take_copies()] == table.blocks[:1]


def test_a_failed_tail_is_known():
    kv = DuplexCache(8, 8, PAGE)
    table = compute(kv, tokens_of(1, tail=2))
    assert kv.park(table, 6)
    assert land(kv, failed=(2,))
    assert not kv.is_intact(table)


def test_a_failed_load_takes_the_node_and_what_is_under_it_out_of_the_tree():
    kv = DuplexCache(6, 10, PAGE)
    mirrored(kv, 1, 2, 3)
    kv.release(fill(kv))
    table = compute(kv, tokens_of(1, 2, 3, tail=1))
    second = [copy.id for copy in kv.take_copies()][1]
    assert land(kv, failed=(second,))
    assert not kv.is_intact(table)
    kv.release(table)
    assert len(kv.match(tokens_of(1, 2, 3, tail=1), "", 12)) == 1


def test_a_failed_load_is_told_to_who_was_parked_meanwhile_and_to_no_other():
    kv = DuplexCache(4, 10, PAGE)
    mirrored(kv, 1, 2)
    kv.release(fill(kv))
    table = compute(kv, tokens_of(1, 2, tail=1))  # a step under way reads what is being loaded
    first = next(copy.id for copy in kv.take_copies())
    assert kv.park(table, 9)
    filler = fill(kv)  # the node being loaded leaves HBM again
    assert land(kv, failed=(first,))
    assert not kv.is_intact(table)
    assert kv.is_intact(filler)


def test_a_copy_that_reads_what_a_failed_one_should_have_written_counts_as_failed():
    kv = DuplexCache(2, 10, PAGE)
    table = compute(kv, tokens_of(1, tail=1))
    assert kv.park(table, 5)
    kv.release(fill(kv))
    assert kv.resume(table, 0)
    out, *_ = (copy for copy in kv.take_copies() if copy.out)
    kv._drop_dram(table.node, 0)  # as when a rotation wants the room
    assert land(kv, failed=(out.id,))
    assert not kv.is_intact(table)
    assert kv.totals.failed == 2


def test_a_mirror_made_anew_that_fails_is_known_though_the_one_before_it_was_made():
    kv = DuplexCache(8, 2, PAGE)
    running = compute(kv, tokens_of(1))
    kv.mirror(10)
    parked = compute(kv, tokens_of(2, 3))
    assert kv.park(parked, 8)  # takes the mirror's place, on its way as it is
    kv.release(parked)
    kv.clear()
    kv.mirror(10)
    first, *_, again = (copy.id for copy in kv.take_copies())
    assert not kv.settle([first], [])
    assert not land(kv, failed=(again,))
    assert dram_of(running.prefix) == [-1], "what was never written counts as a mirror"


def test_what_is_written_anew_after_a_failed_copy_out_is_loaded():
    kv = DuplexCache(2, 1, PAGE)
    first = compute(kv, tokens_of(1))
    assert kv.park(first, 4)
    kv.release(first)
    kv.clear()
    second = compute(kv, tokens_of(2))
    assert kv.park(second, 4)
    kv.release(fill(kv))
    assert kv.resume(second, 0)
    failed, written, loaded = kv.take_copies()
    assert (failed.dram, written.dram, loaded.dram) == (0, 0, 0)
    assert not land(kv, failed=(failed.id,))
    assert kv.is_intact(second)


@pytest.mark.parametrize(("dram", "kind"), [(0, KVCache), (5, DuplexCache)])
def test_there_is_a_second_tier_only_where_there_are_blocks_for_it(dram, kind):
    assert type(build_cache(4, dram, PAGE)) is kind


def test_a_second_tier_needs_a_block():
    with pytest.raises(ValueError, match="num_dram=0"):
        DuplexCache(4, 0, PAGE)


# ---------------------------------------------------------------------------- kept and prefetched


def kept(kv: DuplexCache, until: float, *blocks: int) -> None:
    """A finished sequence whose blocks are in both tiers, and promised until then."""
    table = compute(kv, tokens_of(*blocks, tail=1))
    kv.mirror(100)
    kv.keep(table, until)
    kv.release(table)
    land(kv)


def known(kv: DuplexCache, *blocks: int) -> int:
    """How many leading blocks are cached, wherever."""
    return len(kv.match(tokens_of(*blocks), "", PAGE * len(blocks)))


def test_what_is_to_be_kept_outlives_what_is_younger():
    kv = DuplexCache(6, 6, PAGE)
    kept(kv, 10.0, 1, 2)
    mirrored(kv, 3, 4)
    mirrored(kv, 5, 6)
    kv.release(fill(kv))  # only DRAM has them now
    mirrored(kv, 7, 8)
    assert known(kv, 1, 2) == 2 and known(kv, 3, 4) == 0 and known(kv, 5, 6) == 2


def test_its_time_over_it_is_the_next_to_go():
    kv = DuplexCache(6, 6, PAGE)
    kept(kv, 10.0, 1, 2)
    mirrored(kv, 3, 4)
    mirrored(kv, 5, 6)
    kv.release(fill(kv))
    kv.let_go(9.9)
    assert kv._order.num_kept == 2
    kv.let_go(10.0)
    mirrored(kv, 7)
    assert known(kv, 1, 2) == 1, "the end of the path goes before what it hangs on"
    assert known(kv, 3, 4) == known(kv, 5, 6) == 2


def test_a_later_promise_stands_and_a_rotation_in_need_breaks_it():
    kv = DuplexCache(6, 4, PAGE)
    kept(kv, 10.0, 1, 2)
    kept(kv, 20.0, 1, 2)
    kv.let_go(15.0)
    assert kv._order.num_kept == 2
    kv.release(fill(kv))
    table = compute(kv, tokens_of(5, 6, 7, tail=1))
    kv.mirror(100)
    assert len(kv.take_copies()) == 2, "mirrors do not push out what is to be kept"
    assert kv.park(table, 13)
    assert known(kv, 1, 2) == 0


def test_a_prefetched_path_is_here_when_it_is_asked_for_and_is_waited_for():
    kv = DuplexCache(6, 10, PAGE)
    mirrored(kv, 1, 2, 3)
    kv.release(fill(kv))
    assert kv.prefetch(kv.match(tokens_of(1, 2, 3), "", 12), most=2) == 2
    loads = [copy.id for copy in kv.take_copies()]
    assert len(loads) == 2 and kv.totals.prefetched == 2
    table = kv.open("")
    kv.adopt(table, kv.match(tokens_of(1, 2, 3, tail=1), "", 12))
    assert kv.allocate(table, 1) is not None
    assert set(loads) < set(kv.awaits(table)) and len(kv.awaits(table)) == 3
    land(kv)
    assert not kv.awaits(table) and kv.totals.hits == 1


def test_a_parked_sequence_is_brought_near_before_its_turn():
    kv = DuplexCache(6, 10, PAGE)
    table = compute(kv, tokens_of(1, 2, tail=1))
    assert kv.park(table, 9)
    land(kv)
    kv.release(fill(kv))
    assert kv.prefetch(table.prefix, most=10) == 2
    land(kv)
    assert kv.resume(table, 0)
    assert len(kv.take_copies()) == 1, "the tail alone is left to come"


def test_prefetching_loses_nothing_and_takes_nothing_from_who_computes():
    kv = DuplexCache(4, 10, PAGE)
    mirrored(kv, 1, 2, 3)
    kv.release(fill(kv))
    dirty = compute(kv, tokens_of(7, tail=1))
    kv.release(dirty)
    running = kv.open("")
    assert kv.allocate(running, 3) is not None
    assert kv.prefetch(kv.match(tokens_of(1, 2, 3), "", 12), most=3) == 0, "only a dirty block could make room"
    kv.release(running)
    assert kv.prefetch(kv.match(tokens_of(1, 2, 3), "", 12), most=3) == 3
    assert known(kv, 7) == 1


# ---------------------------------------------------------------------------- random lives


def check_conserved(kv: DuplexCache, tables: list[TierTable]) -> None:
    """Every block of either pool is free once, or is in exactly one place."""
    nodes: set[TierNode] = set()
    stack = [child for root in kv._roots.values() for child in root.children.values()]
    while stack:
        node = stack.pop()
        assert node.alive and node.length == max(len(node.blocks), len(node.dram)) > 0, "a block without a place"
        assert (len(node.loading), len(node.mirroring)) == (len(node.blocks), len(node.dram))
        assert node.start == node.parent.end and len(node.key) == 4 * PAGE * node.length
        assert node.parent.children[bytes(node.key[: 4 * PAGE])] is node
        nodes.add(node)
        stack += node.children.values()
    hbm = [b for n in nodes for b in n.blocks] + list(kv._free)
    hbm += [b for t in tables if not t.parked for b in (*t.blocks[t.num_cached :], *t.spare)]
    assert sorted(hbm) == list(range(kv.num_blocks))
    dram = [p for n in nodes for p in n.dram] + list(kv._free_dram) + [d for t in tables for d in t.tail]
    assert sorted(dram) == list(range(kv.num_dram))
    parked = {n for t in tables if t.parked for n in t.node.path() if n.alive}
    assert parked == {n for n in nodes if n.parked}
    assert kv._pinned == sum(len(n.dram) for n in parked) + sum(len(t.tail) for t in tables)
    assert set(kv._idle) == {n for n in nodes if n.holders == 0 and n.blocks}
    assert kv.num_cached == sum(len(n.blocks) for n in kv._idle)
    assert set(kv._order.mirrors) == {n for n in nodes if n.holders and not n.parked and n.dram}
    droppable = {n for n in nodes if not n.holders and not n.parked}
    assert {n for n in droppable if n.dram} <= set(kv._order) <= droppable
    assert {n for n in kv._order if n.keep_until} == set(kv._order._kept)
    held = {n: sum(n in t.node.path() for t in tables if not t.parked) for n in nodes}
    assert all(n.holders == held[n] for n in nodes)
    assert all(len(n.blocks) == n.length for n in nodes if n.holders), "a held block is not in HBM"


class DuplexLives:
    """Random operations over a DuplexCache; shared by the state machine and the long run."""

    def __init__(self, kv: DuplexCache) -> None:
        self.kv = kv
        self.live: list[tuple[TierTable, array]] = []
        self.under_way: list[BlockCopy] = []
        self.now = 0.0

    def begin(self, blocks, tail, salt) -> None:
        kv, tokens = self.kv, tokens_of(*blocks, tail=tail)
        table = kv.open(salt)
        kv.adopt(table, kv.match(tokens, salt, len(tokens) - 1))
        if kv.allocate(table, kv.blocks_for(len(tokens)) - len(table.blocks)) is None:
            kv.release(table)
            return
        self.live.append((table, tokens))

    def commit(self, at, amount) -> None:
        table, tokens = self.live[at % len(self.live)]
        if not table.parked:
            low = table.num_cached * PAGE
            self.kv.commit(table, tokens, low + amount % (len(tokens) - low + 1))

    def rotate(self, at) -> None:
        table, tokens = self.live[at % len(self.live)]
        if not table.parked:
            self.kv.park(table, max(table.num_cached * PAGE, len(tokens) - 1))
        elif self.kv.is_intact(table):
            self.kv.resume(table, self.kv.blocks_for(len(tokens)) - table.num_cached - len(table.tail))

    def end(self, at) -> None:
        self.kv.release(self.live.pop(at % len(self.live))[0])

    def report(self, choose) -> None:
        """Some pending copies are over: `choose(id)` gives 0 not yet, 1 done, 2 failed."""
        kv = self.kv
        self.under_way += kv.take_copies()
        fate: dict[int, int] = {}
        for copy in self.under_way:  # one cannot be over before those it comes after
            early = any(fate.get(before) == 0 for before in copy.after)
            fate[copy.id] = 0 if early else choose(copy.id)
        self.under_way = [copy for copy in self.under_way if not fate[copy.id]]
        hurt = kv.settle([id for id, f in fate.items() if f == 1], [id for id, f in fate.items() if f == 2])
        if hurt:
            for table, _ in [pair for pair in self.live if not kv.is_intact(pair[0])]:
                kv.release(table)
                self.live = [pair for pair in self.live if pair[0] is not table]

    def keep(self, at, until) -> None:
        """Time passes, too."""
        self.now += 1
        self.kv.keep(self.live[at % len(self.live)][0], self.now + until)
        self.kv.let_go(self.now)

    def prefetch(self, blocks, most, salt) -> None:
        tokens = tokens_of(*blocks)
        self.kv.prefetch(self.kv.match(tokens, salt, len(tokens)), most)
        for table, _ in self.live[:1]:
            if table.parked and self.kv.is_intact(table):
                self.kv.prefetch(table.prefix, most)

    def finish(self) -> None:
        while self.live:
            self.end(0)
        self.report(lambda id: 1)
        self.kv.clear()
        assert (self.kv.num_free, self.kv.num_dram_free) == (self.kv.num_blocks, self.kv.num_dram)
        assert not (self.kv._roots or self.kv._idle or self.kv._order or self.kv._order.mirrors)
        assert not self.kv.num_dram_pinned
        assert self.kv.copies.is_clear()


class DuplexMachine(RuleBasedStateMachine):
    """Sequences begin, grow, commit, rotate, end; copies land late or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = DuplexLives(DuplexCache(10, 8, PAGE))

    @rule(blocks=st.lists(st.integers(0, 2), max_size=4), tail=st.integers(1, PAGE), salt=st.sampled_from(["", "x"]))
    def begin(self, blocks, tail, salt):
        self.lives.begin(blocks, tail, salt)

    @precondition(lambda self: self.lives.live)
    @rule(at=st.integers(0, 9), amount=st.integers(0, 20))
    def commit(self, at, amount):
        self.lives.commit(at, amount)

    @precondition(lambda self: self.lives.live)
    @rule(at=st.integers(0, 9))
    def rotate(self, at):
        self.lives.rotate(at)

    @precondition(lambda self: self.lives.live)
    @rule(at=st.integers(0, 9))
    def end(self, at):
        self.lives.end(at)

    @rule(budget=st.integers(0, 5))
    def mirror(self, budget):
        self.lives.kv.mirror(budget)

    @rule(fates=st.lists(st.sampled_from([0, 1, 1, 2]), min_size=1, max_size=5))
    def report(self, fates):
        self.lives.report(lambda id: fates[id % len(fates)])

    @precondition(lambda self: self.lives.live)
    @rule(at=st.integers(0, 9), until=st.integers(0, 6))
    def keep(self, at, until):
        self.lives.keep(at, until)

    @rule(blocks=st.lists(st.integers(0, 2), max_size=4), most=st.integers(0, 3), salt=st.sampled_from(["", "x"]))
    def prefetch(self, blocks, most, salt):
        self.lives.prefetch(blocks, most, salt)

    @rule()
    def clear(self):
        self.lives.kv.clear()

    @invariant()
    def conserved(self):
        check_conserved(self.lives.kv, [table for table, _ in self.lives.live])

    def teardown(self):
        self.lives.finish()


@pytest.mark.parametrize("examples", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_random_lives(examples):
    run_state_machine_as_test(DuplexMachine, settings=settings(max_examples=examples, stateful_step_count=40))


def test_a_hundred_thousand_operations_with_cancels_and_failures_leak_nothing():
    rng = random.Random(0)
    lives = DuplexLives(DuplexCache(48, 64, PAGE))
    for turn in range(100_000):
        at = rng.randrange(16)
        match rng.randrange(8) if lives.live and len(lives.live) < 12 else 7 if not lives.live else 6:
            case 0 | 1:
                lives.commit(at, rng.randrange(20))
            case 2 | 3:
                lives.rotate(at)
            case 4:
                lives.kv.mirror(4)
            case 5:
                lives.report(lambda id: rng.choice([0, 1, 1, 1, 2]))
            case 6:
                if turn % 3 == 0:
                    lives.keep(at, rng.randrange(20))
                    lives.prefetch([rng.randrange(3) for _ in range(4)], 3, "")
                lives.end(at)
            case _:
                lives.begin([rng.randrange(3) for _ in range(rng.randrange(5))], 1, rng.choice(["", "x"]))
        if turn % 500 == 0:
            check_conserved(lives.kv, [table for table, _ in lives.live])
    assert min(lives.kv.totals.rotations_in, lives.kv.totals.failed, lives.kv.totals.hits) > 1000
    assert len(lives.kv._dirty) < 500
    lives.finish()
