"""Which DRAM blocks are given up when their room is wanted. Pure Python; no torch.

First those nobody needs now: by age, one more round for those hit since, those to be kept for a while last. Before
these last ones, if a rotation needs the room, the mirrors of blocks that are held in HBM: they are only dirty again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import cast

from superinfer.runtime.kv.tiers import TierNode

FEW = 1024  # tables, of which it does not matter how often each is noted


class DropOrder:
    """Idle nodes, whatever tier they are in, and mirrors: nodes that are held and have DRAM blocks. Parked nodes are
    in neither. An idle node that is kept (`keep_until` above 0) is in a class of its own.

    To keep is to prefer, not to pin: `victim` gives them too, once the others are gone.
    """

    def __init__(self) -> None:
        self.mirrors: OrderedDict[TierNode, None] = OrderedDict()
        self._plain: OrderedDict[TierNode, None] = OrderedDict()
        self._kept: OrderedDict[TierNode, None] = OrderedDict()
        self._ends: list[tuple[float, int, TierNode]] = []  # until when, and the end of what
        self._most = FEW  # ends; then they are looked through
        self._numbers = count()

    def __iter__(self) -> Iterator[TierNode]:
        """The idle ones; those that are kept come last."""
        return iter([*self._plain, *self._kept])

    def __len__(self) -> int:
        return len(self._plain) + len(self._kept)

    def __contains__(self, node: TierNode) -> bool:
        return node in (self._kept if node.keep_until else self._plain)

    @property
    def num_kept(self) -> int:
        """Blocks of idle nodes that are kept."""
        return sum(node.length for node in self._kept)

    def add(self, node: TierNode) -> None:
        """The node is idle, as of now; one that was in the order already keeps its place."""
        (self._kept if node.keep_until else self._plain).setdefault(node)

    def discard(self, node: TierNode) -> None:
        """It is not idle any more, or forgotten."""
        (self._kept if node.keep_until else self._plain).pop(node, None)

    def victim(self, mirrors: bool) -> TierNode | None:
        """The node that is to give up DRAM blocks, the last ones first. None when all the rest is parked or, without
        `mirrors`, is held or to be kept."""
        plain = self._plain
        while plain:
            node = next(iter(plain))
            if node.dram and not node.reused:
                return node
            del plain[node]  # what is in HBM only comes back here when it is mirrored or released
            if node.dram:
                node.reused = False
                plain[node] = None
        for order in (self.mirrors, self._kept) if mirrors else ():
            while order:
                node = next(iter(order))
                if node.dram:
                    return node
                del order[node]
        return None

    def keep(self, last: TierNode, until: float) -> None:
        """Drop a path that ends with this node after all others until then. A later end stands."""
        for node in cast(list[TierNode], last.path()):
            node.keep_until = max(node.keep_until, until)
            if node.keep_until and node in self._plain:
                del self._plain[node]
                self._kept[node] = None
        heapq.heappush(self._ends, (until, next(self._numbers), last))
        if len(self._ends) > self._most:
            self._forget_ends()

    def let_go(self, now: float) -> None:
        """Nodes whose time is over are the next to be dropped, the end of a path before what it hangs on."""
        while self._ends and self._ends[0][0] <= now:
            for node in cast(list[TierNode], heapq.heappop(self._ends)[2].path()):
                if node.keep_until and node.keep_until <= now:
                    node.keep_until = 0.0
                    if node in self._kept:
                        del self._kept[node]
                        self._plain[node] = None
                        self._plain.move_to_end(node, last=False)

    def _forget_ends(self) -> None:
        """Those of nodes that are forgotten, or kept for longer since: no more are left than there are nodes."""
        self._ends = [
            (until, number, last)
            for until, number, last in self._ends
            if any(node.alive and node.keep_until == until for node in cast(list[TierNode], last.path()))
        ]
        heapq.heapify(self._ends)
        self._most = max(FEW, 2 * len(self._ends))
