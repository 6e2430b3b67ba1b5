"""Two tiers: whatever rotates, loads, fails or is cancelled, every sequence gets the tokens it would get alone."""

from __future__ import annotations

import random
from itertools import compress

import pytest
from drawn import drawn
from hypothesis import strategies as st
from rotation_bench import Bench

from superinfer.runtime.scheduler.sequence import Sequence

prompts = st.builds(
    lambda shared, own: [7] * shared + own,
    st.integers(0, 14),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
jobs = st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 6)), min_size=2, max_size=10)
shapes = st.fixed_dictionaries(
    dict(
        blocks=st.integers(10, 16),
        dram=st.integers(1, 60),
        slots=st.integers(1, 5),
        batch_tokens=st.integers(5, 20),
        depth=st.integers(1, 3),
        policy=st.sampled_from(["lru", "lru", "fcfs"]),
        quantum=st.sampled_from([0, 0, 1, 3]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        forces=st.booleans(),
        seed=st.integers(0, 2**16),
        eager=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    )
)


def play(bench: Bench, work, max_waits=8, mirror_blocks=32) -> list[Sequence]:
    rotation = bench.scheduler._rotation
    rotation.max_waits, rotation.mirror_blocks = max_waits, mirror_blocks
    sequences = []
    for prompt, max_tokens, pause in work:
        sequences.append(bench.add(prompt, max_tokens))
        for _ in range(pause):
            bench.step()
    return sequences


@drawn(100, 400, jobs, shapes, st.sampled_from([0, 1, 3, 100]), st.sampled_from([0, 1, 32]))
def test_tokens_do_not_depend_on_rotation_or_on_when_copies_land(work, shape, max_waits, mirror_blocks):
    bench = Bench(**shape)
    sequences = play(bench, work, max_waits, mirror_blocks)
    bench.run()
    bench.check(sequences)
    bench.check_all_given_back()


@drawn(
    80,
    300,
    jobs,
    shapes,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 25)), max_size=6),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.sets(st.integers(0, 25), max_size=2),
)
def test_failed_copies_failed_steps_and_cancels_disturb_no_other(work, shape, cancels, fails, failing_steps):
    bench = Bench(**shape)
    bench.executor.fails = fails
    if fails > 0.1:  # losing most rotations, a sequence must get a token out of each residency to come to an end
        bench.scheduler.quantum = 1
    sequences = play(bench, work)
    bench.run_disturbed(sequences, cancels, failing_steps)
    bench.check(sequences)
    bench.check_all_given_back()


def test_a_token_is_not_believed_whose_step_read_what_a_copy_failed_to_bring_though_its_table_was_given_up_since():
    bench = Bench(blocks=11, dram=5, slots=4, batch_tokens=8, depth=3, quantum=1, seed=49, eager=0.1)
    bench.executor.fails = 0.2
    work = [([7] * 12 + [0] * 4, 14, 0), ([0], 5, 1), ([7] * 7 + [0] * 7, 4, 2), ([0], 1, 0)]
    sequences = play(bench, work)
    bench.run(20_000)
    assert bench.kv.totals.failed and sequences[2].preemptions
    bench.check(sequences)
    bench.check_all_given_back()


def test_a_link_on_which_all_copies_fail_is_tried_now_and_then_and_used_again_once_it_works():
    bench = Bench(blocks=12, dram=40, quantum=2)
    bench.executor.fails = 1.0
    sequences = play(bench, [([at] * 9, 8, 1) for at in range(6)])
    bench.run()  # which ends when there is nothing more to plan: no copy is tried again at once
    bench.check(sequences)
    failed = bench.kv.totals.failed

    def wait(seconds):
        for _ in range(5 * seconds):  # as often as an idle engine looks
            bench.now += 0.19
            bench.step()

    wait(300)
    assert 10 <= bench.kv.totals.failed - failed <= 25 and not bench.kv.num_pending
    bench.executor.fails = 0.0
    wait(30)
    assert bench.kv.num_cached > 4 and bench.kv.totals.blocks_out >= bench.kv.num_cached, "all is mirrored by now"
    bench.check_all_given_back()


# ---------------------------------------------------------------------------- planted faults


class Forgetful(list):
    """Stays as it was."""

    def __setitem__(self, at, value):
        pass


def _work_does_not_wait(bench, patch):
    bench.executor.obey_waits = False


def _copies_do_not_wait_for_each_other(bench, patch):
    bench.executor.obey_after = False


def _a_block_changes_hands_without_its_pending_copy(bench, patch):
    patch.setattr(bench.kv.copies, "on_hbm", Forgetful(bench.kv.copies.on_hbm))


def _a_dram_block_changes_hands_without_its_pending_copy(bench, patch):
    patch.setattr(bench.kv.copies, "on_dram", Forgetful(bench.kv.copies.on_dram))


def _a_load_is_not_waited_for_by_who_shares_it(bench, patch):
    adopt, resume = bench.kv.adopt, bench.kv.resume

    def deaf_adopt(table, path):
        adopt(table, path)
        table.awaits = []

    def deaf_resume(table, extra):
        shared = {id for node in table.node.path() for id in node.loading}
        resumed = resume(table, extra)
        table.awaits = [id for id in table.awaits if id not in shared]
        return resumed

    patch.setattr(bench.kv, "adopt", deaf_adopt)
    patch.setattr(bench.kv, "resume", deaf_resume)


def _lose(copies, places):
    """Copies out to these are never made, but count as over."""
    ins, outs = copies._outbox
    lost = [dram in places for dram in outs.dram]
    copies.over([*compress(outs.ids, lost)])
    copies._outbox = ins, outs.pick([at for at, is_lost in enumerate(lost) if not is_lost])


def _the_tail_stays_behind(bench, patch):
    park = bench.kv.park

    def forgetful(table, computed):
        parked = park(table, computed)
        _lose(bench.kv.copies, table.tail)
        return parked

    patch.setattr(bench.kv, "park", forgetful)


def _the_tail_is_freed_in_dram_while_parked(bench, patch):
    park = bench.kv.park

    def early(table, computed):
        parked = park(table, computed)
        if parked:
            bench.kv._free_dram.give(table.tail)
        return parked

    patch.setattr(bench.kv, "park", early)


def _parked_blocks_are_not_pinned(bench, patch):
    park = bench.kv.park

    def loose(table, computed):
        parked = park(table, computed)
        for node in table.node.path() if parked else ():
            if not node.holders:
                bench.kv._order.add(node)
        return parked

    patch.setattr(bench.kv, "park", loose)
    patch.setattr(bench.scheduler._rotation, "is_lost", lambda table: False)


def _dirty_blocks_count_as_mirrored(bench, patch):
    copy_out = bench.kv._copy_out

    def pretend(parts, *private):
        ids = copy_out(parts, *private)
        _lose(bench.kv.copies, {place for node, *_ in parts for place in node.dram})
        return ids

    patch.setattr(bench.kv, "_copy_out", pretend)


def _tokens_of_a_failed_load_are_believed(bench, patch):
    bench.executor.fails = 0.2
    patch.setattr(bench.scheduler, "_drop_broken", lambda now: None)


def _a_failed_copy_out_counts_as_done(bench, patch):
    bench.executor.fails = 0.2
    settle = bench.kv.settle
    patch.setattr(bench.kv, "settle", lambda copied, failed: settle([*copied, *failed], []))


FAULTS = [
    _work_does_not_wait,
    _copies_do_not_wait_for_each_other,
    _a_block_changes_hands_without_its_pending_copy,
    _a_dram_block_changes_hands_without_its_pending_copy,
    _a_load_is_not_waited_for_by_who_shares_it,
    _the_tail_stays_behind,
    _the_tail_is_freed_in_dram_while_parked,
    _parked_blocks_are_not_pinned,
    _dirty_blocks_count_as_mirrored,
    _tokens_of_a_failed_load_are_believed,
    _a_failed_copy_out_counts_as_done,
]


def _storm(seed: int, plant=None, patch=None) -> int:
    """One random schedule that rotates whenever it can, with a `plant`ed fault; AssertionError when anything comes out
    wrong. Returns how often it rotated."""
    rng = random.Random(seed)
    bench = Bench(
        blocks=rng.randrange(10, 16),
        dram=rng.choice([6, 14, 40]),
        slots=rng.randrange(2, 5),
        batch_tokens=rng.randrange(5, 20),
        depth=rng.choice([1, 2]),
        quantum=0,
        seed=seed,
        eager=rng.choice([0.0, 0.1, 0.4]),
    )
    if plant is not None:
        plant(bench, patch)
    work = [
        (
            [7] * rng.choice([0, 9, 13]) + [rng.randrange(4) for _ in range(rng.randrange(1, 12))],
            rng.randrange(1, 14),
            rng.randrange(3),
        )
        for _ in range(8)
    ]
    sequences = play(bench, work, max_waits=rng.choice([0, 2, 100]), mirror_blocks=rng.choice([0, 2, 32]))
    bench.run(600)
    bench.check(sequences)
    bench.check_all_given_back()
    return bench.kv.totals.rotations_out


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_fault_is_caught(plant, monkeypatch):
    for seed in range(60):
        try:
            _storm(seed, plant, monkeypatch)
        except AssertionError:
            return
    raise AssertionError("60 storms did not notice")


@pytest.mark.slow
def test_a_thousand_storms_without_a_fault_change_no_token():
    rotations = [_storm(seed) for seed in range(1000)]
    assert sum(rotations) > 10_000, "storms are to rotate"
