"""The CPU body: the time a link takes, the order a plan asks for, and bytes that come back as they went."""

from __future__ import annotations

import random

import pytest
import torch

from superinfer.runtime.kv.copies import BlockCopy, LinkUse
from superinfer.runtime.kv.duplex_cpu import CpuDuplex
from superinfer.runtime.kv.link import VirtualLink

SHAPE = (6, 2, 2, 4, 1, 8)  # blocks, layers, key and value, page, heads, head dim
BLOCK_BYTES = 2 * 2 * 4 * 8 * 4


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def body(clock: Clock, block_s: float | None = 1.0, latency_s: float = 0.0) -> CpuDuplex:
    """A body on which one block takes `block_s` seconds each way."""
    rate = BLOCK_BYTES / block_s if block_s else None
    return CpuDuplex(torch.randn(SHAPE), 4, bytes_per_s=rate, latency_s=latency_s, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_that_went_out_and_came_back_is_bit_exact(dtype):
    bits = torch.randint(-(2**15), 2**15, SHAPE, dtype=torch.int16)  # any pattern, NaNs and denormals too
    hbm = bits.view(torch.bfloat16 if dtype is torch.float32 else dtype).clone()
    duplex = CpuDuplex(hbm, 2)
    duplex.start([BlockCopy(1, True, 0, 1)])
    duplex.wait([1])
    duplex.start([BlockCopy(2, False, 5, 1)])
    duplex.wait([2])
    assert torch.equal(hbm[5].view(torch.int16), bits[0])
    assert torch.equal(hbm[:5].view(torch.int16), bits[:5])
    assert duplex.report()[:2] == ([1, 2], [])


def test_a_copy_is_over_when_the_link_says_so_and_not_before():
    clock = Clock()
    duplex = body(clock, latency_s=0.5)
    before = duplex.hbm[0].clone()
    duplex.start([BlockCopy(1, True, 0, 0)])
    clock.now = 1.4
    assert duplex.report()[0] == []
    assert not duplex.dram[0].any()
    clock.now = 1.5
    assert duplex.report()[0] == [1]
    assert torch.equal(duplex.dram[0], before)


def test_both_directions_run_at_once_and_copies_of_one_queue():
    clock = Clock()
    duplex = body(clock)
    duplex.start([BlockCopy(1, True, 0, 0), BlockCopy(2, True, 1, 1), BlockCopy(3, False, 2, 2)])
    duplex.wait([3])
    assert clock.now == 1.0
    duplex.wait([2])
    assert clock.now == 2.0
    copied, failed, use = duplex.report()
    assert (copied, failed) == ([1, 3, 2], [])
    assert use == LinkUse(in_s=1.0, out_s=2.0, both_s=1.0, stall_s=2.0)


@pytest.mark.parametrize("latency_s", [0.0, 0.5])
def test_a_copy_starts_after_those_it_must_follow(latency_s):
    clock = Clock()
    duplex = body(clock, latency_s=latency_s)
    old, new = duplex.hbm[0].clone(), duplex.dram[3].normal_().clone()
    duplex.start([BlockCopy(1, True, 0, 0), BlockCopy(2, False, 0, 3, after=(1,))])
    duplex.wait([2])
    assert clock.now == 2.0 + 2 * latency_s
    assert torch.equal(duplex.dram[0], old) and torch.equal(duplex.hbm[0], new)


def test_work_that_waits_for_what_has_been_reported_goes_on():
    clock = Clock()
    duplex = body(clock)
    duplex.start([BlockCopy(1, True, 0, 0)])
    duplex.wait([1])
    duplex.report()
    duplex.wait([1])
    assert clock.now == 1.0


def test_a_copy_that_errs_is_reported_once_and_others_go_on():
    clock = Clock()
    duplex = body(clock)
    move = duplex.copy_block

    def fails_once(copy: BlockCopy) -> None:
        if copy.id == 1:
            raise RuntimeError("planted failure")
        move(copy)

    duplex.copy_block = fails_once
    duplex.start([BlockCopy(1, True, 0, 0), BlockCopy(2, True, 1, 1)])
    duplex.wait([1, 2])
    assert duplex.report()[:2] == ([2], [1])
    assert duplex.report()[:2] == ([], [])


def test_random_copies_end_as_one_after_another_would():
    """Chains through `after` as the bookkeeping makes them: every copy follows the last one on either of its blocks."""
    rng = random.Random(3)
    for _ in range(50):
        clock = Clock()
        duplex = body(clock, block_s=rng.choice([0.1, 1.0]), latency_s=rng.choice([0.0, 0.3]))
        duplex.dram.normal_()
        hbm, dram = duplex.hbm.clone(), duplex.dram.clone()
        last: dict[tuple[str, int], int] = {}
        for id in range(1, 25):
            copy = BlockCopy(id, rng.random() < 0.5, rng.randrange(6), rng.randrange(4))
            keys = (("hbm", copy.hbm), ("dram", copy.dram))
            after = tuple({last[key] for key in keys if key in last})
            last |= dict.fromkeys(keys, id)
            duplex.start([BlockCopy(id, copy.out, copy.hbm, copy.dram, after)])
            if copy.out:
                dram[copy.dram] = hbm[copy.hbm]
            else:
                hbm[copy.hbm] = dram[copy.dram]
            clock.now += rng.random() * 0.5
        duplex.wait(range(1, 25))
        assert torch.equal(duplex.hbm, hbm) and torch.equal(duplex.dram, dram)
        assert sorted(duplex.report()[0]) == list(range(1, 25))


def test_a_link_keeps_no_record_of_what_is_over():
    link = VirtualLink(1000, 1e6)
    for id in range(1, 5000):
        link.start([BlockCopy(id, True, 0, 0)], now=id * 0.01)
        link.finished(id * 0.01 + 0.005)
    assert link.num_under_way == 0
    assert len(link._over) + len(link._queued) < 4


def test_both_directions_share_what_the_link_moves_in_total():
    link = VirtualLink(100, 100.0, out_bytes_per_s=50.0, total_bytes_per_s=75.0)  # 1 s in, 2 s out, alone
    link.start([BlockCopy(1, False, 0, 0), BlockCopy(2, True, 1, 1)], now=0.0)
    assert link.over_at([1], 0.0) == pytest.approx(2.0)  # at half its rate
    assert link.over_at([2], 0.0) == pytest.approx(3.0)  # 50 bytes at half its rate, the others alone
    use = link.take_use()
    assert (use.in_s, use.out_s, use.both_s) == pytest.approx((2.0, 3.0, 2.0))


@pytest.mark.parametrize("wrong", [{"bytes_per_s": 0.0}, {"total_bytes_per_s": -1.0}, {"latency_s": -1.0}])
def test_a_link_of_no_speed_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        VirtualLink(1000, **wrong)
