"""How a plan's copies become batches: in an order in which each comes after those it waits for. Pure Python and numpy.

The device has a stream for each direction. Batches of one direction run in order, copies of one batch in any order; a
batch may also wait for one of the other direction. So of two copies of a plan that must follow each other, the later
one goes into a later batch, and everything else is free to be grouped. Batches are short (`BATCH_BYTES`), for who
waits for a copy waits for its batch: a sequence moving into the room of one moving out follows it a batch behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.copies import BlockCopy

# Half a millisecond of PCIe 5, against some 20 µs of the host's time for each batch.
BATCH_BYTES = 32 << 20
MAX_BATCH = 512
# Below this, neighbours are joined: a copy engine spends about a microsecond on a copy however small.
COALESCE_BELOW = 1 << 20


class Batch:
    """Copies that are submitted together. Events are handles of the device.

    seq: grows by one with each batch of its direction. after: the batch of the other direction that it waits for, 0
    for none. job: what it was submitted with. fence: an event to wait for first, 0 for none. ids: of its copies.
    failed: ids of copies that could not be made; unordered: nothing marks its end, it counts as over once submitted.
    """

    __slots__ = ("after", "begin", "copies", "end", "failed", "fence", "ids", "job", "out", "seq", "unordered", "wait")

    def __init__(self, out: bool, copies: list[BlockCopy], after: int) -> None:
        self.out = out
        self.copies = copies
        self.ids = [copy.id for copy in copies]
        self.after = after
        self.seq = self.job = self.begin = self.end = self.fence = self.wait = 0
        self.failed: list[int] = []
        self.unordered = False


class Places(NamedTuple):
    """Where blocks lie: addresses of the pools' first blocks, bytes of a block, DRAM blocks pinned together."""

    hbm: int
    dram: int
    block_bytes: int
    piece_blocks: int


class Arranger:
    """Remembers which batch each copy under way went into; numbers batches."""

    def __init__(self, block_bytes: int) -> None:
        self._most = max(1, min(MAX_BATCH, BATCH_BYTES // block_bytes))
        self._batch_of: dict[int, Batch] = {}
        self._last = [0, 0]

    def find(self, id: int) -> Batch | None:
        """The batch of a copy that is not over."""
        return self._batch_of.get(id)

    def forget(self, batch: Batch) -> None:
        """It is over and reported."""
        for id in batch.ids:
            del self._batch_of[id]

    def arrange(self, copies: Sequence[BlockCopy], wanted: Collection[int]) -> list[Batch]:
        """Batches of one plan's copies, numbered, in an order fit to be submitted. wanted: ids that go first."""
        if not any(copy.after for copy in copies):
            rounds: list[Sequence[BlockCopy]] = [copies]
        else:
            rounds = self._rounds(copies)
        urgent = _with_those_before(copies, wanted) if wanted else wanted
        batches: list[Batch] = []
        for members in rounds:
            for out in (True, False):
                mine = [copy for copy in members if copy.out == out]
                if mine:
                    batches += self._cut(out, mine, urgent)
        return batches

    def _rounds(self, copies: Sequence[BlockCopy]) -> list[Sequence[BlockCopy]]:
        """Each round's copies follow none of their own round."""
        level = dict.fromkeys([copy.id for copy in copies], 0)
        rounds: list[list[BlockCopy]] = [[]]
        for copy in copies:
            if copy.after:
                deepest = max((level[id] + 1 for id in copy.after if id in level), default=0)
                level[copy.id] = deepest
                while len(rounds) <= deepest:
                    rounds.append([])
                rounds[deepest].append(copy)
            else:
                rounds[0].append(copy)
        return list(rounds)

    def _cut(self, out: bool, copies: list[BlockCopy], urgent: Collection[int]) -> list[Batch]:
        """Those that are urgent first, then those that wait for nothing, then the others in the order of what they
        wait for."""
        keyed: Iterable[tuple[tuple[bool, int], BlockCopy]]
        if urgent or any(copy.after for copy in copies):
            keyed = sorted(
                (((copy.id not in urgent, self._follows(copy)), copy) for copy in copies), key=lambda item: item[0]
            )
        else:
            keyed = [((False, 0), copy) for copy in copies]
        batches: list[Batch] = []
        group: tuple[bool, bool] | None = None
        for (late, follows), copy in keyed:
            if (late, follows > 0) != group or len(batches[-1].copies) == self._most:
                group = late, follows > 0
                batches.append(Batch(out, [], 0))
            batches[-1].copies.append(copy)
            batches[-1].after = follows
        for batch in batches:
            self._last[out] += 1
            batch.seq = self._last[out]
            batch.ids = [copy.id for copy in batch.copies]
            self._batch_of.update(dict.fromkeys(batch.ids, batch))
        return batches

    def _follows(self, copy: BlockCopy) -> int:
        """The last batch of the other direction that the copy must follow; its own direction's come before anyway."""
        batches = [self._batch_of[id] for id in copy.after if id in self._batch_of]
        return max((batch.seq for batch in batches if batch.out != copy.out), default=0)


def _with_those_before(copies: Sequence[BlockCopy], wanted: Collection[int]) -> set[int]:
    """`wanted`, and what of this plan they follow."""
    urgent = set(wanted)
    for copy in reversed(copies):
        if copy.after and copy.id in urgent:
            urgent.update(copy.after)
    return urgent


class Moves(NamedTuple):
    """One batch as the device takes it, [n] uint64 each; starts: [n], the first of the batch's copies in each move."""

    dsts: np.ndarray
    srcs: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray


def moves_of(copies: Sequence[BlockCopy], places: Places) -> Moves:
    """Addresses and sizes; neighbours in both pools are one move where blocks are small.

    Sorts `copies` in place where it joins neighbours, if they are a list.
    """
    size = places.block_bytes
    if size < COALESCE_BELOW and len(copies) > 1 and isinstance(copies, list):
        copies.sort(key=lambda copy: copy.hbm)
    hbm = np.array([copy.hbm for copy in copies], dtype=np.uint64)
    dram = np.array([copy.dram for copy in copies], dtype=np.uint64)
    starts, lengths = np.arange(len(copies)), np.ones(len(copies), dtype=np.uint64)
    if size < COALESCE_BELOW and len(copies) > 1:
        piece = dram // np.uint64(places.piece_blocks)
        joined = (np.diff(hbm) == 1) & (np.diff(dram) == 1) & (np.diff(piece) == 0)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))
        lengths = np.diff(starts, append=len(copies)).astype(np.uint64)
    bytes_ = np.uint64(size)
    in_hbm = hbm[starts] * bytes_ + np.uint64(places.hbm)
    in_dram = dram[starts] * bytes_ + np.uint64(places.dram)
    ends = (in_dram, in_hbm) if copies[0].out else (in_hbm, in_dram)
    return Moves(*ends, lengths * bytes_, starts)
