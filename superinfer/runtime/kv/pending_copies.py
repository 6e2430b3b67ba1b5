"""Copies planned and not reported yet, and what has to come after them. Pure Python; no torch.

For each block of either pool, the last copy that touches it is known. As long as that is pending, who gets the block
next inherits it: a copy as `after`, a table as something its work waits for (docs/duplexkv.md, "Ordering"). What a
failed copy should have written is garbage, and so is what a later one makes of it.

Blocks move by the hundred. So all that each costs is in comprehensions and sets; what only a failure needs (which copy
an id is, who reads what it brings) is looked up when there is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from superinfer.runtime.kv.copies import NO_COPIES, BlockCopy, Copies, no_copies
from superinfer.runtime.kv.tiers import Part, TierNode, TierTable


class _Run(NamedTuple):
    """Copies planned together: of parts of nodes, and then of a table's private blocks. No block is in it twice."""

    out: bool
    ids: list[int]
    hbm: list[int]
    dram: list[int]
    parts: list[Part]
    table: TierTable | None

    def owners(self) -> list[tuple[TierNode | TierTable, int]]:
        """Of each copy: the node, and the block's number from the root; or the table."""
        owners: list[tuple[TierNode | TierTable, int]] = []
        for node, first, end in self.parts:
            owners += [(node, at) for at in range(first, end)]
        if self.table is not None:
            owners += [(self.table, 0)] * (len(self.ids) - len(owners))
        return owners


class PendingCopies:
    """Each is of a node's block or of a table's private one. Ids only grow, from 1.

    pending: ids of those planned and not reported. on_hbm, on_dram: by block, the last copy that touches it, pending or
    over; 0: there was none.
    """

    def __init__(self, num_hbm: int, num_dram: int) -> None:
        self.pending: set[int] = set()
        self.on_hbm = [0] * num_hbm
        self.on_dram = [0] * num_dram
        self._pending_out: set[int] = set()
        self._outbox = (no_copies(), no_copies())  # in, out
        # Until all older copies are over, too: runs, and tables that read what copies in bring, with the last of those.
        self._runs: deque[_Run] = deque()
        self._readers: deque[tuple[int, TierTable, Sequence[int]]] = deque()
        self._spoiled: set[int] = set()  # they read what a failed one should have written
        self._last = 0
        self._oldest = 1  # no copy before this one is pending

    def is_clear(self) -> bool:
        """Whether nothing is known of any copy: so it is once all copies are reported."""
        outbox = any(way.ids for way in self._outbox)
        return not (self.pending or self._pending_out or outbox or self._runs or self._readers or self._spoiled)

    @property
    def num_out(self) -> int:
        """Pending copies out."""
        return len(self._pending_out)

    @property
    def is_any_spoiled(self) -> bool:
        """Whether some that will be reported as made are of garbage."""
        return bool(self._spoiled)

    @property
    def oldest(self) -> int:
        """Id of the oldest; when there is none, the id that the next one will have."""
        end = self._last + 1
        if self.pending:
            self._oldest = next(filter(self.pending.__contains__, range(self._oldest, end)))
        else:
            self._oldest = end
        return self._oldest

    def plan(
        self, out: bool, hbm: list[int], dram: list[int], parts: list[Part], table: TierTable | None = None
    ) -> list[int]:
        """Plan some, each after those pending on its two blocks; no block twice. They are of these parts, and the rest
        of a table. Returns their ids."""
        assert len(hbm) == len(dram), "a copy has a block in either pool"
        ids = [*range(self._last + 1, self._last + 1 + len(hbm))]
        if not ids:
            return ids
        self._last = ids[-1]
        way, pending, on_hbm, on_dram = self._outbox[out], self.pending, self.on_hbm, self.on_dram
        if pending:
            after = [id if id in pending else 0 for id in map(on_hbm.__getitem__, hbm)]
            if not pending.isdisjoint(map(on_dram.__getitem__, dram)):
                others = [id if id in pending else 0 for id in map(on_dram.__getitem__, dram)]
                for id, pair in zip(ids, zip(after, others, strict=True), strict=True):
                    if all(pair) and pair[0] != pair[1]:
                        way.also[id] = (min(pair),)
                after = [*map(max, after, others)]
        else:
            after = [0] * len(ids)
        for id, block, place in zip(ids, hbm, dram, strict=True):
            on_hbm[block] = on_dram[place] = id
        pending.update(ids)
        if out:
            self._pending_out.update(ids)
        way.ids.extend(ids)
        way.hbm.extend(hbm)
        way.dram.extend(dram)
        way.after.extend(after)
        self._runs.append(_Run(out, ids, hbm, dram, parts, table))
        return ids

    def take(self) -> Copies:
        """Those planned since the last call."""
        if not self._outbox[0].ids and not self._outbox[1].ids:
            return NO_COPIES
        copies, self._outbox = Copies(*self._outbox), (no_copies(), no_copies())
        return copies

    def read_by(self, table: TierTable, ids: Sequence[int]) -> None:
        """The table's work reads what these copies in bring, at least one: it waits for them, and is lost with any."""
        table.awaits += ids
        self._readers.append((max(ids), table, ids))

    def over(self, ids: Sequence[int]) -> tuple[int, int]:
        """Forget those that have been reported. Returns how many came in and how many went out. RuntimeError where one
        is not pending."""
        pending, outs = len(self.pending), len(self._pending_out)
        self.pending.difference_update(ids)
        self._pending_out.difference_update(ids)
        if self._spoiled:
            self._spoiled.difference_update(ids)
        moved, moved_out = pending - len(self.pending), outs - len(self._pending_out)
        if moved != len(ids):
            raise RuntimeError(f"of {len(ids)} copies reported, {len(ids) - moved} are not under way or named twice")
        oldest = self.oldest
        while self._runs and self._runs[0].ids[-1] < oldest:
            self._runs.popleft()
        while self._readers and self._readers[0][0] < oldest:
            self._readers.popleft()
        return moved - moved_out, moved_out

    # ------------------------------------------------------------------ when one fails: O(pending)

    def look_up(self, ids: set[int]) -> dict[int, tuple[BlockCopy, TierNode | TierTable, int, list[TierTable]]]:
        """By id: the copy, its owner (a node with the block's number from the root), and who reads what it brings."""
        found: dict[int, tuple[BlockCopy, TierNode | TierTable, int, list[TierTable]]] = {}
        for run in self._runs:
            for id, hbm, dram, (owner, depth) in zip(run.ids, run.hbm, run.dram, run.owners(), strict=True):
                if id in ids:
                    found[id] = BlockCopy(id, run.out, hbm, dram), owner, depth, []
        for _, table, read in self._readers:
            for id in ids.intersection(read):
                found[id][3].append(table)
        return found

    def is_spoiled(self, id: int) -> bool:
        """Whether it moved garbage, though it was made."""
        return id in self._spoiled

    def spoil_after(self, failed: BlockCopy) -> None:
        """Pending copies of what a failed one should have written move garbage, whoever has the block by now."""
        written = failed.dram if failed.out else failed.hbm
        for run in self._runs:
            blocks = run.dram if failed.out else run.hbm
            if run.ids[-1] <= failed.id or written not in blocks:
                continue
            id = run.ids[blocks.index(written)]
            if id > failed.id and id in self.pending:
                if run.out == failed.out:
                    break  # it writes the block anew
                self._spoiled.add(id)
