"""In which order DRAM drops blocks that nobody needs now: by age, those that are to be kept for a while last.

Pure Python; no torch.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

from superinfer.runtime.kv.tiers import TierNode


class DropOrder:
    """Idle nodes, whatever tier they are in. A node that is kept (`keep_until` above 0) is here in a class of its own.

    To keep is to prefer, not to pin: `oldest_kept` gives them too, once the others are gone.
    """

    def __init__(self) -> None:
        self._plain: OrderedDict[TierNode, None] = OrderedDict()
        self._kept: OrderedDict[TierNode, None] = OrderedDict()
        self._ends: list[tuple[float, int, Sequence[TierNode]]] = []
        self._numbers = count()

    def __iter__(self) -> Iterator[TierNode]:
        """Those that are kept come last."""
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
        self._plain.pop(node, None)
        self._kept.pop(node, None)

    def oldest(self) -> TierNode | None:
        """Take out the oldest that is not kept."""
        return self._plain.popitem(last=False)[0] if self._plain else None

    def oldest_kept(self) -> TierNode | None:
        """Take out the one kept that has been idle longest."""
        return self._kept.popitem(last=False)[0] if self._kept else None

    def keep(self, nodes: Sequence[TierNode], until: float) -> None:
        """Drop these after all others until then. A later end stands."""
        for node in nodes:
            node.keep_until = max(node.keep_until, until)
            if node in self._plain:
                self.discard(node)
                self.add(node)
        heapq.heappush(self._ends, (until, next(self._numbers), nodes))

    def let_go(self, now: float) -> None:
        """Nodes whose time is over are the next to be dropped, the end of a path before what it hangs on."""
        while self._ends and self._ends[0][0] <= now:
            for node in heapq.heappop(self._ends)[2]:
                if node.keep_until and node.keep_until <= now:
                    node.keep_until = 0.0
                    if node in self._kept:
                        del self._kept[node]
                        self._plain[node] = None
                        self._plain.move_to_end(node, last=False)
