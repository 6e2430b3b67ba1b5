"""Two tiers, one prefix tree: what sequences do in a KV cache in HBM and DRAM. Pure Python; no torch.

docs/duplexkv.md says what the states are and why the ordering holds. In one sentence: a block may change hands at any
time, and the copy still pending on it goes with it, as `after` of the next copy or as something the next work waits
for. Each operation costs O(blocks touched).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.tiered_cache import TieredCache
from superinfer.runtime.kv.tiers import TierNode, TierTable


class DuplexCache(TieredCache):
    """A KVCache over `num_blocks` HBM blocks with `num_dram` DRAM blocks behind them.

    link: what is known of the link between them, for those who decide what moves.
    """

    # ------------------------------------------------------------------ hold and grow

    def adopt(self, table: BlockTable, path: Sequence[Node]) -> None:
        """See KVCache.adopt. Blocks that are in DRAM only get their place, and their copy in, with `allocate`."""
        mine, nodes, pending = cast(TierTable, table), cast(Sequence[TierNode], path), self.copies.pending
        assert not mine.blocks, "adopt needs an empty table"
        for node in nodes:
            self._hold(node)
            node.reused = True
        mine.nodes += nodes
        mine.blocks = [node.block for node in nodes]
        mine.missing = [at for at, block in enumerate(mine.blocks) if block < 0]
        self.copies.read_by(mine, [node.loading for node in nodes if node.loading in pending])

    def allocate(self, table: BlockTable, count: int) -> list[int] | None:
        """See KVCache.allocate. Also plans the copies in of what the table has adopted from DRAM."""
        mine = cast(TierTable, table)
        if count + len(mine.missing) > self.num_available:
            return None
        if mine.missing:
            self.totals.hits += len(mine.missing)
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
            mine.awaits = [id for id in mine.awaits if id in pending]
        return mine.awaits

    def release(self, table: BlockTable) -> None:
        """See KVCache.release. The table may be parked."""
        mine = cast(TierTable, table)
        if not mine.parked:
            super().release(table)
            return
        for node in reversed(cast(list[TierNode], mine.nodes)):
            self._unpin(node)
        self._give_dram(mine.tail)
        self._pinned -= len(mine.tail)
        mine.nodes, mine.tail = [], []
        mine.root.holders -= 1
        self._drop_root(mine.root)

    # ------------------------------------------------------------------ rotation

    def park(self, table: BlockTable, computed: int) -> bool:
        """Move a table out of HBM, with the content of its first `computed` tokens. False, and nothing changed, when
        DRAM has no room. Its HBM blocks are available at once."""
        mine = cast(TierTable, table)
        nodes = cast(list[TierNode], mine.nodes)
        private = mine.blocks[len(nodes) :]
        content = private[: self.blocks_for(computed) - len(nodes)]
        dirty = [node for node in nodes if node.dram < 0]
        clean = sum([node.parked == 0 and node.dram >= 0 for node in nodes])  # and pinned from now on
        if len(dirty) + len(content) > self.num_dram - self._pinned - clean:
            return False
        mirrors, idle = self._order.mirrors, self._idle
        for node in reversed(nodes):  # no longer held, but parked: idle in HBM only
            if node.dram >= 0 and node.parked == 0:
                del mirrors[node]
            node.parked += 1
            node.holders -= 1
            if node.holders == 0 and node.block >= 0:
                idle[node] = None
        self._pinned += clean
        places = self._take_dram(len(dirty) + len(content))
        self._pinned += len(places)
        for node, place in zip(dirty, places, strict=False):
            node.dram = place
        mine.tail = places[len(dirty) :]
        mine.leaving = self._copy_out(dirty) + self.copies.plan(True, content, mine.tail, [mine] * len(content))
        self._withdraw(mine)
        self._give(private)
        self._give(mine.spare)
        mine.blocks, mine.spare, mine.sent, mine.parked = [], [], 0, True
        self.totals.rotations_out += 1
        self.totals.rotated += len(nodes) + len(content)
        self.totals.rotated_clean += len(nodes) - len(dirty)
        return True

    def resume(self, table: BlockTable, extra: int) -> bool:
        """Bring a parked table back, with `extra` new blocks. False, and nothing changed, when HBM has no room."""
        mine = cast(TierTable, table)
        nodes = cast(list[TierNode], mine.nodes)
        missing = [at for at, node in enumerate(nodes) if node.block < 0]
        idle = sum([node.holders == 0 for node in nodes]) - sum([nodes[at].holders == 0 for at in missing])
        if len(missing) + len(mine.tail) + extra > self.num_available - idle:
            return False
        mine.parked = False
        mirrors, in_hbm = self._order.mirrors, self._idle
        for node in nodes:
            if node.holders == 0 and node.block >= 0:
                in_hbm.pop(node, None)
            node.holders += 1
            node.parked -= 1
            if node.parked == 0 and node.dram >= 0:
                self._pinned -= 1
                mirrors[node] = None
        mine.missing, mine.blocks, pending = missing, [node.block for node in nodes], self.copies.pending
        self.copies.read_by(mine, [node.loading for node in nodes if node.loading in pending])
        self._load(mine)
        self.totals.rotations_in += 1
        return self.allocate(mine, extra) is not None

    def is_intact(self, table: BlockTable) -> bool:
        """False when a failed copy took something this table needs. Only to be asked after a failure: O(blocks)."""
        mine = cast(TierTable, table)
        return not mine.lost and all(node.alive for node in cast(list[TierNode], mine.nodes))

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
            copy, owner, readers = known[id]
            if not self.copies.is_spoiled(id) and id not in bad:
                self._count([id])
                continue
            self.totals.failed += 1
            self.copies.over([id])
            hurt |= self._fail(copy, owner)
            for table in readers:
                table.lost = hurt = True
        return hurt

    def _count(self, copied: Sequence[int]) -> None:
        """They were made."""
        moved_in, moved_out = self.copies.over(copied)
        self.totals.blocks_in += moved_in
        self.totals.blocks_out += moved_out

    def _fail(self, copy: BlockCopy, owner: TierNode | TierTable) -> bool:
        """What the copy should have written is not there. True when somebody may need it."""
        self.copies.spoil_after(copy)
        if isinstance(owner, TierTable):
            owner.lost = True
            return True
        if copy.id == owner.mirroring:
            if owner.block >= 0 and owner.loading not in self.copies.pending:
                self._drop_dram(owner)
                self._dirty.append(owner)
                return False
        elif copy.id != owner.loading:
            return False  # it has given up the place the copy was for
        self.forget(owner)
        return True

    def _load(self, table: TierTable) -> None:
        """Plan the copies in of what a table has in DRAM only: nodes, and its tail if it has been parked."""
        nodes = [cast(TierNode, table.nodes[at]) for at in table.missing]
        blocks = self._take(len(nodes) + len(table.tail))
        for at, node, block in zip(table.missing, nodes, blocks, strict=False):
            node.block = table.blocks[at] = block
        tail = blocks[len(nodes) :]
        table.blocks += tail
        ids = self._copy_in(nodes) + self.copies.plan(False, tail, table.tail, [table] * len(tail))
        self.copies.read_by(table, ids)
        self._pinned -= len(tail)
        self._give_dram(table.tail)
        table.missing, table.tail = [], []

    def _new_table(self, root: Node) -> BlockTable:
        return TierTable(root)


def build_cache(
    num_blocks: int, num_dram: int, page_size: int, *, prefix_cache: bool = True, link: LinkProfile | None = None
) -> KVCache:
    """A cache of one tier, or of two where there are DRAM blocks."""
    if num_dram:
        return DuplexCache(num_blocks, num_dram, page_size, prefix_cache=prefix_cache, link=link)
    return KVCache(num_blocks, page_size, prefix_cache=prefix_cache)
