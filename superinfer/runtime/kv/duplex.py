"""Two tiers, one prefix tree: what sequences do in a KV cache in HBM and DRAM. Pure Python; no torch.

docs/duplexkv.md says what the states are and why the ordering holds. In one sentence: a block may change hands at any
time, and the copy still pending on it goes with it, as `after` of the next copy or as something the next work waits
for. Each operation costs O(blocks touched).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node, Prefix
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.tiered_cache import TieredCache
from superinfer.runtime.kv.tiers import Part, TierNode, TierTable, node_at


class DuplexCache(TieredCache):
    """A KVCache over `num_blocks` HBM blocks with `num_dram` DRAM blocks behind them.

    link: what is known of the link between them, for those who decide what moves.
    """

    # ------------------------------------------------------------------ hold and grow

    def adopt(self, table: BlockTable, prefix: Prefix) -> None:
        """See KVCache.adopt. Blocks that are in DRAM only get their place, and their copy in, with `allocate`."""
        mine = cast(TierTable, table)
        for node in cast(list[TierNode], self._begin(mine, prefix)):
            self._hold(node)
            node.reused = True
            self._use(mine, node)

    def _use(self, table: TierTable, node: TierNode) -> None:
        """The next blocks of a table are those of a node; what is pending on them is waited for."""
        absent = node.length - len(node.blocks)
        table.blocks += node.blocks
        table.blocks += [-1] * absent
        table.missing += absent
        if node.last_load >= self.copies.oldest:
            pending = self.copies.pending
            if loads := [id for id in node.loading if id in pending]:
                self.copies.read_by(table, loads)

    def allocate(self, table: BlockTable, count: int) -> list[int] | None:
        """See KVCache.allocate. Also plans the copies in of what the table has adopted from DRAM."""
        mine = cast(TierTable, table)
        if count + mine.missing > self.num_available:
            return None
        if mine.missing:
            self.totals.hits += mine.missing
            self._load(mine)
        new = self._take(count)
        if pending := self.copies.pending:
            mine.awaits += [id for id in map(self.copies.on_hbm.__getitem__, new) if id in pending]
        mine.blocks += new
        return new

    def awaits(self, table: BlockTable) -> list[int]:
        """Copies that work on this table must wait for: planned, and not reported yet."""
        mine = cast(TierTable, table)
        if mine.awaits:
            pending = self.copies.pending
            if not pending.issuperset(mine.awaits):
                mine.awaits = [id for id in mine.awaits if id in pending]
        return mine.awaits

    def release(self, table: BlockTable) -> None:
        """See KVCache.release. The table may be parked."""
        mine = cast(TierTable, table)
        if not mine.parked:
            super().release(table)
            return
        for node in reversed(cast(list[TierNode], mine.node.path())):
            self._unpin(node)
        self._give_dram(mine.tail)
        self._pinned -= len(mine.tail)
        mine.tail = []
        self._leave(mine)

    # ------------------------------------------------------------------ rotation

    def park(self, table: BlockTable, computed: int) -> bool:
        """Move a table out of HBM, with the content of its first `computed` tokens. False, and nothing changed, when
        DRAM has no room. Its HBM blocks are available at once."""
        mine = cast(TierTable, table)
        nodes, num_cached = cast(list[TierNode], mine.node.path()), mine.num_cached
        private = mine.blocks[num_cached:]
        content = private[: self.blocks_for(computed) - num_cached]
        num_dirty = num_cached - sum([len(node.dram) for node in nodes])
        num_clean = sum([len(node.dram) for node in nodes if not node.parked])  # and pinned from now on
        if num_dirty + len(content) > self.num_dram - self._pinned - num_clean:
            return False
        for node in reversed(nodes):  # no longer held, but parked: idle in HBM only
            if node.dram and not node.parked:
                del self._order.mirrors[node]
            node.parked += 1
            node.holders -= 1
            if not node.holders:
                self._idle[node] = None
                self._num_idle += len(node.blocks)
        self._pinned += num_clean
        places, at = self._take_dram(num_dirty + len(content)), 0
        self._pinned += len(places)
        parts: list[Part] = []
        for node in nodes:
            if dirty := node.length - len(node.dram):
                parts.append((node, node.end - dirty, node.end))
                node.dram += places[at : at + dirty]
                at += dirty
        mine.tail = places[at:]
        mine.leaving = self._copy_out(parts, mine, content)
        self._withdraw(mine)
        self._give(private)
        self._give(mine.spare)
        mine.blocks, mine.spare, mine.sent, mine.parked = [], [], 0, True
        self.totals.rotations_out += 1
        self.totals.rotated += num_cached + len(content)
        self.totals.rotated_clean += num_cached - num_dirty
        return True

    def resume(self, table: BlockTable, extra: int) -> bool:
        """Bring a parked table back, with `extra` new blocks. False, and nothing changed, when HBM has no room."""
        mine = cast(TierTable, table)
        nodes = cast(list[TierNode], mine.node.path())
        missing = mine.num_cached - sum([len(node.blocks) for node in nodes])
        idle = sum([len(node.blocks) for node in nodes if not node.holders])
        if missing + len(mine.tail) + extra > self.num_available - idle:
            return False
        mine.parked = False
        for node in nodes:
            if not node.holders and node.blocks:
                del self._idle[node]
                self._num_idle -= len(node.blocks)
            node.holders += 1
            node.parked -= 1
            if not node.parked and node.dram:
                self._pinned -= len(node.dram)
                self._order.mirrors[node] = None
            self._use(mine, node)
        self._load(mine)
        self.totals.rotations_in += 1
        return self.allocate(mine, extra) is not None

    def is_intact(self, table: BlockTable) -> bool:
        """False when a failed copy took something this table needs."""
        mine = cast(TierTable, table)
        return not mine.lost and cast(TierNode, mine.node).alive  # what is forgotten is with all that is under it

    # ------------------------------------------------------------------ copies

    def take_copies(self) -> Copies:
        """The copies planned since the last call, for the plan being made. Every one must reach an executor."""
        return self.copies.take()

    def settle(self, copied: Sequence[int], failed: Sequence[int]) -> bool:
        """Take in what a result reports. True when tables may have lost something: ask `is_intact` of each."""
        if failed or self.copies.is_any_spoiled:
            return self._settle_one_by_one(copied, failed)
        self._count(copied)
        return False

    def _settle_one_by_one(self, copied: Sequence[int], failed: Sequence[int]) -> bool:
        """In order: what follows a failed copy is spoiled before its turn."""
        bad, hurt = set(failed), False
        known = self.copies.look_up({*copied, *bad})
        for id in sorted([*copied, *bad]):
            copy, owner, depth, readers = known[id]
            if not self.copies.is_spoiled(id) and id not in bad:
                self._count([id])
                continue
            self.totals.failed += 1
            self.copies.over([id])
            hurt |= self._fail(copy, owner, depth)
            for table in readers:
                table.lost = hurt = True
        return hurt

    def _count(self, copied: Sequence[int]) -> None:
        """They were made."""
        moved_in, moved_out = self.copies.over(copied)
        self.totals.blocks_in += moved_in
        self.totals.blocks_out += moved_out

    def _fail(self, copy: BlockCopy, owner: TierNode | TierTable, depth: int) -> bool:
        """What the copy should have written is not there. depth: of the block, from the root, where a node owns it.
        True when somebody may need it."""
        self.copies.spoil_after(copy)
        if isinstance(owner, TierTable):
            owner.lost = True
            return True
        node = node_at(owner, depth)
        if node is None:
            return False
        at = depth - node.start
        if (node.mirroring if copy.out else node.loading)[at : at + 1] != [copy.id]:
            return False  # it has given up the place the copy was for
        if copy.out and at < len(node.blocks) and node.loading[at] not in self.copies.pending:
            if at + 1 < len(node.dram):
                node = cast(TierNode, self._split(node, at + 1))
            self._drop_dram(node, at)
            self._dirty.append((node, depth, depth + 1))
            return False
        if at:
            self._split(node, at)
        self.forget(node)
        return True

    def _load(self, table: TierTable) -> None:
        """Plan the copies in of what a table has in DRAM only: nodes, and its tail if it has been parked."""
        tail = table.tail
        blocks, at = self._take(table.missing + len(tail)), 0
        parts: list[Part] = []
        if table.missing:
            for node in cast(list[TierNode], table.node.path()):
                here, absent = len(node.blocks), node.length - len(node.blocks)
                if absent:
                    new = blocks[at : at + absent]
                    table.blocks[node.start + here : node.end] = new
                    node.blocks += new
                    parts.append((node, node.start + here, node.end))
                    at += absent
        tail_blocks = blocks[at:]
        table.blocks += tail_blocks
        ids = self._copy_in(parts, table, tail_blocks)
        if ids:
            self.copies.read_by(table, ids)
        self._pinned -= len(tail)
        self._give_dram(tail)
        table.missing, table.tail = 0, []

    def _new_table(self, root: Node) -> BlockTable:
        return TierTable(root)


def build_cache(
    num_blocks: int, num_dram: int, page_size: int, *, prefix_cache: bool = True, link: LinkProfile | None = None
) -> KVCache:
    """A cache of one tier, or of two where there are DRAM blocks."""
    if num_dram:
        return DuplexCache(num_blocks, num_dram, page_size, prefix_cache=prefix_cache, link=link)
    return KVCache(num_blocks, page_size, prefix_cache=prefix_cache)
