"""What a copy between the tiers is, and what is told of it. Pure Python; no torch. See docs/duplexkv.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec


class BlockCopy(msgspec.Struct, frozen=True, gc=False):  # made for every block that moves: a tenth of a dataclass
    """One whole block moves: HBM to DRAM when `out`, else DRAM to HBM.

    id: grows with every copy planned. hbm, dram: block ids of the two pools.
    after: ids of earlier copies, ascending, that must be over, done or failed, before this one touches its blocks.
    """

    id: int
    out: bool
    hbm: int
    dram: int
    after: tuple[int, ...] = ()


class LinkUse(NamedTuple):
    """Seconds the link was busy: in (DRAM to HBM), out, both at once; and seconds that work waited for copies."""

    in_s: float = 0.0
    out_s: float = 0.0
    both_s: float = 0.0
    stall_s: float = 0.0


@dataclass(slots=True)
class TierCounts:
    """Counters since the start, in blocks where nothing else is said.

    blocks_in, blocks_out: copies done. mirrored: copies out planned in the background. failed: copies that failed.
    left_clean: blocks that left HBM without a copy of their own. forgotten: dirty ones that were dropped.
    rotations_out, rotations_in: sequences. rotated: their blocks; rotated_clean: of these, mirrored before.
    hits: blocks of matched prefixes that were loaded from DRAM. prefetched: blocks loaded before anyone asked.
    """

    blocks_in: int = 0
    blocks_out: int = 0
    mirrored: int = 0
    failed: int = 0
    left_clean: int = 0
    forgotten: int = 0
    rotations_out: int = 0
    rotations_in: int = 0
    rotated: int = 0
    rotated_clean: int = 0
    hits: int = 0
    prefetched: int = 0
