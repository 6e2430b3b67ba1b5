"""The prefix tree over two tiers: where each cached block is, and what leaves a tier when its room is wanted.

A node's blocks have places in HBM, in DRAM, or both; what leaves a tier is the last of a node first, so that in either
its first blocks are there up to some one. What sequences do with the nodes is in duplex.py; the states and why the
ordering holds in docs/duplexkv.md. Pure Python; no torch. Each operation costs O(nodes touched), and slices of their
blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node, Prefix
from superinfer.runtime.kv.copies import TierCounts
from superinfer.runtime.kv.drop_order import DropOrder
from superinfer.runtime.kv.free_blocks import FreeBlocks
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.pending_copies import PendingCopies
from superinfer.runtime.kv.tiers import Part, TierNode, TierTable, dirty_part


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
        self._free_dram = FreeBlocks(num_dram)
        self._pinned = 0  # DRAM blocks of parked tables
        self._order = DropOrder()
        self._dirty: deque[Part] = deque()  # to be mirrored, oldest first; entries may be out of date

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

    def absent(self, prefix: Prefix) -> tuple[int, int]:
        """(how many blocks of a matched prefix are in DRAM only, how many are before the first of them)."""
        count, before = 0, len(prefix)
        for node, length in reversed(prefix.parts()):
            here = len(node.blocks)
            if here < length:
                count, before = count + length - here, node.start + here
        return count, before

    def num_mirrored(self, table: BlockTable) -> int:
        """How many blocks of a table have a place in DRAM."""
        return sum(len(node.dram) for node in _path(table.node))

    # ------------------------------------------------------------------ ahead of need: mirrors, later turns

    def mirror(self, budget: int) -> None:
        """Plan copies out of dirty blocks while fewer than `budget` copies out are pending and DRAM has idle room."""
        parts: list[Part] = []
        may_be_dropped = False  # of one of them, which nobody holds, for the next one's room
        left, dirty, free = budget - self.copies.num_out, self._dirty, self._free_dram
        while dirty and left > 0:
            part = dirty_part(*dirty[0])
            if part is None:
                dirty.popleft()
                continue
            node, first, end = part
            count = min(left, end - first, len(free))
            if not count:
                if may_be_dropped:
                    self._copy_out(parts)
                    parts, may_be_dropped = [], False
                victim = self._order.victim(mirrors=False)
                if victim is None:
                    break
                if victim is node:
                    dirty.popleft()  # what is mirrored of it is the next to be dropped
                else:
                    self._drop_dram(victim, max(0, len(victim.dram) - min(left, end - first)))
                continue
            node.dram += free.take(count)
            self.totals.mirrored += count
            parts.append((node, first, first + count))
            left -= count
            if node.parked:
                self._pinned += count
            elif node.holders:
                self._order.mirrors[node] = None
            else:
                self._order.add(node)
                may_be_dropped = True
            noted, begin, last = dirty[0]
            if first + count < last:  # these are not mirrored again, whatever becomes of them
                dirty[0] = noted, max(begin, first + count), last
            else:
                dirty.popleft()
        if parts:
            self._copy_out(parts)
        if len(dirty) > 64 + 2 * self.num_blocks:  # nothing goes out: forget what is gone
            self._dirty = deque(entry for entry in dirty if dirty_part(*entry) is not None)

    def keep(self, table: BlockTable, until: float) -> None:
        """Before a table is released: what of it is in the tree is dropped from DRAM after all that nobody wants kept,
        until then. Time is that of `let_go`."""
        self._order.keep(cast(TierNode, table.node), until)

    def let_go(self, now: float) -> None:
        """What was to be kept until `now` is dropped next. Costs O(nodes whose time is over)."""
        self._order.let_go(now)

    def prefetch(self, prefix: Prefix, most: int) -> int:
        """Plan copies in of what of a prefix (matched, or a parked table's) is in DRAM only, from its root on, at most
        `most` blocks; nothing that would be lost makes room for them. Returns how many. Nobody holds them."""
        nodes = [(cast(TierNode, node), length) for node, length in prefix.parts()]
        nodes = [(node, length) for node, length in nodes if node.alive]
        if nodes:
            self._renew(nodes[-1][0])  # what is here of the path is not to make room for the rest
        absent = sum(max(0, length - len(node.blocks)) for node, length in nodes)
        taken = self._take(self._harmless(min(most, absent), {node for node, _ in nodes}))
        parts: list[Part] = []
        at = 0
        for node, length in nodes:
            blocks = taken[at : at + max(0, length - len(node.blocks))]
            if not blocks:
                continue
            at += len(blocks)
            node.blocks += blocks
            end = node.start + len(node.blocks)
            parts.append((node, end - len(blocks), end))
        self._copy_in(parts)
        for node, first, end in reversed(parts):
            if node.holders == 0:
                self._idle[node] = None
                self._num_idle += end - first
        self.totals.prefetched += len(taken)
        return len(taken)

    def clear(self) -> None:
        """Forget all cached content that nobody holds or is parked on."""
        for node in [*self._order, *cast(Iterable[TierNode], list(self._idle))]:
            if node.alive and not node.parked and not node.holders:
                self.forget(node)

    # ------------------------------------------------------------------ inside: holding and parking

    def _new_node(self, key: bytes, blocks: list[int], parent: Node | None, length: int) -> Node:
        return TierNode(key, blocks, parent, length)

    def _put(self, table: BlockTable, key: bytes, blocks: list[int], is_proven: bool) -> None:
        super()._put(table, key, blocks, is_proven)
        node = cast(TierNode, table.node)
        _came_without_copy(node)
        self._dirty.append((node, node.end - len(blocks), node.end))

    def _share(self, table: BlockTable, node: Node, blocks: list[int]) -> None:
        here = len(node.blocks)
        super()._share(table, node, blocks[:here])
        node.blocks += blocks[here:]  # cached in the other tier only: now here too
        _came_without_copy(cast(TierNode, node))

    def _may_grow(self, node: Node) -> bool:
        mine = cast(TierNode, node)
        return not (mine.parked or mine.reused or mine.keep_until)

    def _split(self, node: Node, length: int) -> Node:
        mine, upper = cast(TierNode, node), cast(TierNode, node.split(length, self._page_bytes))
        order = self._order
        if mine in self._idle:
            self._idle[upper] = None
            self._renew(upper)
            if not mine.blocks:
                del self._idle[mine]
        if mine in order:
            order.add(upper)
        if mine in order.mirrors:
            order.mirrors[upper] = None
            if not mine.dram:
                del order.mirrors[mine]
        return upper

    def _hold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        if mine.holders == 0:
            if mine.blocks:
                del self._idle[mine]
                self._num_idle -= len(mine.blocks)
            if not mine.parked:
                self._order.discard(mine)
                if mine.dram:
                    self._order.mirrors[mine] = None
        mine.holders += 1

    def _unhold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        mine.holders -= 1
        if mine.holders == 0 and mine.alive:
            self._order.mirrors.pop(mine, None)
            if mine.blocks:
                self._idle[mine] = None
                self._num_idle += len(mine.blocks)
            if not mine.parked:
                self._order.add(mine)

    def _unpin(self, node: TierNode) -> None:
        node.parked -= 1
        if node.parked == 0 and node.alive:
            self._pinned -= len(node.dram)
            if node.holders == 0:
                self._order.add(node)
            elif node.dram:
                self._order.mirrors[node] = None

    # ------------------------------------------------------------------ inside: copies of blocks that have both places

    def _copy_out(self, parts: list[Part], table: TierTable | None = None, blocks: Sequence[int] = ()) -> list[int]:
        """Plan it, of parts whose DRAM places are new; then of private blocks of a table, to its tail. Returns the
        copies' ids."""
        ids = self._copy(True, parts, table, blocks)
        at = 0
        for node, first, end in parts:
            behind = at + end - first
            node.mirroring += ids[at:behind]
            at = behind
        return ids

    def _copy_in(self, parts: list[Part], table: TierTable | None = None, blocks: Sequence[int] = ()) -> list[int]:
        """Plan it, of parts whose HBM places are new; then of the tail of a table, to these blocks. Returns the copies'
        ids."""
        ids = self._copy(False, parts, table, blocks)
        at = 0
        for node, first, end in parts:
            behind = at + end - first
            node.loading += ids[at:behind]
            node.last_load = ids[behind - 1]
            at = behind
        return ids

    def _copy(self, out: bool, parts: list[Part], table: TierTable | None, blocks: Sequence[int]) -> list[int]:
        hbm: list[int] = []
        dram: list[int] = []
        for node, first, end in parts:
            start = node.start
            hbm += node.blocks[first - start : end - start]
            dram += node.dram[first - start : end - start]
        if table is not None:
            hbm += blocks
            dram += table.tail
        return self.copies.plan(out, hbm, dram, parts, table)

    # ------------------------------------------------------------------ inside: room in HBM

    def _give(self, blocks: Sequence[int]) -> None:
        _give_back(blocks, self._free, self.copies.on_hbm, self.copies.pending)

    def _evict(self, count: int) -> list[int]:
        """So many blocks. The oldest idle nodes leave HBM: at no cost where they are clean, for good where dirty."""
        gone: list[int] = []
        while len(gone) < count:
            wanted = count - len(gone)
            if self._free:
                gone += self._free.take(min(wanted, len(self._free)))
                continue
            node = cast(TierNode, next(iter(self._idle)))
            here, num_dirty = len(node.blocks), len(node.blocks) - len(node.dram)
            if num_dirty > 0:
                lost = min(num_dirty, wanted)
                self.totals.forgotten += lost
                self._forget_behind(node, here - lost)
                continue
            left = max(0, here - wanted)
            gone += node.blocks[: left - 1 : -1] if left else node.blocks[::-1]
            del node.blocks[left:], node.loading[left:]
            self._num_idle -= here - left
            self.totals.left_clean += here - left
            if not left:
                del self._idle[node]
        return gone

    def _harmless(self, wanted: int, spared: set[TierNode]) -> int:
        """How many of the blocks wanted can be had with nothing lost, and without those of `spared` nodes."""
        room = len(self._free)
        for node in cast(Iterable[TierNode], self._idle):
            if room >= wanted or node in spared or len(node.dram) < len(node.blocks):
                break
            room += len(node.blocks)
        return min(wanted, room)

    # ------------------------------------------------------------------ inside: room in DRAM

    def _take_dram(self, count: int) -> list[int]:
        """For a rotation, which knows that there is room."""
        while len(self._free_dram) < count:
            node = self._order.victim(mirrors=True)
            assert node is not None, "DRAM room was promised that is not there"
            left = max(0, len(node.dram) - (count - len(self._free_dram)))
            if node.holders:
                self._dirty.append((node, node.start + left, node.start + len(node.dram)))
            self._drop_dram(node, left)
        return self._free_dram.take(count)

    def _give_dram(self, places: Sequence[int]) -> None:
        _give_back(places, self._free_dram, self.copies.on_dram, self.copies.pending)

    def _drop_dram(self, node: TierNode, length: int) -> None:
        """Give up a node's DRAM places behind its first `length` blocks: forget what is not in HBM."""
        here = len(node.blocks)
        if here < len(node.dram):
            self._forget_behind(node, max(length, here))
        gone = node.dram[length:]
        if gone and node.alive:
            del node.dram[length:], node.mirroring[length:]
            self._give_dram(gone)
            self._pinned -= len(gone) if node.parked else 0
            if not node.dram:
                self._order.mirrors.pop(node, None)

    def _forget_behind(self, node: TierNode, length: int) -> None:
        """Forget what of a node is behind its first `length` blocks, and what is under it."""
        if not length or node.holders or node.parked:  # who holds it is to know
            if length:
                self._split(node, length)
            self.forget(node)
            return
        for child in [*node.children.values()]:
            self.forget(child)
        blocks, places = node.blocks[length:], node.dram[length:]
        del node.loading[length:], node.dram[length:], node.mirroring[length:]
        self._shorten(node, length)
        self._num_idle -= len(blocks)
        self._give(blocks)
        self._give_dram(places)

    def forget(self, node: Node) -> None:
        """See KVCache.forget. All their blocks are given back, whoever holds or is parked on them: after a failed copy
        such tables are lost."""
        self._detach(node)
        stack = [cast(TierNode, node)]
        while stack:
            gone = stack.pop()
            if gone in self._idle:
                del self._idle[gone]
                self._num_idle -= len(gone.blocks)
            if gone.parked:
                self._pinned -= len(gone.dram)
            self._order.discard(gone)
            self._order.mirrors.pop(gone, None)
            blocks, places = gone.blocks, gone.dram
            gone.blocks, gone.loading, gone.dram, gone.mirroring, gone.alive = [], [], [], [], False
            self._give(blocks)
            self._give_dram(places)
            stack += cast(Iterable[TierNode], gone.children.values())
            gone.children = {}


def _path(node: Node) -> list[TierNode]:
    return cast(list[TierNode], node.path())


def _came_without_copy(node: TierNode) -> None:
    """The last of its blocks in HBM were computed."""
    node.loading += [0] * (len(node.blocks) - len(node.loading))


def _give_back(blocks: Sequence[int], free: FreeBlocks, last: list[int], pending: set[int]) -> None:
    """last: by block, the last copy that touches it. Those with a pending copy are handed out last, when it is likely
    over."""
    if not pending or pending.isdisjoint(map(last.__getitem__, blocks)):
        free.give(blocks)
        return
    free.give_later([block for block in blocks if last[block] in pending])
    free.give([block for block in blocks if last[block] not in pending])
