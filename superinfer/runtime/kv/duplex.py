"""Two tiers, one prefix tree: the bookkeeping of a KV cache in HBM and DRAM. Pure Python; no torch.

docs/duplexkv.md says what the states are and why the ordering holds. In one sentence: a block may change hands at any
time, and the copy still pending on it goes with it, as `after` of the next copy or as something the next work waits
for. Each operation costs O(blocks touched).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import cast

from superinfer.runtime.kv.cache import BlockTable, KVCache, Node
from superinfer.runtime.kv.copies import BlockCopy, TierCounts
from superinfer.runtime.kv.drop_order import DropOrder
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.kv.tiers import TierNode, TierTable


class DuplexCache(KVCache):
    """A KVCache over `num_blocks` HBM blocks with `num_dram` DRAM blocks behind them.

    link: what is known of the link between them, for those who decide what moves.
    """

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
        self._free_dram = deque(range(num_dram - 1, -1, -1))
        self._pinned = 0  # DRAM blocks of parked tables
        self._lru = DropOrder()  # idle nodes by age, whatever tier they are in
        self._mirrors: OrderedDict[TierNode, None] = OrderedDict()  # held and clean: dropped if a rotation wants room
        self._dirty: deque[TierNode] = deque()  # to be mirrored, oldest first; entries may be out of date
        self._pending: dict[int, tuple[BlockCopy, TierNode | TierTable]] = {}
        self._pending_out = 0
        self._awaited: dict[int, list[TierTable]] = {}  # pending copy in: whose work reads what it brings
        self._spoiled: set[int] = set()  # pending copies that read what a failed one should have written
        self._busy: dict[int, int] = {}  # HBM block: the last pending copy that touches it
        self._busy_dram: dict[int, int] = {}
        self._outbox: list[BlockCopy] = []
        self._last_copy = 0
        self._oldest = 1  # no copy before this one is pending

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
        return len(self._pending)

    @property
    def num_pending_in(self) -> int:
        """Of these, copies in."""
        return len(self._pending) - self._pending_out

    @property
    def oldest_pending(self) -> int:
        """Id of the oldest copy not reported; when there is none, the id that the next one will have."""
        while self._oldest <= self._last_copy and self._oldest not in self._pending:
            self._oldest += 1
        return self._oldest

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
                self._await(mine, node.loading)
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
        if self._busy:
            mine.awaits += [self._busy[block] for block in new if block in self._busy]
        mine.blocks += new
        return new

    def awaits(self, table: BlockTable) -> list[int]:
        """Copies that work on this table must wait for: planned, and not reported yet."""
        mine = cast(TierTable, table)
        if mine.awaits:
            mine.awaits = [id for id in mine.awaits if id in self._pending]
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

    def clear(self) -> None:
        """Forget all cached content that nobody holds or is parked on."""
        for node in [*self._lru, *cast(Iterable[TierNode], list(self._idle))]:
            if node.alive and not node.parked and not node.holders:
                self._forget(node)

    # ------------------------------------------------------------------ for later turns

    def keep(self, table: BlockTable, until: float) -> None:
        """Before a table is released: what of it is in the tree is dropped from DRAM after all that nobody wants kept,
        until then. Time is that of `let_go`."""
        self._lru.keep(cast(list[TierNode], list(table.nodes)), until)

    def let_go(self, now: float) -> None:
        """What was to be kept until `now` is dropped next. Costs O(blocks whose time is over)."""
        self._lru.let_go(now)

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
            node.loading = self._plan_copy(False, node.block, node.dram, node)
            loaded.append(node)
        for node in reversed(loaded):
            if node.holders == 0:
                self._idle[node] = None
        self.totals.prefetched += len(loaded)
        return len(loaded)

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
                self._mirrors.pop(node, None)
            node.parked += 1
        for node in dirty:
            self._mirror(node, self._take_dram(mirrors=True))
        for block in content:
            dram = self._take_dram(mirrors=True)
            mine.tail.append(dram)
            self._pinned += 1
            self._plan_copy(True, block, dram, mine)
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
                self._mirrors[node] = None
            if node.block < 0:
                mine.missing.append(at)
            elif node.loading:
                self._await(mine, node.loading)
            mine.blocks.append(node.block)
        self._load_missing(mine)
        for dram in mine.tail:
            block = self._take()
            self._await(mine, self._plan_copy(False, block, dram, mine))
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

    def mirror(self, budget: int) -> None:
        """Plan copies out of dirty blocks while fewer than `budget` copies out are pending and DRAM has idle room."""
        while self._dirty and self._pending_out < budget:
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

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The copies planned since the last call, for the plan being made. Every one must reach an executor."""
        copies, self._outbox = tuple(self._outbox), []
        return copies

    def settle(self, copied: Iterable[int], failed: Iterable[int]) -> bool:
        """Take in what a result reports. True when tables may have lost something: ask `is_intact` of each."""
        bad, hurt = set(failed), False
        for id in sorted([*copied, *bad]):  # in order: what follows a failed copy is spoiled before its turn
            spoiled = id in self._spoiled
            copy, owner = self._pop_pending(id)
            readers = self._awaited.pop(id, ())
            if id in bad or spoiled:
                self.totals.failed += 1
                hurt |= self._fail(copy, owner)
                for table in readers:
                    table.lost = hurt = True
            elif copy.out:
                self.totals.blocks_out += 1
            else:
                self.totals.blocks_in += 1
            if isinstance(owner, TierNode):
                owner.loading = 0 if owner.loading == id else owner.loading
                owner.mirroring = 0 if owner.mirroring == id else owner.mirroring
        return hurt

    def _fail(self, copy: BlockCopy, owner: TierNode | TierTable) -> bool:
        """What the copy should have written is not there. True when somebody may need it."""
        self._spoil_readers(copy)
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
        self._forget(owner)
        return True

    def _spoil_readers(self, failed: BlockCopy) -> None:
        """Pending copies of what a failed one should have written move garbage, whoever has the block by now. Failures
        are rare: O(pending)."""
        for id, (copy, _) in self._pending.items():
            same = copy.dram == failed.dram if failed.out else copy.hbm == failed.hbm
            if id > failed.id and same:
                if copy.out == failed.out:
                    break  # it writes the block anew
                self._spoiled.add(id)

    def _pop_pending(self, id: int) -> tuple[BlockCopy, TierNode | TierTable]:
        copy, owner = self._pending.pop(id)
        self._spoiled.discard(id)
        self._pending_out -= copy.out
        if self._busy.get(copy.hbm) == id:
            del self._busy[copy.hbm]
        if self._busy_dram.get(copy.dram) == id:
            del self._busy_dram[copy.dram]
        return copy, owner

    def _plan_copy(self, out: bool, hbm: int, dram: int, owner: TierNode | TierTable) -> int:
        self._last_copy = id = self._last_copy + 1
        first, second = self._busy.get(hbm, 0), self._busy_dram.get(dram, 0)
        if not first or not second or first == second:
            after: tuple[int, ...] = (first or second,) if first or second else ()
        else:
            after = (first, second) if first < second else (second, first)
        copy = BlockCopy(id, out, hbm, dram, after)
        self._busy[hbm] = self._busy_dram[dram] = id
        self._pending[id] = (copy, owner)
        self._pending_out += out
        self._outbox.append(copy)
        return id

    def _mirror(self, node: TierNode, dram: int) -> None:
        node.dram = dram
        node.mirroring = self._plan_copy(True, node.block, dram, node)
        if node.parked:
            self._pinned += 1
        elif node.holders:
            self._mirrors[node] = None
        else:
            self._lru.add(node)

    def _load_missing(self, table: TierTable) -> None:
        for at in table.missing:
            node = cast(TierNode, table.nodes[at])
            node.block = table.blocks[at] = self._take()
            node.loading = self._plan_copy(False, node.block, node.dram, node)
            self._await(table, node.loading)
        table.missing = []

    def _await(self, table: TierTable, load: int) -> None:
        table.awaits.append(load)
        self._awaited.setdefault(load, []).append(table)

    # ------------------------------------------------------------------ inside: holding

    def _new_table(self, root: Node) -> BlockTable:
        return TierTable(root)

    def _new_node(self, key: bytes, block: int, parent: Node) -> Node:
        node = TierNode(key, block, parent)
        self._dirty.append(node)
        return node

    def _hold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        if mine.holders == 0:
            self._idle.pop(mine, None)
            self._lru.discard(mine)
            if mine.dram >= 0 and not mine.parked:
                self._mirrors[mine] = None
        mine.holders += 1

    def _unhold(self, node: Node) -> None:
        mine = cast(TierNode, node)
        mine.holders -= 1
        if mine.holders == 0 and mine.alive:
            self._mirrors.pop(mine, None)
            if mine.block >= 0:
                self._idle[mine] = None
            if not mine.parked:
                self._lru.add(mine)

    def _pin(self, node: TierNode) -> None:
        if node.parked == 0:
            self._lru.discard(node)
            self._mirrors.pop(node, None)
            self._pinned += node.dram >= 0
        node.parked += 1

    def _unpin(self, node: TierNode) -> None:
        node.parked -= 1
        if node.parked == 0 and node.alive:
            self._pinned -= node.dram >= 0
            if node.holders == 0:
                self._lru.add(node)
            elif node.dram >= 0:
                self._mirrors[node] = None

    # ------------------------------------------------------------------ inside: blocks

    def _give(self, blocks: Iterable[int]) -> None:
        """Blocks with a pending copy go to the far end: handed out last, when it is likely over."""
        for block in blocks:
            if block in self._busy:
                self._free.appendleft(block)
            else:
                self._free.append(block)

    def _give_dram(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self._busy_dram:
                self._free_dram.appendleft(block)
            else:
                self._free_dram.append(block)

    def _take(self) -> int:
        if not self._free:
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        """The oldest idle node leaves HBM: for free when it is clean, for good when it is dirty."""
        node = cast(TierNode, self._idle.popitem(last=False)[0])
        if node.dram < 0:
            self.totals.forgotten += 1
            self._forget(node)
            return
        block = node.block
        if block in self._busy:
            self._free.appendleft(block)
        else:
            self._free.append(block)
        node.block = -1
        node.loading = 0
        self.totals.left_clean += 1

    def _take_dram(self, mirrors: bool) -> int:
        """For a caller who knows that there is room."""
        if not self._free_dram:
            made = self._evict_dram(mirrors)
            assert made, "DRAM room was promised that is not there"
        return self._free_dram.pop()

    def _evict_dram(self, mirrors: bool) -> bool:
        """Free a DRAM block: of the oldest idle node without a hit since it was last asked, else, with `mirrors`, of a
        held one, which is only dirty again, and last of one to be kept. False when all the rest is parked."""
        while (node := self._lru.oldest()) is not None:
            if node.dram < 0:
                continue  # in HBM only; it comes back here when it is mirrored or released
            if node.reused:
                node.reused = False
                self._lru.add(node)
                continue
            self._leave_dram(node)
            return True
        if mirrors and self._mirrors:
            node = next(iter(self._mirrors))
            self._drop_dram(node)
            self._dirty.append(node)
            return True
        while mirrors and (node := self._lru.oldest_kept()) is not None:
            if node.dram >= 0:
                self._leave_dram(node)
                return True
        return False

    def _leave_dram(self, node: TierNode) -> None:
        if node.block >= 0:
            self._drop_dram(node)
        else:
            self._forget(node)

    def _drop_dram(self, node: TierNode) -> None:
        self._mirrors.pop(node, None)
        self._pinned -= node.parked > 0
        self._give_dram((node.dram,))
        node.dram, node.mirroring = -1, 0

    def _forget(self, node: TierNode) -> None:
        """Take a node and what is under it out of the tree and give back all their blocks."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        stack = [node]
        while stack:
            gone = stack.pop()
            if gone.dram >= 0:
                self._drop_dram(gone)
            if gone.block >= 0:
                self._give((gone.block,))
            self._idle.pop(gone, None)
            self._lru.discard(gone)
            gone.block, gone.loading, gone.alive, gone.parent = -1, 0, False, None
            stack += cast(Iterable[TierNode], gone.children.values())
            gone.children = {}
        self._drop_root(parent)


def build_cache(
    num_blocks: int, num_dram: int, page_size: int, *, prefix_cache: bool = True, link: LinkProfile | None = None
) -> KVCache:
    """A cache of one tier, or of two where there are DRAM blocks."""
    if num_dram:
        return DuplexCache(num_blocks, num_dram, page_size, prefix_cache=prefix_cache, link=link)
    return KVCache(num_blocks, page_size, prefix_cache=prefix_cache)
