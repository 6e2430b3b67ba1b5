"""Measures a link through the device that will use it: blocks scattered in both pools, both ways, alone and at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from superinfer.runtime.kv.copies import BlockCopy
from superinfer.runtime.kv.copy_batches import Places, moves_of_copies
from superinfer.runtime.kv.copy_device import CopyDevice
from superinfer.runtime.kv.link_profile import LinkProfile

ROUND_S = 0.03  # of one measurement: 1.5 GB of PCIe 5 are not needed to know its speed
ROUNDS = 3  # of each kind; the best counts, for a link can only be disturbed
MOST_BLOCKS = 512
PROBE_BLOCKS = 8

# How one direction's copies are given to a stream.
Issue = Callable[[int, Sequence[BlockCopy]], None]


def measure_link(device: CopyDevice, places: Places, hbm_blocks: int, dram_blocks: int, kind: str) -> LinkProfile:
    """In well under a second. Both pools must be free: what lies there is moved about. Raises RuntimeError where copies
    fail, or where there is no block for each direction."""
    if min(hbm_blocks, dram_blocks) < 2:
        raise RuntimeError("a link is measured with at least two blocks in each pool")

    def issue(stream: int, copies: Sequence[BlockCopy]) -> None:
        moves = moves_of_copies(copies, places)
        if device.copy(stream, moves.dsts, moves.srcs, moves.sizes):
            raise RuntimeError("copies between the tiers fail")

    most = min(MOST_BLOCKS, hbm_blocks // 2, dram_blocks // 2)
    few = scattered(min(PROBE_BLOCKS, most), hbm_blocks, dram_blocks)
    timed(device, issue, few)  # the first copies pay for what the driver sets up
    slowest = max(timed(device, issue, few))
    count = max(1, min(most, int(len(few[0]) * ROUND_S / max(slowest, 1e-9))))
    both = scattered(count, hbm_blocks, dram_blocks)
    size = count * places.block_bytes
    alone_in = min(timed(device, issue, (both[0], []))[0] for _ in range(ROUNDS))
    alone_out = min(timed(device, issue, ([], both[1]))[1] for _ in range(ROUNDS))
    at_once = min((timed(device, issue, both) for _ in range(ROUNDS)), key=sum)
    return LinkProfile(
        kind, places.block_bytes, size / alone_in, size / alone_out, size / at_once[0], size / at_once[1]
    )


def scattered(count: int, hbm_blocks: int, dram_blocks: int, seed: int = 0) -> tuple[list[BlockCopy], list[BlockCopy]]:
    """`count` copies in and `count` out between random blocks, all of them different."""
    rng = np.random.default_rng(seed)
    hbm = rng.permutation(hbm_blocks)[: 2 * count].tolist()
    dram = rng.permutation(dram_blocks)[: 2 * count].tolist()
    copies = [BlockCopy(i, i >= count, hbm[i], dram[i]) for i in range(2 * count)]
    return copies[:count], copies[count:]


def timed(
    device: CopyDevice,
    issue: Issue,
    ways: tuple[Sequence[BlockCopy], Sequence[BlockCopy]],
    chunk: int = MOST_BLOCKS,
) -> list[float]:
    """Seconds that the copies in and the copies out took, begun together; 0 where there are none.

    chunk: copies issued to one direction before the other has its turn.
    """
    streams = [device.new_stream(), device.new_stream()]
    begun, *ended = events = [device.new_event() for _ in range(3)]
    try:
        device.record(begun, streams[0])
        device.wait(streams[1], begun)
        for at in range(0, max(map(len, ways)), chunk):
            for stream, copies in zip(streams, ways, strict=True):
                if part := copies[at : at + chunk]:
                    issue(stream, part)
        for stream, end in zip(streams, ended, strict=True):
            device.record(end, stream)
        for stream in streams:
            device.synchronize(stream)
        return [device.seconds(begun, end) if copies else 0.0 for copies, end in zip(ways, ended, strict=True)]
    finally:
        for stream in streams:
            device.synchronize(stream)
        device.free(streams, events)
