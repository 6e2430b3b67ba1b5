"""Copies planned and not reported yet, and what has to come after them. Pure Python; no torch.

For each block of either pool, the last such copy that touches it is known. Who gets the block next inherits it: a copy
as `after`, a table as something its work waits for (docs/duplexkv.md, "Ordering"). What a failed copy should have
written is garbage, and so is what a later one makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from superinfer.runtime.kv.copies import BlockCopy
from superinfer.runtime.kv.tiers import TierNode, TierTable


class PendingCopies:
    """Each has an owner: the node that moves, or the table whose private block does. Ids only grow."""

    def __init__(self) -> None:
        self.on_hbm: dict[int, int] = {}  # block: the last pending copy that touches it
        self.on_dram: dict[int, int] = {}
        self.num_out = 0
        self._known: dict[int, tuple[BlockCopy, TierNode | TierTable]] = {}
        self._readers: dict[int, list[TierTable]] = {}  # of what a copy in brings
        self._spoiled: set[int] = set()  # they read what a failed one should have written
        self._outbox: list[BlockCopy] = []
        self._last = 0
        self._oldest = 1  # no copy before this one is pending

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, id: int) -> bool:
        return id in self._known

    def __iter__(self) -> Iterator[BlockCopy]:
        return iter([copy for copy, _ in self._known.values()])

    def is_clear(self) -> bool:
        """Whether nothing is known of any copy or block: so it is once all copies are reported."""
        return not (self._known or self._outbox or self._readers or self._spoiled or self.on_hbm or self.on_dram)

    @property
    def oldest(self) -> int:
        """Id of the oldest; when there is none, the id that the next one will have."""
        while self._oldest <= self._last and self._oldest not in self._known:
            self._oldest += 1
        return self._oldest

    def plan(self, out: bool, hbm: int, dram: int, owner: TierNode | TierTable) -> int:
        """Plan one, after those pending on its two blocks. Returns its id."""
        self._last = id = self._last + 1
        first, second = self.on_hbm.get(hbm, 0), self.on_dram.get(dram, 0)
        if not first and not second:
            copy = BlockCopy(id, out, hbm, dram)
        elif not first or not second or first == second:
            copy = BlockCopy(id, out, hbm, dram, (first or second,))
        else:
            copy = BlockCopy(id, out, hbm, dram, (first, second) if first < second else (second, first))
        self.on_hbm[hbm] = self.on_dram[dram] = id
        self._known[id] = (copy, owner)
        self.num_out += out
        self._outbox.append(copy)
        return id

    def take(self) -> tuple[BlockCopy, ...]:
        """Those planned since the last call."""
        copies, self._outbox = tuple(self._outbox), []
        return copies

    def read_by(self, table: TierTable, id: int) -> None:
        """The table's work reads what this copy in brings: it waits for it, and is lost with it."""
        table.awaits.append(id)
        self._readers.setdefault(id, []).append(table)

    def over(self, id: int) -> tuple[BlockCopy, TierNode | TierTable, Sequence[TierTable], bool]:
        """Forget one that has been reported: the copy, its owner, who reads what it brought, and whether that is
        garbage although it was made."""
        copy, owner = self._known.pop(id)
        hbm, dram, spoiled = copy.hbm, copy.dram, False
        if self._spoiled:
            spoiled = id in self._spoiled
            self._spoiled.discard(id)
        self.num_out -= copy.out
        if self.on_hbm.get(hbm) == id:
            del self.on_hbm[hbm]
        if self.on_dram.get(dram) == id:
            del self.on_dram[dram]
        return copy, owner, self._readers.pop(id, ()) if self._readers else (), spoiled

    def spoil_after(self, failed: BlockCopy) -> None:
        """Pending copies of what a failed one should have written move garbage, whoever has the block by now. Failures
        are rare: O(pending)."""
        for id, (copy, _) in self._known.items():
            same = copy.dram == failed.dram if failed.out else copy.hbm == failed.hbm
            if id > failed.id and same:
                if copy.out == failed.out:
                    break  # it writes the block anew
                self._spoiled.add(id)
