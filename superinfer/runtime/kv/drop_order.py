"""Which DRAM block is given up when its room is wanted. Pure Python; no torch.

First those nobody needs now: by age, one more round for those hit since, those to be kept for a while last. Before
these last ones, if a rotation needs the room, the mirrors of blocks that are held in HBM: they are only dirty again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

from superinfer.runtime.kv.tiers import TierNode

FEW = 1024  # nodes, of which it does not matter how often each is noted


class DropOrder:
    """Idle nodes, whatever tier they are in, and mirrors: nodes that are held and have a DRAM block. Parked nodes are
    in neither. An idle node that is kept (`keep_until` above 0) is in a class of its own.

    To keep is to prefer, not to pin: `victim` gives them too, once the others are gone.
    """

    def __init__(self) -> None:
        self.mirrors: OrderedDict[TierNode, None] = OrderedDict()
        self._plain: OrderedDict[TierNode, None] = OrderedDict()
        self._kept: OrderedDict[TierNode, None] = OrderedDict()
        self._ends: list[tuple[float, int, Sequence[TierNode]]] = []  # until when, and what
        self._noted, self._most = 0, FEW  # nodes in there; when they are looked through
        self._numbers = count()

    def __iter__(self) -> Iterator[TierNode]:
        """The idle ones; those that are kept come last."""
        return iter([*self._plain, *self._kept])

    def __len__(self) -> int:
        return len(self._plain) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Idle nodes that are kept."""
        return len(self._kept)

    def add(self, node: TierNode) -> None:
        """The node is idle, as of now; one that was in the order already keeps its place."""
        (self._kept if node.keep_until else self._plain).setdefault(node)

    def discard(self, node: TierNode) -> None:
        """It is not idle any more, or forgotten."""
        (self._kept if node.keep_until else self._plain).pop(node, None)

    def victim(self, mirrors: bool) -> TierNode | None:
        """Take out the node that is to give up its DRAM block. None when all the rest is parked or, without `mirrors`,
        is held or to be kept."""
        while self._plain:
            node = self._plain.popitem(last=False)[0]
            if node.dram < 0:
                continue  # in HBM only; it comes back here when it is mirrored or released
            if node.reused:
                node.reused = False
                self.add(node)
                continue
            return node
        if not mirrors:
            return None
        if self.mirrors:
            return self.mirrors.popitem(last=False)[0]
        while self._kept:
            node = self._kept.popitem(last=False)[0]
            if node.dram >= 0:
                return node
        return None

    def keep(self, nodes: Sequence[TierNode], until: float) -> None:
        """Drop these after all others until then. A later end stands."""
        for node in nodes:
            node.keep_until = max(node.keep_until, until)
            if node.keep_until and node in self._plain:
                del self._plain[node]
                self._kept[node] = None
        heapq.heappush(self._ends, (until, next(self._numbers), nodes))
        self._noted += len(nodes)
        if self._noted > self._most:
            self._forget_ends()

    def let_go(self, now: float) -> None:
        """Nodes whose time is over are the next to be dropped, the end of a path before what it hangs on."""
        while self._ends and self._ends[0][0] <= now:
            nodes = heapq.heappop(self._ends)[2]
            self._noted -= len(nodes)
            for node in nodes:
                if node.keep_until and node.keep_until <= now:
                    node.keep_until = 0.0
                    if node in self._kept:
                        del self._kept[node]
                        self._plain[node] = None
                        self._plain.move_to_end(node, last=False)

    def _forget_ends(self) -> None:
        """Those of nodes that are forgotten, or kept for longer since: no more are left than there are nodes."""
        left = [(until, n, [x for x in nodes if x.alive and x.keep_until == until]) for until, n, nodes in self._ends]
        self._ends = [entry for entry in left if entry[2]]
        heapq.heapify(self._ends)
        self._noted = sum(len(nodes) for _, _, nodes in self._ends)
        self._most = max(FEW, 2 * self._noted)
