"""Nodes and tables of a cache in two tiers: plain state. Pure Python; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from superinfer.runtime.kv.cache import BlockTable, Node


class TierNode(Node):
    """Cached blocks with places in HBM (`blocks`), in DRAM (`dram`), or both. In either tier the first ones are there,
    up to some block; none is in neither.

    parked: rotated-out tables through it. loading, mirroring: by place in HBM, in DRAM, the copy that brought or brings
    the block there; 0 where its place came without one. last_load: the last of `loading`, past or not.
    reused: hit since DRAM last considered dropping it. alive: False once forgotten.
    keep_until: DRAM drops it after all that are not kept, until then; 0: it is not kept.
    """

    __slots__ = ("alive", "dram", "keep_until", "last_load", "loading", "mirroring", "parked", "reused")

    def __init__(self, key: bytes, blocks: list[int], parent: Node | None, length: int) -> None:
        super().__init__(key, blocks, parent, length)
        self.dram: list[int] = []
        self.loading = [0] * len(blocks)
        self.mirroring: list[int] = []
        self.parked = self.last_load = 0
        self.reused = False
        self.alive = True
        self.keep_until = 0.0

    def split(self, length: int, page_bytes: int) -> TierNode:
        """See Node.split."""
        upper = super().split(length, page_bytes)
        assert isinstance(upper, TierNode)
        for mine, above in (
            (self.dram, upper.dram), (self.loading, upper.loading), (self.mirroring, upper.mirroring)
        ):  # fmt: skip
            above[:] = mine[:length]
            del mine[:length]
        upper.parked, upper.reused, upper.keep_until = self.parked, self.reused, self.keep_until
        upper.last_load = self.last_load
        return upper


class TierTable(BlockTable):
    """A table that can be parked. `node` is a TierNode.

    leaving: the copies out that its last rotation out planned, over or not.
    tail: DRAM blocks of a parked table's private content. missing: how many of its blocks are in DRAM only so far.
    awaits: copies that must be over before work on this table. lost: a copy of its private content failed.
    """

    __slots__ = ("awaits", "leaving", "lost", "missing", "parked", "tail")

    def __init__(self, root: Node) -> None:
        super().__init__(root)
        self.tail: list[int] = []
        self.missing = 0
        self.awaits: list[int] = []
        self.leaving: Sequence[int] = ()
        self.parked = self.lost = False


# Neighbouring blocks of a node: from `first` to `end`, counted from the root. The node may have been cut since this was
# noted: then it is the last of those that they belong to.
Part = tuple[TierNode, int, int]


def node_at(node: TierNode, at: int) -> TierNode | None:
    """The node that block `at` of what was this one belongs to by now; None where it has been forgotten."""
    while at < node.start and isinstance(node.parent, TierNode):
        node = node.parent
    return node if node.alive and node.start <= at < node.end else None


def dirty_part(node: TierNode, first: int, end: int) -> Part | None:
    """Of a part the first blocks that are in HBM only, as a part of the node they belong to by now; with what is right
    above them of that node, should that be in HBM only too."""
    found: Part | None = None
    each: Node | None = node
    while isinstance(each, TierNode):
        start = each.start
        begin, stop = start + len(each.dram), start + len(each.blocks)
        stop = stop if stop < end else end
        if begin < stop and first < stop and each.alive:
            found = each, begin, stop
        if start <= first:
            break
        each = each.parent
    return found
