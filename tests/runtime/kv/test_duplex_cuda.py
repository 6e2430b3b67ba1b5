"""The CUDA body on a device that is not there: whatever legal time copies take, order and bytes are right.

What only a GPU can show is in tests/gpu/test_duplex.py.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_executor import expected_output
from stream_double import COMPUTE, LateSubmitter, StreamDouble
from stream_executor import StreamExecutor

from superinfer.runtime.kv import copy_batches
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.copy_batches import Arranger, Places, moves_of_copies
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status

WORDS = 16  # of a block, 8 bytes each


class Rig:
    """A CudaDuplex between two arrays, on a double."""

    def __init__(self, hbm: int = 6, dram: int = 4, seed: int = 0, submitter=None, **double) -> None:
        numbers = np.random.default_rng(seed)
        self.hbm = numbers.integers(0, 1 << 62, (hbm, WORDS), dtype=np.uint64)
        self.dram = numbers.integers(0, 1 << 62, (dram, WORDS), dtype=np.uint64)
        self.device = StreamDouble(seed, **double)
        self.submitter = submitter or LateSubmitter(seed)
        places = Places(self.hbm.ctypes.data, self.dram.ctypes.data, WORDS * 8, 3)
        self.duplex = CudaDuplex(self.device, places, submitter=self.submitter)

    def finish_step(self) -> tuple[list[int], list[int]]:
        """What `collect` does: wait for the compute stream, then report."""
        self.device.synchronize(COMPUTE)
        return self.duplex.report()[:2]

    def settle(self) -> tuple[list[int], list[int]]:
        """Everything to its end."""
        self.submitter.finish(self.duplex._jobs)
        for stream in list(self.device.streams):
            self.device.synchronize(stream)
        return self.duplex.report()[:2]


def chained(rng: random.Random, count: int, hbm: int, dram: int, first: int = 1, last=None) -> list[BlockCopy]:
    """Random copies with `after` as the bookkeeping gives it: every copy follows the last one on each of its blocks."""
    last = {} if last is None else last
    copies = []
    for id in range(first, first + count):
        copy = BlockCopy(id, rng.random() < 0.5, rng.randrange(hbm), rng.randrange(dram))
        keys = (("hbm", copy.hbm), ("dram", copy.dram))
        after = tuple(sorted({last[key] for key in keys if key in last}))
        last |= dict.fromkeys(keys, id)
        copies.append(BlockCopy(id, copy.out, copy.hbm, copy.dram, after))
    return copies


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.7]), st.sampled_from([1, 3, 64])
)
def test_random_copies_end_as_one_after_another_would(seed, lazy, late, most):
    rng = random.Random(seed)
    rig = Rig(seed=seed, lazy=lazy, submitter=LateSubmitter(seed, late))
    rig.duplex._arranger._most = most
    hbm, dram, last, reported, id = rig.hbm.copy(), rig.dram.copy(), {}, [], 1
    for _ in range(8):
        copies = chained(rng, rng.randrange(8), 6, 4, id, last)
        id += len(copies)
        waits = rng.sample(range(1, id), min(id - 1, rng.randrange(3)))
        rig.duplex.start(Copies.of(copies), waits)
        rig.duplex.wait(waits)
        for copy in copies:
            if copy.out:
                dram[copy.dram] = hbm[copy.hbm]
            else:
                hbm[copy.hbm] = dram[copy.dram]
        if rng.random() < 0.7:
            copied, failed = rig.finish_step()
            reported += copied
            assert not failed and set(waits) <= set(reported), "a result lacks what its plan waited for"
    reported += rig.settle()[0]
    assert np.array_equal(rig.hbm, hbm) and np.array_equal(rig.dram, dram)
    assert sorted(reported) == list(range(1, id)), "every copy is reported once"
    assert not any(rig.duplex._arranger._seqs + rig.duplex._arranger._unnoted) and len(rig.duplex._spans) <= 2


def test_a_report_never_comes_before_that_of_what_it_followed():
    for seed in range(200):
        rng = random.Random(seed)
        rig = Rig(seed=seed, lazy=0.6)
        rig.duplex._arranger._most = 2
        rig.device.fails = rng.choice([0.0, 0.3])
        copies = chained(rng, 14, 6, 4)
        rig.duplex.start(Copies.of(copies))
        after, seen = {copy.id: copy.after for copy in copies}, set()
        while len(seen) < 14:
            rig.device.pass_time()
            rig.submitter.finish(min(rig.duplex._jobs, rig.submitter.done + 1))
            copied, failed, _ = rig.duplex.report()
            seen |= {*copied, *failed}
            assert all(set(after[id]) <= seen for id in (*copied, *failed))


def test_a_report_never_comes_before_that_of_what_a_refused_batch_followed():
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        rig = Rig(seed=seed, lazy=0.6, submitter=LateSubmitter(seed, late=1.0))
        rig.duplex._arranger._most = 2
        copies = chained(rng, 14, 6, 4)
        rig.duplex.start(Copies.of(copies))
        after, seen = {copy.id: copy.after for copy in copies}, set()
        for _ in range(1000):
            rig.device.pass_time()
            rig.device.refuses = lambda name, rng=rng: name == "copy" and rng.random() < 0.2
            rig.submitter.finish(min(rig.duplex._jobs, rig.submitter.done + rng.randrange(3)))
            rig.device.refuses = lambda name: False
            copied, failed, use = rig.duplex.report()
            refused += len(failed)
            seen |= {*copied, *failed}
            assert all(set(after[id]) <= seen for id in (*copied, *failed))
            assert min(use) >= 0.0
            if len(seen) == 14:
                break
        else:
            raise AssertionError("copies that are never reported")
    assert refused > 300


def test_what_is_held_back_is_submitted_when_the_step_has_been_unless_it_waits_for_it():
    rig = Rig(hbm=40, dram=40)
    duplex = CudaDuplex(rig.device, rig.duplex._places)
    duplex._arranger._most = 4
    copies = [BlockCopy(id, True, id, id) for id in range(40)]
    before = duplex._submitter.done
    duplex.start(Copies.of(copies), wanted=[30], hold=True)
    time.sleep(0.05)
    assert duplex._submitter.done == before, "the thread would take the GIL from who submits the step"
    duplex.wait([30])
    assert 0 < duplex._submitter.done < duplex._jobs, "what the step waits for is in, and no more"
    rig.device.synchronize(COMPUTE)
    assert 30 in duplex.report()[0]
    duplex.release()
    until = time.monotonic() + 10
    while duplex._submitter.done < duplex._jobs and time.monotonic() < until:
        time.sleep(0.001)
    duplex.close()
    assert np.array_equal(rig.dram, rig.hbm)


def test_a_stream_waits_for_the_work_before_once_and_a_run_of_batches_has_one_begin():
    calls: list[str] = []
    rig = Rig(hbm=64, dram=64)
    rig.duplex._arranger._most = 2
    rig.device.refuses = lambda name: calls.append(name) or False
    for plan in range(2):
        rig.duplex.start(Copies.of(BlockCopy(64 * plan + id, id % 2 == 0, id, id) for id in range(64)))
        assert len(rig.settle()[0]) == 64
    assert calls.count("copy") == 2 * 2 * 3, "three batches of each direction and plan"
    assert calls.count("wait") == 2 * 2, "one for each stream and plan"
    # For each plan a fence, a begin for each stream, an end for each batch.
    assert calls.count("record") == 2 * (1 + 2 + 2 * 3)


def test_work_waits_for_what_it_needs_and_for_nothing_else():
    rig = Rig(hbm=200, dram=200, lazy=1.0, submitter=LateSubmitter(late=1.0))
    rig.duplex._arranger._most = 4
    rig.duplex.start(Copies.of(BlockCopy(id, True, id, id) for id in range(1, 100)), wanted=[90])
    rig.duplex.wait([90])
    done = []
    rig.device.launch(lambda: done.append(sum(rig.device.events[b.end].reached > 0 for b in rig.duplex._under_way[1])))
    rig.device.synchronize(COMPUTE)
    assert np.array_equal(rig.dram[90], rig.hbm[90])
    assert done[0] < len(rig.duplex._under_way[1]), "it waited for copies it does not need"


def test_a_swap_in_follows_the_swap_out_it_takes_the_room_of_a_batch_behind():
    overlaps = []
    for most in (4, 64):
        rig = Rig(hbm=64, dram=128, lazy=1.0)
        rig.duplex._arranger._most = most
        _exchange(rig)
        overlaps.append(rig.device.both_at_once)
    assert overlaps[0] >= 4 and overlaps[1] == 0, "in and out are to run at once"


def _exchange(rig: Rig) -> None:
    """64 blocks leave, 64 others take their places."""
    outs = [BlockCopy(1 + at, True, at, at) for at in range(64)]
    ins = [BlockCopy(65 + at, False, at, 64 + at, (1 + at,)) for at in range(64)]
    old_hbm, old_dram = rig.hbm.copy(), rig.dram.copy()
    rig.duplex.start(Copies.of([*outs, *ins]))
    rig.settle()
    assert np.array_equal(rig.dram[:64], old_hbm) and np.array_equal(rig.hbm, old_dram[64:])


def test_what_a_plan_waits_for_goes_first_with_what_it_follows():
    arranger = Arranger(1 << 20)
    arranger._most = 2
    copies = [BlockCopy(id, True, id, id) for id in range(1, 9)]
    copies += [BlockCopy(9, False, 20, 20), BlockCopy(10, False, 8, 21, after=(8,))]
    batches = arranger.arrange(Copies.of(copies), wanted=[10])
    order = [(batch.out, batch.ids) for batch in batches]
    assert order[0] == (True, [8]) and (False, [10]) in order
    follower = next(batch for batch in batches if batch.ids == [10])
    assert follower.after == 1


def test_both_streams_soon_have_work():
    arranger = Arranger(16 << 20)
    batches = arranger.arrange(Copies.of(BlockCopy(id, id < 10, id, id) for id in range(20)), wanted=())
    assert [batch.out for batch in batches[:4]] == [True, False, True, False]
    assert [batch.seq for batch in batches if batch.out] == [1, 2]


def test_batches_grow_where_nothing_follows_anything():
    arranger = Arranger(16 << 20)

    def some_free(count: int) -> Copies:
        return Copies.of(BlockCopy(1000 * count + id, True, id, id) for id in range(count))

    free = arranger.arrange(some_free(40), wanted=())
    assert [len(batch.ids) for batch in free] == [2, 16, 16, 6]
    assert [len(batch.ids) for batch in arranger.arrange(some_free(20), wanted=())] == [2, 18], "no batch of a few more"


def test_batches_of_copies_that_follow_each_other_grow_less_and_are_cut_alike():
    arranger = Arranger(16 << 20)
    chained = [BlockCopy(60 + id, id % 2 == 0, id, id, (60 + id - 1,) if id % 2 else ()) for id in range(20)]
    batches = arranger.arrange(Copies.of(chained), wanted=())
    outs, ins = [[batch for batch in batches if batch.out is out] for out in (True, False)]
    assert [len(batch.ids) for batch in outs] == [len(batch.ids) for batch in ins] == [2, 4, 4]
    assert [batch.after for batch in ins] == [1, 2, 3], "each follows one of the other direction, not the last of all"


def test_who_follows_a_copy_that_is_over_waits_for_nothing_and_what_is_over_is_forgotten(monkeypatch):
    monkeypatch.setattr(copy_batches, "MOST_NAMES", 8)
    rig = Rig(hbm=64, dram=64)
    duplex, held_up = rig.duplex, rig.device.events[rig.device.new_event()]
    held_up.recorded = 1
    rig.device.streams[duplex._streams[False]].append(["wait", held_up, 1])
    duplex.start(Copies.of([BlockCopy(1, False, 0, 0)]))  # under way all the time
    for id in range(2, 40):
        duplex.start(Copies.of([BlockCopy(id, True, id, id)]))
        rig.submitter.finish(duplex._jobs)
        rig.device.synchronize(duplex._streams[True])
        assert duplex.report()[0] == [id]
        assert sum(map(len, duplex._arranger._seqs + duplex._arranger._unnoted)) <= 1 + 8
    duplex.start(Copies.of([BlockCopy(40, False, 39, 39, (39,)), BlockCopy(41, True, 50, 50, (1,))]))
    followers = {batch.ids[0]: batch for ways in duplex._under_way for batch in ways}
    assert followers[40].wait == 0 and followers[41].wait == followers[1].end
    held_up.reached = 1
    assert rig.settle()[0] == [41, 1, 40]


def test_of_many_copies_under_way_names_are_gathered_anew_seldom(monkeypatch):
    """Not with each report, each of which would then cost as much as there is under way."""
    monkeypatch.setattr(copy_batches, "MOST_NAMES", 8)
    arranger = Arranger(16 << 20)
    under_way, known, gathered = deque(), 0, 0
    for id in range(3000):
        under_way += arranger.arrange(Copies.of([BlockCopy(id, True, id, id)]), wanted=())
        assert arranger.find(id) is under_way[-1]
        if len(under_way) > 1000:
            arranger.forget([under_way.popleft()])
        names = len(arranger._seqs[True])
        gathered, known = gathered + (names < known), names
        assert names <= 2 * 1000 + 2
    assert 0 < gathered < 10


def test_copies_that_fail_are_told_once_and_do_not_hold_up_others():
    rig = Rig(hbm=50, dram=50, seed=3)
    rig.device.fails = 0.3
    rig.duplex.start(Copies.of(BlockCopy(id, True, id, id) for id in range(50)))
    copied, failed = rig.settle()
    assert sorted([*copied, *failed]) == list(range(50)) and 5 < len(failed) < 25
    for id in copied:
        assert np.array_equal(rig.dram[id], rig.hbm[id])
    assert rig.settle() == ([], [])


@pytest.mark.parametrize("call", ["wait", "record", "copy"])
def test_a_device_that_refuses_a_call_fails_the_copies_and_hangs_nobody(call):
    rig = Rig(submitter=LateSubmitter(late=1.0))
    rig.duplex.start(Copies.of([BlockCopy(1, True, 0, 0), BlockCopy(2, False, 0, 1, after=(1,))]))
    rig.device.refuses = lambda name: name == call
    rig.submitter.finish(2)
    rig.device.refuses = lambda name: False
    rig.duplex.wait([2])
    rig.device.synchronize(COMPUTE)
    assert sorted(rig.duplex.report()[1]) == [1, 2]
    rig.duplex.start(Copies.of([BlockCopy(3, True, 1, 1)]))
    assert rig.settle() == ([3], [])


def test_the_thread_submits_in_order_and_ends():
    rig = Rig(hbm=40, dram=40, lazy=0.1)
    threaded = CudaDuplex(rig.device, rig.duplex._places)
    hbm, dram, id, last, told = rig.hbm.copy(), rig.dram.copy(), 1, {}, []
    rng = random.Random(5)
    for _ in range(60):
        copies = chained(rng, 12, 40, 40, id, last)
        id += 12
        threaded.start(Copies.of(copies), [id - 1])
        threaded.wait([id - 1])
        for copy in copies:
            if copy.out:
                dram[copy.dram] = hbm[copy.hbm]
            else:
                hbm[copy.hbm] = dram[copy.dram]
        rig.device.synchronize(COMPUTE)
        told += threaded.report()[0]
        assert id - 1 in told
    threaded._submitter.finish(threaded._jobs)
    for stream in list(rig.device.streams):
        rig.device.synchronize(stream)
    told += threaded.report()[0]
    assert sorted(told) == list(range(1, id))
    assert np.array_equal(rig.hbm, hbm) and np.array_equal(rig.dram, dram)
    assert len(threaded._events) < 300, "events are to be used again"
    thread = threaded._submitter._thread
    threaded.close()
    assert not thread.is_alive()


def test_busy_and_stalled_seconds_add_up():
    rig = Rig(hbm=64, dram=128, lazy=1.0)
    rig.duplex._arranger._most = 8
    rig.duplex.start(Copies.of(BlockCopy(id, id % 2 == 0, id, id) for id in range(64)))
    rig.duplex.wait([0, 1])
    rig.submitter.finish(rig.duplex._jobs)
    for stream in list(rig.device.streams):
        rig.device.synchronize(stream)
    use = rig.duplex.report()[2]
    assert 0 < use.both_s <= min(use.in_s, use.out_s)
    assert use.in_s + use.out_s - use.both_s <= rig.device.now
    assert 0 < use.stall_s <= rig.device.now
    assert rig.duplex.report()[2] == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30), st.booleans())
def test_neighbours_join_and_every_byte_still_goes_where_it_should(pairs, out):
    copies = [BlockCopy(id, out, *pair) for id, pair in enumerate(pairs)]
    wanted = {
        (copy.dram * 8 + 5000, copy.hbm * 8 + 1000) if out else (copy.hbm * 8 + 1000, copy.dram * 8 + 5000)
        for copy in copies
    }
    moves = moves_of_copies(copies, Places(1000, 5000, 8, 4))
    found = set()
    for move, (dst, src, size) in enumerate(zip(*(part.tolist() for part in moves[:3]), strict=True)):
        first = dst if out else src
        assert [copies[at].dram * 8 + 5000 for at in moves.copies_of(move)] == [*range(first, first + size, 8)]
        for at in range(0, size, 8):
            found.add((dst + at, src + at))
        first, last = ((dst if out else src) - 5000, (dst if out else src) - 5000 + size - 8)
        assert first // 32 == last // 32, "a move must not reach from one pinned piece into the next"
    assert found == wanted
    assert moves.sizes.sum() == 8 * len(pairs)


def test_runs_of_small_blocks_are_few_moves_and_large_blocks_stay_apart():
    copies = [BlockCopy(id, True, 40 - id, 140 - id) for id in range(32)]
    assert len(moves_of_copies(copies, Places(0, 0, 1 << 16, 1000)).sizes) == 1
    assert len(moves_of_copies(copies, Places(0, 0, 2 << 20, 1000)).sizes) == 32
    assert copy_batches.BATCH_BYTES // (2 << 20) == 16


# ---------------------------------------------------------------------------- with the scheduler


class Bench:
    """A scheduler that rotates whenever it can over a StreamExecutor, up to `depth` steps ahead."""

    def __init__(self, seed: int, depth: int, policy: str = "lru") -> None:
        rng = self.random = random.Random(seed)
        blocks = rng.randrange(10, 16)
        self.kv = DuplexCache(blocks, rng.choice([6, 14, 40]), 4)
        limits = SchedulerLimits(rng.randrange(2, 5), rng.randrange(5, 20), blocks * 4)
        self.scheduler = build_scheduler(policy, self.kv, limits)
        self.scheduler.quantum, self.scheduler.headroom = rng.choice([0, 0, 2]), 0
        self.scheduler.worth, self.scheduler.idle_share = 0.0, math.inf  # whatever it costs
        self.scheduler._rotation.max_waits = rng.choice([0, 2, 100])
        self.scheduler._rotation.mirror_blocks = rng.choice([0, 2, 32])
        lazy, late = rng.choice([0.0, 0.3, 0.8]), rng.choice([0.0, 0.5])
        self.executor = StreamExecutor(blocks, self.kv.num_dram, 4, seed=seed, lazy=lazy, late=late)
        self.executor.duplex._arranger._most = rng.choice([1, 2, 8])
        self.depth, self.now = depth, 0.0
        self.outputs: dict[int, list[int]] = {}
        self.planned: deque[int] = deque()
        self.sequences: list[Sequence] = []

    def add(self) -> None:
        rng, id = self.random, len(self.sequences)
        prompt = [7] * rng.choice([0, 9, 13]) + [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
        sequence = Sequence(id=id, prompt=prompt, max_tokens=rng.randrange(1, 14), arrival=self.now)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def step(self) -> bool:
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            try:
                self.executor.submit(plan)
                self.planned.append(plan.step)
            except RuntimeError:
                self.scheduler.abort(plan.step, self.now)
        if self.planned and (plan is None or len(self.planned) >= self.depth):
            self.planned.popleft()
            for update in self.scheduler.commit(self.executor.collect(), self.now):
                self.outputs.setdefault(update.sequence.id, []).extend(update.token_ids)
            return True
        return plan is not None

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def check(self) -> None:
        for sequence in self.sequences:
            assert sequence.status is Status.FINISHED
            if sequence.finish_reason not in ("cancelled", None):
                wanted = expected_output(list(sequence.tokens[: sequence.num_prompt]), sequence.max_tokens)
                assert self.outputs[sequence.id] == wanted
        kv = self.kv
        assert kv.num_pending == 0
        kv.clear()
        assert (kv.num_free, kv.num_dram_free, kv.num_dram_pinned) == (kv.num_blocks, kv.num_dram, 0)


def storm(seed: int, plant=None, jobs: int = 8) -> int:
    """One random schedule; returns how often it rotated. AssertionError when anything comes out wrong."""
    bench = Bench(seed, depth=1 + seed % 3)
    if plant is not None:
        plant(bench)
    for _ in range(jobs):
        bench.add()
        for _ in range(bench.random.randrange(3)):
            bench.step()
    bench.run()
    bench.check()
    return bench.kv.totals.rotations_out


def test_two_hundred_storms_over_late_streams_change_no_token():
    assert sum(storm(seed) for seed in range(200)) > 2000, "storms are to rotate"


def test_failed_copies_failed_steps_and_cancels_disturb_no_other():
    for seed in range(60):
        bench = Bench(seed, depth=1 + seed % 3)
        bench.executor.fails = 0.05
        bench.scheduler.quantum = 1
        for _ in range(8):
            bench.add()
            bench.executor.fail_next = bench.random.random() < 0.1
            bench.step()
            bench.executor.fail_next = False
        bench.scheduler.cancel(bench.sequences[seed % 8], bench.now)
        bench.run(20_000)
        bench.check()


# ---------------------------------------------------------------------------- planted faults


def _work_does_not_wait(bench):
    bench.executor.obey_waits = False


def _submit_changed(bench, **fields):
    """Each batch is submitted with these fields instead of its own."""
    duplex = bench.executor.duplex
    submit = duplex._submit_one

    def changed(batch):
        for name, value in fields.items():
            setattr(batch, name, value)
        submit(batch)

    duplex._submit_one = changed


def _copies_do_not_wait_for_the_work_before(bench):
    fence = bench.executor.device.new_event()  # recorded never: waiting for it is waiting for nothing
    _submit_changed(bench, fence=fence)


def _copies_of_later_plans_do_not_wait_for_the_work_before(bench):
    _submit_changed(bench, plan=1)


def _a_batch_does_not_wait_for_the_other_direction(bench):
    _submit_changed(bench, wait=0)


def _copies_of_a_plan_do_not_follow_each_other(bench):
    arranger = bench.executor.duplex._arranger
    arrange = arranger.arrange

    def flat(copies, wanted):
        mine = {copy.id for copy in copies}
        flattened = [copy._replace(after=tuple(id for id in copy.after if id not in mine)) for copy in copies]
        return arrange(Copies.of(flattened), wanted)

    arranger.arrange = flat


def _work_waits_for_events_not_yet_recorded(bench):
    bench.executor.submitter.late = 0.9
    finish = bench.executor.submitter.finish
    duplex = bench.executor.duplex
    wait = duplex.wait

    def hasty(ids):
        bench.executor.submitter.finish = lambda count: None
        wait(ids)
        bench.executor.submitter.finish = finish

    duplex.wait = hasty


def _events_are_reused_while_a_job_still_names_them(bench):
    bench.executor.submitter.late = 0.9
    duplex = bench.executor.duplex

    class Hasty(deque):
        def append(self, item):
            super().append((0, item[1]))

    duplex._free_events = Hasty()
    start = duplex.start

    def early(copies, wanted=()):
        start(copies, wanted)
        for batches in duplex._under_way:
            duplex._free_events += [(0, batch.fence) for batch in batches if batch.job == duplex._jobs][:1]

    duplex.start = early


def _reports_come_when_copies_are_submitted(bench):
    bench.executor.duplex._is_over = lambda batch, other: batch.job <= bench.executor.submitter.done


def _failures_are_not_told(bench):
    bench.executor.fails = 0.2
    report = bench.executor.duplex.report
    bench.executor.duplex.report = lambda: (lambda c, f, use: ([*c, *f], [], use))(*report())


FAULTS = [
    _work_does_not_wait,
    _copies_do_not_wait_for_the_work_before,
    _copies_of_later_plans_do_not_wait_for_the_work_before,
    _a_batch_does_not_wait_for_the_other_direction,
    _copies_of_a_plan_do_not_follow_each_other,
    _work_waits_for_events_not_yet_recorded,
    _events_are_reused_while_a_job_still_names_them,
    _reports_come_when_copies_are_submitted,
    _failures_are_not_told,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_fault_is_caught(plant):
    for seed in range(80):
        try:
            storm(seed, plant)
        except AssertionError:
            return
    raise AssertionError("80 storms did not notice")
