"""Nodes and tables of a cache in two tiers: plain state. Pure Python; no torch."""

from __future__ import annotations

from superinfer.runtime.kv.cache import BlockTable, Node


class TierNode(Node):
    """A cached block with a place in HBM (`block`), in DRAM (`dram`), or both; -1 is none.

    parked: rotated-out tables through it. loading, mirroring: the copy that brings it in, and the one that takes it
    out, pending or over; 0 where its place came without one, or is gone.
    reused: hit since DRAM last considered dropping it. alive: False once forgotten.
    keep_until: DRAM drops it after all that are not kept, until then; 0: it is not kept.
    """

    __slots__ = ("alive", "dram", "keep_until", "loading", "mirroring", "parked", "reused")

    def __init__(self, key: bytes, block: int, parent: Node | None) -> None:
        super().__init__(key, block, parent)
        self.dram = -1
        self.parked = self.loading = self.mirroring = 0
        self.reused = False
        self.alive = True
        self.keep_until = 0.0


class TierTable(BlockTable):
    """A table that can be parked. `nodes` are TierNodes.

    leaving: the copies out that its last rotation out planned, over or not.
    tail: DRAM blocks of a parked table's private content. missing: positions whose node is in DRAM only so far.
    awaits: copies that must be over before work on this table. lost: a copy of its private content failed.
    """

    __slots__ = ("awaits", "leaving", "lost", "missing", "parked", "tail")

    def __init__(self, root: Node) -> None:
        super().__init__(root)
        self.tail: list[int] = []
        self.missing: list[int] = []
        self.awaits: list[int] = []
        self.leaving: list[int] = []
        self.parked = self.lost = False
