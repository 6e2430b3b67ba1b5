"""Two tiers, one prefix tree: what sequences do in a KV cache in HBM and DRAM. Pure Python; no torch.

docs/duplexkv.md says what the states are and why the ordering holds. In one sentence: a block may change hands at any
time, and the copy still pending on it goes with it, as `after` of the next copy or as something the next work waits
for. Each operation costs O(blocks touched).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node
from superinfer.runtime.kv.copies import BlockCopy
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
        mine = cast(TierTable, table)
        assert not mine.blocks, "adopt needs an empty table"
        for node in cast(Sequence[TierNode], path):
            self._hold(node)
            node.reused = True
            if node.block < 0:
                mine.missing.append(len(mine.blocks))
            elif node.loading:
                self.copies.read_by(mine, node.loading)
            mine.nodes.append(node)
            mine.blocks.append(node.block)

    def allocate(self, table: BlockTable, count: int) -> list[int] | None:
        """See KVCache.allocate. Also plans the copies in of what the table has adopted from DRAM."""
        mine = cast(TierTable, table)
        if count + len(mine.missing) > self.num_available:
            return None
        if mine.missing:
            self.totals.hits += len(mine.missing)
            self._load_missing(mine)
        new = [self._take() for _ in range(count)]
        if busy := self.copies.on_hbm:
            mine.awaits += [busy[block] for block in new if block in busy]
        mine.blocks += new
        return new

    def awaits(self, table: BlockTable) -> list[int]:
        """Copies that work on this table must wait for: planned, and not reported yet."""
        mine = cast(TierTable, table)
        if mine.awaits:
            mine.awaits = [id for id in mine.awaits if id in self.copies]
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
        pinned = self._pinned + sum(node.parked == 0 for node in nodes) - sum(node.parked == 0 for node in dirty)
        if len(dirty) + len(content) > self.num_dram - pinned:
            return False
        self._pinned = pinned
        for node in nodes:  # pinned; they are held, so they are not among the idle
            if node.parked == 0:
                self._order.mirrors.pop(node, None)
            node.parked += 1
        for node in dirty:
            self._mirror(node, self._take_dram())
        mine.leaving = [node.mirroring for node in dirty]
        for block in content:
            dram = self._take_dram()
            mine.tail.append(dram)
            self._pinned += 1
            mine.leaving.append(self.copies.plan(True, block, dram, mine))
        self._withdraw(mine)
        self._give(private)
        self._give(mine.spare)
        for node in reversed(nodes):  # no longer held, but parked: idle in HBM only
            node.holders -= 1
            if node.holders == 0 and node.block >= 0:
                self._idle[node] = None
        mine.blocks, mine.spare, mine.sent, mine.parked = [], [], 0, True
        self.totals.rotations_out += 1
        self.totals.rotated += len(nodes) + len(content)
        self.totals.rotated_clean += len(nodes) - len(dirty)
        return True

    def resume(self, table: BlockTable, extra: int) -> bool:
        """Bring a parked table back, with `extra` new blocks. False, and nothing changed, when HBM has no room."""
        mine = cast(TierTable, table)
        nodes = cast(list[TierNode], mine.nodes)
        idle = sum(node.block >= 0 and node.holders == 0 for node in nodes)
        absent = sum(node.block < 0 for node in nodes)
        if absent + len(mine.tail) + extra > self.num_available - idle:
            return False
        mine.parked = False
        for at, node in enumerate(nodes):
            if node.holders == 0:
                self._idle.pop(node, None)
            node.holders += 1
            node.parked -= 1
            if node.parked == 0 and node.dram >= 0:
                self._pinned -= 1
                self._order.mirrors[node] = None
            if node.block < 0:
                mine.missing.append(at)
            elif node.loading:
                self.copies.read_by(mine, node.loading)
            mine.blocks.append(node.block)
        self._load_missing(mine)
        for dram in mine.tail:
            block = self._take()
            self.copies.read_by(mine, self.copies.plan(False, block, dram, mine))
            mine.blocks.append(block)
        self._pinned -= len(mine.tail)
        self._give_dram(mine.tail)
        mine.tail = []
        self.totals.rotations_in += 1
        return self.allocate(mine, extra) is not None

    def is_intact(self, table: BlockTable) -> bool:
        """False when a failed copy took something this table needs. Only to be asked after a failure: O(blocks)."""
        mine = cast(TierTable, table)
        return not mine.lost and all(node.alive for node in cast(list[TierNode], mine.nodes))

    # ------------------------------------------------------------------ copies

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The copies planned since the last call, for the plan being made. Every one must reach an executor."""
        return self.copies.take()

    def settle(self, copied: Iterable[int], failed: Iterable[int]) -> bool:
        """Take in what a result reports. True when tables may have lost something: ask `is_intact` of each."""
        bad, hurt, over = set(failed), False, self.copies.over
        num_in = num_out = 0
        for id in sorted([*copied, *bad]):  # in order: what follows a failed copy is spoiled before its turn
            copy, owner, readers, spoiled = over(id)
            if spoiled or id in bad:
                self.totals.failed += 1
                hurt |= self._fail(copy, owner)
                for table in readers:
                    table.lost = hurt = True
            elif copy.out:
                num_out += 1
            else:
                num_in += 1
            if isinstance(owner, TierNode):
                if owner.loading == id:
                    owner.loading = 0
                if owner.mirroring == id:
                    owner.mirroring = 0
        self.totals.blocks_out += num_out
        self.totals.blocks_in += num_in
        return hurt

    def _fail(self, copy: BlockCopy, owner: TierNode | TierTable) -> bool:
        """What the copy should have written is not there. True when somebody may need it."""
        self.copies.spoil_after(copy)
        if isinstance(owner, TierTable):
            owner.lost = True
            return True
        if copy.id == owner.mirroring:
            if owner.block >= 0 and not owner.loading:
                self._drop_dram(owner)
                self._dirty.append(owner)
                return False
        elif copy.id != owner.loading:
            return False  # it has given up the place the copy was for
        self.forget(owner)
        return True

    def _load_missing(self, table: TierTable) -> None:
        for at in table.missing:
            node = cast(TierNode, table.nodes[at])
            node.block = table.blocks[at] = self._take()
            node.loading = self.copies.plan(False, node.block, node.dram, node)
            self.copies.read_by(table, node.loading)
        table.missing = []

    def _new_table(self, root: Node) -> BlockTable:
        return TierTable(root)


def build_cache(
    num_blocks: int, num_dram: int, page_size: int, *, prefix_cache: bool = True, link: LinkProfile | None = None
) -> KVCache:
    """A cache of one tier, or of two where there are DRAM blocks."""
    if num_dram:
        return DuplexCache(num_blocks, num_dram, page_size, prefix_cache=prefix_cache, link=link)
    return KVCache(num_blocks, page_size, prefix_cache=prefix_cache)
