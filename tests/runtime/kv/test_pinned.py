"""Pinned host memory: pieces, what happens when memory or pinning is refused, and where it lies."""

from __future__ import annotations

import logging
import mmap

import numpy as np
import pytest

from superinfer.runtime.kv.pinned import RESERVE_BYTES, PinnedPool, available_bytes, numa_node


class Pins:
    """Stands in for the driver: remembers what is registered, refuses after `room` pieces."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.held: dict[int, int] = {}

    def register(self, address: int, size: int) -> None:
        if len(self.held) == self.room:
            raise RuntimeError("planted refusal")
        pages = {a // mmap.PAGESIZE for a in range(address, address + size, mmap.PAGESIZE)}
        for start, length in self.held.items():
            taken = {a // mmap.PAGESIZE for a in range(start, start + length, mmap.PAGESIZE)}
            assert not pages & taken, "a page was pinned twice"
        self.held[address] = size

    def unregister(self, address: int) -> None:
        del self.held[address]


def pool(num_blocks: int, block_bytes: int, pins: Pins, **kw) -> PinnedPool:
    return PinnedPool(num_blocks, block_bytes, register=pins.register, unregister=pins.unregister, **kw)


@pytest.mark.parametrize("block_bytes", [192, 4096, 40_960, 100_000])
def test_all_blocks_are_pinned_in_pieces_of_whole_blocks(block_bytes):
    pins, seen = Pins(), []
    mine = pool(500, block_bytes, pins, piece_bytes=1 << 20, on_progress=lambda stage, done: seen.append(done))
    assert mine.num_blocks == 500 and not mine.shortfall
    assert sum(pins.held.values()) == 500 * block_bytes
    for address, size in pins.held.items():
        assert (address - mine.address) % block_bytes == 0 and size % block_bytes == 0
        assert (address - mine.address) // block_bytes % mine.piece_blocks == 0
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen)
    blocks = mine.blocks((block_bytes // 4,), np.dtype(np.uint32))
    blocks[:] = np.arange(500, dtype=np.uint32)[:, None]
    assert (mine.array[: 500 * block_bytes].view(np.uint32).reshape(500, -1)[:, -1] == np.arange(500)).all()
    del blocks
    mine.close()
    assert not pins.held


def test_a_refusal_to_pin_makes_the_pool_smaller_and_says_so(caplog):
    pins = Pins(room=2)
    with caplog.at_level(logging.WARNING):
        mine = pool(100, 1 << 16, pins, piece_bytes=1 << 20)
    assert mine.num_blocks == 32 and "planted refusal" in mine.shortfall and "ulimit -l" in caplog.text
    mine.close()
    none = pool(100, 1 << 16, Pins(room=0))
    assert none.num_blocks == 0


def test_memory_that_is_not_there_is_not_taken(caplog):
    left = [RESERVE_BYTES + (3 << 20), RESERVE_BYTES + (2 << 20), RESERVE_BYTES + (1 << 20) - 1]
    with caplog.at_level(logging.WARNING):
        mine = pool(100, 1 << 16, Pins(), piece_bytes=1 << 20, available=lambda: left.pop(0), patience_s=0)
    assert mine.num_blocks == 32 and "memory are free" in caplog.text
    mine.close()


def test_memory_that_comes_late_is_waited_for_once():
    left = [0, RESERVE_BYTES + (1 << 20), 0, 0, 0]
    mine = pool(32, 1 << 16, Pins(), piece_bytes=1 << 20, available=lambda: left.pop(0), patience_s=0.15)
    assert mine.num_blocks == 16 and not left[1:]
    mine.close()


def test_more_address_space_than_there_is_leaves_no_pool_and_no_exception():
    mine = pool(1 << 40, 1 << 21, Pins())
    assert mine.num_blocks == 0 and "address space" in mine.shortfall
    mine.close()


def test_a_pool_on_a_node_that_does_not_exist_is_made_all_the_same(caplog):
    with caplog.at_level(logging.WARNING):
        mine = pool(10, 4096, Pins(), node=900)
    assert mine.num_blocks == 10 and "NUMA node 900" in caplog.text
    mine.close()
    mine = pool(10, 4096, Pins(), node=0)
    assert mine.num_blocks == 10
    mine.close()


def test_the_system_says_where_a_gpu_is_and_what_is_free(tmp_path):
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "numa_node").write_text("1\n")
    assert numa_node("0000:1b:00.0", tmp_path) == 1
    (tmp_path / "0000:1b:00.0" / "numa_node").write_text("-1\n")
    assert numa_node("0000:1b:00.0", tmp_path) is None
    assert numa_node("0000:ff:00.0", tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     8 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 8192 and available_bytes(tmp_path / "none") is None
