"""The second tier's gauges and counters as the wire's message."""

from __future__ import annotations

from superinfer.runtime.protocol import TierStats
from superinfer.runtime.scheduler.base import TierGauges


def tier_stats(gauges: TierGauges, block_bytes: int) -> TierStats:
    """`block_bytes`: bytes of a block, to turn counts into bytes and rates."""
    totals, link = gauges.totals, gauges.link
    bytes_in, bytes_out = totals.blocks_in * block_bytes, totals.blocks_out * block_bytes
    busy_s = link.in_s + link.out_s - link.both_s
    return TierStats(
        dram_blocks=gauges.dram_total,
        dram_free=gauges.dram_free,
        dram_pinned=gauges.dram_pinned,
        copies_pending=gauges.pending,
        rotations_out=totals.rotations_out,
        rotations_in=totals.rotations_in,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        gbps_in=bytes_in / link.in_s / 1e9 if link.in_s else 0.0,
        gbps_out=bytes_out / link.out_s / 1e9 if link.out_s else 0.0,
        both_s=link.both_s,
        stall_s=link.stall_s,
        overlap=max(0.0, 1 - link.stall_s / busy_s) if busy_s else 0.0,
        mirrored=totals.mirrored,
        mirror_hit_rate=totals.rotated_clean / totals.rotated if totals.rotated else 0.0,
        blocks_left_clean=totals.left_clean,
        blocks_forgotten=totals.forgotten,
        dram_hits=totals.hits,
        copies_failed=totals.failed,
    )
