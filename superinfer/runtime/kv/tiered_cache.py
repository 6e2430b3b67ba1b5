"""The prefix tree over two tiers: where each cached block is, and what leaves a tier when its room is wanted.

A node has a place in HBM, in DRAM, or both. What sequences do with the nodes is in duplex.py; the states and why the
ordering holds in docs/duplexkv.md. Pure Python; no torch. Each operation costs O(blocks touched).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node
from superinfer.runtime.kv.copies import TierCounts
from superinfer.runtime.kv.drop_order import DropOrder
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.pending_copies import PendingCopies
from superinfer.runtime.kv.tiers import TierNode


class TieredCache(KVCache):
    """What of `DuplexCache` is about nodes, whoever holds them."""

    def __init__(
        self,
        num_blocks: int,
        num_dram: int,
        page_size: int,
        *,
        prefix_cache: bool = True,
        link: LinkProfile | None = None,
    ) -> None:
        super().__init__(num_blocks, page_size, prefix_cache=prefix_cache)
        if num_dram < 1:
            raise ValueError(f"num_dram={num_dram} must be at least 1; a cache of one tier is a KVCache")
        self.num_dram = num_dram
        self.link = link
        self.totals = TierCounts()
        self.copies = PendingCopies(num_blocks, num_dram)
        self._free_dram = deque(range(num_dram - 1, -1, -1))
        self._pinned = 0  # DRAM blocks of parked tables
        self._order = DropOrder()
        self._dirty: deque[TierNode] = deque()  # to be mirrored, oldest first; entries may be out of date

    # ------------------------------------------------------------------ gauges

    @property
    def num_dram_free(self) -> int:
        """DRAM blocks that hold nothing."""
        return len(self._free_dram)

    @property
    def num_dram_pinned(self) -> int:
        """DRAM blocks that rotated-out sequences need."""
        return self._pinned

    @property
    def num_pending(self) -> int:
        """Copies planned and not reported."""
        return len(self.copies.pending)

    @property
    def num_pending_in(self) -> int:
        """Of these, copies in."""
        return len(self.copies.pending) - self.copies.num_out

    @property
    def oldest_pending(self) -> int:
        """Id of the oldest copy not reported; when there is none, the id that the next one will have."""
        return self.copies.oldest

    # ------------------------------------------------------------------ ahead of need: mirrors, later turns

    def mirror(self, budget: int) -> None:
        """Plan copies out of dirty blocks while fewer than `budget` copies out are pending and DRAM has idle room."""
        nodes: list[TierNode] = []
        may_be_dropped = False  # one of them, which nobody holds, for the next one's room
        left, dirty = budget - self.copies.num_out, self._dirty
        while dirty and left > 0:
            node = dirty.popleft()
            if not node.alive or node.block < 0 or node.dram >= 0:
                continue
            if not self._free_dram:
                if may_be_dropped:
                    self._copy_out(nodes)
                    nodes, may_be_dropped = [], False
                if not self._evict_dram(mirrors=False):
                    dirty.appendleft(node)
                    break
                if not node.alive:
                    continue  # the room was made by forgetting this one
            node.dram = self._free_dram.pop()
            self.totals.mirrored += 1
            left -= 1
            if node.parked:
                self._pinned += 1
            elif node.holders:
                self._order.mirrors[node] = None
            else:
                self._order.add(node)
                may_be_dropped = True
            nodes.append(node)
        if nodes:
            self._copy_out(nodes)
        if len(self._dirty) > 64 + 2 * self.num_blocks:  # nothing goes out: forget what is gone
            self._dirty = deque(n for n in self._dirty if n.alive and n.block >= 0 and n.dram < 0)

    def keep(self, table: BlockTable, until: float) -> None:
        """Before a table is released: what of it is in the tree is dropped from DRAM after all that nobody wants kept,
        until then. Time is that of `let_go`."""
        self._order.keep(cast(list[TierNode], list(table.nodes)), until)

    def let_go(self, now: float) -> None:
        """What was to be kept until `now` is dropped next. Costs O(blocks whose time is over)."""
        self._order.let_go(now)

    def prefetch(self, path: Sequence[Node], most: int) -> int:
        """Plan copies in of what of a path (matched, or a parked table's nodes) is in DRAM only, from its root on, at
        most `most` blocks; nothing that would be lost makes room for them. Returns how many. Nobody holds them."""
        nodes = [node for node in cast(Sequence[TierNode], path) if node.alive]
        for node in reversed(nodes):
            if node in self._idle:  # what is here of the path is not to make room for the rest
                self._idle.move_to_end(node)
        loaded: list[TierNode] = []
        here = sum(node in self._idle for node in nodes)
        for node in nodes:
            if len(loaded) == most:
                break
            if node.block >= 0:
                continue
            if not self._free and (len(self._idle) <= here or cast(TierNode, next(iter(self._idle))).dram < 0):
                break
            (node.block,) = self._take(1)
            loaded.append(node)
        self._copy_in(loaded)
        for node in reversed(loaded):
            if node.holders == 0:
                self._idle[node] = None
        self.totals.prefetched += len(loaded)
        return len(loaded)

    def clear(self) -> None:
        """Forget all cached content that nobody holds or is parked on."""
        for node in [*self._order, *cast(Iterable[TierNode], list(self._idle))]:
            if node.alive and not node.parked and not node.holders:
                self.forget(node)

    # ------------------------------------------------------------------ inside: holding and parking

    def _new_node(self, key: bytes, block: int, parent: Node) -> Node:
        node = TierNode(key, block, parent)
        self._dirty.append(node)
        return node

    def _hold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        if mine.holders == 0:
            self._idle.pop(mine, None)
            self._order.discard(mine)
            if mine.dram >= 0 and not mine.parked:
                self._order.mirrors[mine] = None
        mine.holders += 1

    def _unhold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        mine.holders -= 1
        if mine.holders == 0 and mine.alive:
            self._order.mirrors.pop(mine, None)
            if mine.block >= 0:
                self._idle[mine] = None
            if not mine.parked:
                self._order.add(mine)

    def _unpin(self, node: TierNode) -> None:
        node.parked -= 1
        if node.parked == 0 and node.alive:
            self._pinned -= node.dram >= 0
            if node.holders == 0:
                self._order.add(node)
            elif node.dram >= 0:
                self._order.mirrors[node] = None

    # ------------------------------------------------------------------ inside: copies of nodes that have both places

    def _copy_out(self, nodes: list[TierNode]) -> list[int]:
        """Plan it; their DRAM places are new. Returns the copies' ids."""
        ids = self.copies.plan(True, [node.block for node in nodes], [node.dram for node in nodes], [*nodes])
        for node, id in zip(nodes, ids, strict=True):
            node.mirroring = id
        return ids

    def _copy_in(self, nodes: list[TierNode]) -> list[int]:
        """Plan it; their HBM places are new. Returns the copies' ids."""
        ids = self.copies.plan(False, [node.block for node in nodes], [node.dram for node in nodes], [*nodes])
        for node, id in zip(nodes, ids, strict=True):
            node.loading = id
        return ids

    # ------------------------------------------------------------------ inside: room in HBM

    def _give(self, blocks: Iterable[int]) -> None:
        """Blocks with a pending copy go to the far end: handed out last, when it is likely over."""
        _give_back(blocks, self._free, self.copies.on_hbm, self.copies.pending)

    def _take(self, count: int) -> list[int]:
        """So many blocks, of which there must be that many. The oldest idle nodes leave HBM for what is not free: at no
        cost where they are clean, for good where they are dirty."""
        free, idle, pop = self._free, self._idle, self._free.pop
        if count <= len(free):
            return [pop() for _ in range(count)]
        taken = [pop() for _ in range(len(free))]
        while len(taken) < count:
            if free:
                taken.append(pop())
                continue
            node = cast(TierNode, idle.popitem(last=False)[0])
            if node.dram < 0:
                self.totals.forgotten += 1
                self.forget(node)
                continue
            taken.append(node.block)
            node.block, node.loading = -1, 0
            self.totals.left_clean += 1
        return taken

    # ------------------------------------------------------------------ inside: room in DRAM

    def _take_dram(self, count: int) -> list[int]:
        """For a rotation, which knows that there is room."""
        free, pop = self._free_dram, self._free_dram.pop
        taken = [pop() for _ in range(min(count, len(free)))]
        while len(taken) < count:
            if not free:
                made = self._evict_dram(mirrors=True)
                assert made, "DRAM room was promised that is not there"
            taken.append(pop())
        return taken

    def _evict_dram(self, mirrors: bool) -> bool:
        """Free a DRAM block, with `mirrors` also one of what is held or to be kept. False when there is none."""
        node = self._order.victim(mirrors)
        if node is None:
            return False
        if node.block < 0:
            self.forget(node)
            return True
        self._drop_dram(node)
        if node.holders:
            self._dirty.append(node)
        return True

    def _give_dram(self, blocks: Iterable[int]) -> None:
        _give_back(blocks, self._free_dram, self.copies.on_dram, self.copies.pending)

    def _drop_dram(self, node: TierNode) -> None:
        place = node.dram
        if node.holders:
            self._order.mirrors.pop(node, None)
        self._pinned -= node.parked > 0
        if self.copies.on_dram[place] in self.copies.pending:
            self._free_dram.appendleft(place)
        else:
            self._free_dram.append(place)
        node.dram, node.mirroring = -1, 0

    def forget(self, node: Node) -> None:
        """See KVCache.forget. All their blocks are given back, whoever holds or is parked on them: after a failed copy
        such tables are lost."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        stack = [cast(TierNode, node)]
        while stack:
            gone = stack.pop()
            if gone.dram >= 0:
                self._drop_dram(gone)
            if gone.block >= 0:
                self._give((gone.block,))
                self._idle.pop(gone, None)
            self._order.discard(gone)
            gone.block, gone.loading, gone.alive, gone.parent = -1, 0, False, None
            if gone.children:
                stack += cast(Iterable[TierNode], gone.children.values())
                gone.children = {}
        if not parent.children:
            self._drop_root(parent)


def _give_back(blocks: Iterable[int], free: deque[int], last: list[int], pending: set[int]) -> None:
    """last: by block, the last copy that touches it."""
    if not pending:
        free += blocks
        return
    for block in blocks:
        if last[block] in pending:
            free.appendleft(block)
        else:
            free.append(block)
