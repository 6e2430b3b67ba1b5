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
        self.copies = PendingCopies()
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
        return len(self.copies)

    @property
    def num_pending_in(self) -> int:
        """Of these, copies in."""
        return len(self.copies) - self.copies.num_out

    @property
    def oldest_pending(self) -> int:
        """Id of the oldest copy not reported; when there is none, the id that the next one will have."""
        return self.copies.oldest

    # ------------------------------------------------------------------ ahead of need: mirrors, later turns

    def mirror(self, budget: int) -> None:
        """Plan copies out of dirty blocks while fewer than `budget` copies out are pending and DRAM has idle room."""
        while self._dirty and self.copies.num_out < budget:
            node = self._dirty.popleft()
            if not node.alive or node.block < 0 or node.dram >= 0:
                continue
            if not self._free_dram and not self._evict_dram(mirrors=False):
                self._dirty.appendleft(node)
                break
            if node.alive:  # the room was not made by forgetting this one
                self._mirror(node, self._free_dram.pop())
                self.totals.mirrored += 1
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
            node.block = self._take()
            node.loading = self.copies.plan(False, node.block, node.dram, node)
            loaded.append(node)
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

    # ------------------------------------------------------------------ inside: room in HBM

    def _give(self, blocks: Iterable[int]) -> None:
        """Blocks with a pending copy go to the far end: handed out last, when it is likely over."""
        for block in blocks:
            if block in self.copies.on_hbm:
                self._free.appendleft(block)
            else:
                self._free.append(block)

    def _take(self) -> int:
        if not self._free:
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        """The oldest idle node leaves HBM: for free when it is clean, for good when it is dirty."""
        node = cast(TierNode, self._idle.popitem(last=False)[0])
        if node.dram < 0:
            self.totals.forgotten += 1
            self.forget(node)
            return
        self._give((node.block,))
        node.block = -1
        node.loading = 0
        self.totals.left_clean += 1

    # ------------------------------------------------------------------ inside: room in DRAM

    def _mirror(self, node: TierNode, dram: int) -> None:
        node.dram = dram
        node.mirroring = self.copies.plan(True, node.block, dram, node)
        if node.parked:
            self._pinned += 1
        elif node.holders:
            self._order.mirrors[node] = None
        else:
            self._order.add(node)

    def _take_dram(self) -> int:
        """For a rotation, which knows that there is room."""
        if not self._free_dram:
            made = self._evict_dram(mirrors=True)
            assert made, "DRAM room was promised that is not there"
        return self._free_dram.pop()

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
        for block in blocks:
            if block in self.copies.on_dram:
                self._free_dram.appendleft(block)
            else:
                self._free_dram.append(block)

    def _drop_dram(self, node: TierNode) -> None:
        self._order.mirrors.pop(node, None)
        self._pinned -= node.parked > 0
        self._give_dram((node.dram,))
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
            stack += cast(Iterable[TierNode], gone.children.values())
            gone.children = {}
        self._drop_root(parent)
