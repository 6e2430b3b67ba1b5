"""The block pool and the prefix tree."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from superinfer.runtime.kv.cache import NO_PREFIX, BlockTable, KVCache, Prefix

PAGE = 4


def tokens_of(*blocks: int, tail: int = 0) -> array:
    """PAGE tokens for each block number, and `tail` more."""
    return array("i", [b * 100 + i for b in blocks for i in range(PAGE)] + [9] * tail)


def compute(kv: KVCache, tokens: array, salt: str = "") -> BlockTable:
    """A table whose KV for `tokens` is computed and committed."""
    path = kv.match(tokens, salt, len(tokens) - 1)
    table = kv.open(salt)
    kv.adopt(table, path)
    assert kv.allocate(table, kv.blocks_for(len(tokens)) - len(table.blocks)) is not None
    kv.commit(table, tokens, len(tokens))
    return table


def blocks_of(prefix: Prefix) -> list[int]:
    return [block for node, length in prefix.parts() for block in node.blocks[:length]]


def test_a_second_sequence_shares_the_blocks_of_an_equal_prefix():
    kv = KVCache(16, PAGE)
    first = compute(kv, tokens_of(1, 2, 3, tail=1))
    second = compute(kv, tokens_of(1, 2, 4, tail=1))
    assert second.blocks[:2] == first.blocks[:2]
    assert set(second.blocks[2:]).isdisjoint(first.blocks)
    assert kv.num_free == 16 - 6


def test_of_a_matched_prefix_the_first_blocks_may_be_held_and_the_rest_idle():
    kv = KVCache(16, PAGE)
    long, short = compute(kv, tokens_of(1, 2, 3, tail=1)), compute(kv, tokens_of(1, 2, tail=1))
    kv.release(long)
    path = kv.match(tokens_of(1, 2, 3, tail=1), "", 12)
    assert (len(path), kv.num_held(path)) == (3, 2)
    kv.release(short)
    assert kv.num_held(path) == 0


def test_a_released_prefix_is_found_again():
    kv = KVCache(16, PAGE)
    first = compute(kv, tokens_of(1, 2, tail=1))
    blocks = list(first.blocks)
    kv.release(first)
    assert (kv.num_free, kv.num_cached) == (14, 2)
    assert blocks_of(kv.match(tokens_of(1, 2, 3), "", 12)) == blocks[:2]


def test_a_match_leaves_the_last_token_to_compute():
    kv = KVCache(16, PAGE)
    compute(kv, tokens_of(1, 2))
    assert len(kv.match(tokens_of(1, 2), "", limit=7)) == 1


def test_salts_do_not_share():
    kv = KVCache(16, PAGE)
    compute(kv, tokens_of(1, 2, tail=1), salt="a")
    assert len(kv.match(tokens_of(1, 2, tail=1), "b", 9)) == 0
    assert len(kv.match(tokens_of(1, 2, tail=1), "a", 9)) == 2


def test_a_salt_that_nothing_uses_is_forgotten():
    kv = KVCache(4, PAGE)
    for salt in map(str, range(100)):
        kv.release(compute(kv, tokens_of(1, 2), salt))
    assert len(kv._roots) <= 4


def test_eviction_takes_the_oldest_and_children_before_parents():
    kv = KVCache(5, PAGE)
    kv.release(compute(kv, tokens_of(1, 2)))
    kv.release(compute(kv, tokens_of(5, 6)))
    table = kv.open("")
    assert kv.allocate(table, 2) is not None  # one block was free, one is evicted: block 2, the older leaf
    assert len(kv.match(tokens_of(1, 2, 3), "", 12)) == 1
    assert len(kv.match(tokens_of(5, 6, 3), "", 12)) == 2


def test_long_prefixes_are_found_to_the_block_wherever_they_part_or_end():
    kv = KVCache(1000, PAGE)
    trunk = list(range(1, 101))
    kv.release(compute(kv, tokens_of(*trunk, tail=1)))
    for parts in (0, 1, 15, 16, 17, 31, 32, 50, 99, 100):
        tokens = tokens_of(*trunk[:parts], *range(500, 540), tail=1)
        assert len(kv.match(tokens, "", len(tokens) - 1)) == parts
        kv.release(compute(kv, tokens))
        found = kv.match(tokens, "", len(tokens) - 1)
        assert len(found) == parts + 40
        assert b"".join(node.key for node in found.node.path()) == tokens[:-1].tobytes()
    kv.clear()
    assert len(kv.match(tokens_of(*trunk), "", 400)) == 0


@pytest.mark.parametrize("proven", [0, 5, 16, 20])
def test_what_is_not_proven_of_a_prefix_can_be_forgotten_and_only_that(proven):
    """Of a path with branches on either side."""
    kv = KVCache(200, PAGE)
    tokens = tokens_of(*range(40), tail=1)
    kv.release(compute(kv, tokens[: proven * PAGE + 1]))
    path = kv.match(tokens, "", len(tokens))
    table = kv.open("")
    kv.adopt(table, path)
    assert kv.allocate(table, 41 - proven) is not None
    kv.commit(table, tokens, 40 * PAGE, is_proven=False)
    beside = compute(kv, tokens_of(*range(proven), 77, 78, tail=1))
    kv.release(table)
    kv.release(beside)
    assert len(kv.match(tokens, "", len(tokens))) == 40
    node = kv.unproven(tokens, "")
    assert node.start == proven
    kv.forget(node)
    assert kv.unproven(tokens, "") is None
    assert len(kv.match(tokens, "", len(tokens))) == proven
    assert len(kv.match(tokens_of(*range(proven), 77, 78), "", 1000)) == proven + 2
    assert kv.num_free == 200 - proven - 2
    again = compute(kv, tokens)
    assert len(kv.match(tokens, "", len(tokens))) == 40
    kv.release(again)
    kv.clear()
    assert kv.num_free == 200


def test_what_is_left_of_a_branch_is_given_up_before_what_it_hangs_on():
    kv = KVCache(10, PAGE)
    kv.release(compute(kv, tokens_of(1, 2, 9)))
    tokens = tokens_of(1, 2, 3, 4)
    table = kv.open("")
    kv.adopt(table, kv.match(tokens, "", len(tokens)))
    assert len(table.blocks) == 2 and kv.allocate(table, 2) is not None
    kv.commit(table, tokens, 3 * PAGE)
    kv.commit(table, tokens, 4 * PAGE, is_proven=False)
    kv.release(table)
    kv.forget(kv.unproven(tokens, ""))
    assert len(kv.match(tokens, "", len(tokens))) == 3
    assert kv.allocate(kv.open(""), 8) is not None
    assert len(kv.match(tokens, "", len(tokens))) == 2
    assert kv.allocate(kv.open(""), 2) is not None


def test_blocks_are_proven_by_whoever_attends_to_them():
    kv = KVCache(40, PAGE)
    tokens = tokens_of(1, 2, 3, 4, tail=1)
    table = kv.open("")
    assert kv.allocate(table, 5) is not None
    kv.commit(table, tokens, 8, is_proven=False)
    compute(kv, tokens_of(1, 7, tail=1))
    kv.commit(table, tokens, 16, is_proven=False)
    assert kv.unproven(tokens, "").start == 1  # the first block is the other's, too
    kv.prove(table)
    assert kv.unproven(tokens, "") is None


def test_allocation_that_does_not_fit_changes_nothing():
    kv = KVCache(3, PAGE)
    table = compute(kv, tokens_of(1, 2))
    before = list(table.blocks), kv.num_free, kv.num_cached
    assert kv.allocate(table, 2) is None
    assert (list(table.blocks), kv.num_free, kv.num_cached) == before


def test_the_block_another_sequence_is_computing_is_known():
    kv = KVCache(16, PAGE)
    tokens = tokens_of(1, 2, tail=1)
    table = kv.open("")
    kv.allocate(table, 3)
    kv.announce(table, tokens)
    assert kv.is_being_computed(tokens, "", NO_PREFIX)
    kv.commit(table, tokens, PAGE)
    kv.announce(table, tokens)
    path = kv.match(tokens, "", 8)
    assert len(path) == 1
    assert kv.is_being_computed(tokens, "", path)
    kv.release(table)
    assert not kv.is_being_computed(tokens, "", path)


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    kv = KVCache(8, PAGE, prefix_cache=False)
    kv.release(compute(kv, tokens_of(1, 2, tail=1)))
    assert (kv.num_free, kv.num_cached) == (8, 0)


@pytest.mark.parametrize(("blocks", "page"), [(0, 16), (16, 0)])
def test_a_pool_needs_blocks_and_a_page(blocks, page):
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(blocks, page)


class CacheMachine(RuleBasedStateMachine):
    """Random sequences begin, grow, commit and end; counts conserve and content is what the tree says."""

    BLOCKS = 12

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCache(self.BLOCKS, PAGE)
        self.live: list[tuple[BlockTable, array]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(blocks=st.lists(st.integers(0, 2), max_size=4), tail=st.integers(1, PAGE), salt=st.sampled_from(["", "x"]))
    def begin(self, blocks, tail, salt):
        tokens = tokens_of(*blocks, tail=tail)
        table = self.kv.open(salt)
        path = self.kv.match(tokens, salt, len(tokens) - 1)
        self.kv.adopt(table, path)
        for at, block in enumerate(blocks_of(path)):
            assert self.content[block] == (salt, *tokens[: (at + 1) * PAGE]), "a match is another prefix"
        if self.kv.allocate(table, self.kv.blocks_for(len(tokens)) - len(path)) is None:
            self.kv.release(table)
            return
        for at in range(len(path), len(tokens) // PAGE):
            self.content[table.blocks[at]] = (salt, *tokens[: (at + 1) * PAGE])
        self.kv.announce(table, tokens)
        self.live.append((table, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data):
        table, tokens = data.draw(st.sampled_from(self.live))
        self.kv.commit(table, tokens, data.draw(st.integers(table.num_cached * PAGE, len(tokens))))

    @precondition(lambda self: self.live)
    @rule(at=st.integers(0, 100))
    def end(self, at):
        table, _ = self.live.pop(at % len(self.live))
        self.kv.release(table)

    @rule()
    def clear(self):
        self.kv.clear()
        assert self.kv.num_cached == 0

    @invariant()
    def counts_conserve(self):
        held = {block for table, _ in self.live for block in (*table.blocks, *table.spare)}
        held |= {block for table, _ in self.live for node in table.node.path() for block in node.blocks}
        idle = {block for node in self.kv._idle for block in node.blocks}
        assert len(idle) == self.kv.num_cached
        free = set(self.kv._free)
        assert len(free) == len(self.kv._free), "a block is free twice"
        assert not (held & idle or held & free or idle & free)
        assert len(held) + len(idle) + len(free) == self.BLOCKS

    @invariant()
    def private_blocks_have_one_owner(self):
        private = [b for table, _ in self.live for b in table.blocks[table.num_cached :]]
        assert len(private) == len(set(private))

    def teardown(self):
        for table, _ in self.live:
            self.kv.release(table)
        self.kv.clear()
        assert self.kv.num_free == self.BLOCKS
        assert not self.kv._roots
        assert not self.kv._being_computed


@pytest.mark.parametrize("examples", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_random_lives(examples):
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=examples, stateful_step_count=40))


def test_a_hundred_thousand_operations_leak_nothing():
    rng = random.Random(0)
    kv = KVCache(64, PAGE)
    live: list[BlockTable] = []
    for _ in range(100_000):
        if live and (rng.random() < 0.5 or len(live) > 10):
            kv.release(live.pop(rng.randrange(len(live))))
            continue
        tokens = tokens_of(*(rng.randrange(4) for _ in range(rng.randrange(5))), tail=1)
        table = kv.open("")
        kv.adopt(table, kv.match(tokens, "", len(tokens) - 1))
        if kv.allocate(table, kv.blocks_for(len(tokens)) - len(table.blocks)) is None:
            kv.release(table)
            continue
        kv.commit(table, tokens, len(tokens))
        live.append(table)
    for table in live:
        kv.release(table)
    kv.clear()
    assert kv.num_free == 64
