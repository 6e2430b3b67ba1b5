"""How a plan's copies become batches: in an order in which each comes after those it waits for. Pure Python and numpy.

The device has a stream for each direction. Batches of one direction run in order, copies of one batch in any order; a
batch may also wait for one of the other direction. So of two copies of a plan that must follow each other, the later
one goes into a later batch, and everything else is free to be grouped. Batches are short (`BATCH_BYTES`), for who
waits for a copy waits for its batch: a sequence moving into the room of one moving out follows it a batch behind.
Between two batches a stream rests for some 30 µs (95 % of the link with batches of 32 MiB, on an H200), so they grow
where no copy of the plan follows another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.copies import BlockCopy

# Half a millisecond of PCIe 5, against some 20 µs of the host's time for each batch. Where they
# grow, the second is already LONGEST times that.
BATCH_BYTES = 32 << 20
LONGEST = 8
MAX_BATCH = 512
# Below this, neighbours are joined: a copy engine spends about a microsecond on a copy however small.
COALESCE_BELOW = 1 << 20
_first = itemgetter(0)


class Batch:
    """Copies that are submitted together. Events are handles of the device.

    seq: grows by one with each batch of its direction. after: the batch of the other direction that it waits for, 0
    for none. job: what it was submitted with. plan: its number; fence: the event that all its batches come after.
    begin: 0 where it begins as the one before it on its stream ends. wait: an event to wait for, 0 for none. ids: of
    its copies. failed: ids of copies that could not be made; unordered: nothing marks its end, it counts as over once
    submitted.
    """

    __slots__ = (
        "after", "begin", "copies", "end", "failed", "fence", "ids", "job", "out", "plan", "seq", "unordered", "wait",
    )  # fmt: skip

    def __init__(self, out: bool, copies: list[BlockCopy], after: int) -> None:
        self.out = out
        self.copies = copies
        self.ids = [copy.id for copy in copies]
        self.after = after
        self.seq = self.job = self.plan = self.begin = self.end = self.fence = self.wait = 0
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
        """Batches of one plan's copies, numbered, in an order fit to be submitted. wanted: ids that go first.

        This is the scheduling thread's time: less than a microsecond a copy.
        """
        if not wanted:
            return self._in_rounds(copies)
        urgent = _with_those_before(copies, wanted)
        first = self._in_rounds([copy for copy in copies if copy.id in urgent])
        return first + self._in_rounds([copy for copy in copies if copy.id not in urgent])

    def _in_rounds(self, copies: Sequence[BlockCopy]) -> list[Batch]:
        """Batches of copies none of which must follow one that comes later; of both directions in turn, so that both
        streams soon have work."""
        chained = any([copy.after for copy in copies])
        batches: list[Batch] = []
        longest = self._most if chained else LONGEST * self._most
        for ins, outs in _rounds(copies) if chained else [_by_direction(copies)]:
            for pair in zip_longest(self._cut(True, outs, longest), self._cut(False, ins, longest)):
                batches += [batch for batch in pair if batch is not None]
        return batches

    def _cut(self, out: bool, copies: list[BlockCopy], longest: int) -> list[Batch]:
        """Those that follow nothing of the other direction first, then the others in the order of what they follow:
        the last batch of it, as their own direction's come before them anyway."""
        if not any([copy.after for copy in copies]):
            return [self._batch(out, part, 0) for part in _parts(copies, self._most, longest)]
        find, free, behind = self._batch_of.get, [], []
        for copy in copies:
            last = 0
            for id in copy.after:
                batch = find(id)
                if batch is not None and batch.out is not out and batch.seq > last:
                    last = batch.seq
            if last:
                behind.append((last, copy))
            else:
                free.append(copy)
        if not behind:
            return [self._batch(out, part, 0) for part in _parts(free, self._most, longest)]
        behind.sort(key=_first)
        batches = [self._batch(out, part, 0) for part in _parts(free, self._most, self._most)]
        for at in range(0, len(behind), self._most):
            part = behind[at : at + self._most]
            batches.append(self._batch(out, [copy for _, copy in part], part[-1][0]))
        return batches

    def _batch(self, out: bool, copies: list[BlockCopy], after: int) -> Batch:
        batch = Batch(out, copies, after)
        self._last[out] += 1
        batch.seq = self._last[out]
        self._batch_of.update(dict.fromkeys(batch.ids, batch))
        return batch


def _parts(copies: list[BlockCopy], first: int, longest: int) -> list[list[BlockCopy]]:
    """One of `first`, so that its stream has work, then of `longest`; the last may have up to `first` more,
    where `longest` is more than that."""
    if len(copies) <= first:
        return [copies] if copies else []
    parts, at, beyond = [copies[:first]], first, first if longest > first else 0
    while len(copies) - at > longest + beyond:
        parts.append(copies[at : at + longest])
        at += longest
    return [*parts, copies[at:]]


def _by_direction(copies: Sequence[BlockCopy]) -> tuple[list[BlockCopy], list[BlockCopy]]:
    """In, out."""
    return [copy for copy in copies if not copy.out], [copy for copy in copies if copy.out]


def _rounds(copies: Sequence[BlockCopy]) -> list[tuple[list[BlockCopy], list[BlockCopy]]]:
    """Each round's copies, in and out, follow none of their own round."""
    level: dict[int, int] = {}
    rounds: list[tuple[list[BlockCopy], list[BlockCopy]]] = [([], [])]
    for copy in copies:
        deepest = 0
        for id in copy.after:
            before = level.get(id)
            if before is not None and before >= deepest:
                deepest = before + 1
        level[copy.id] = deepest
        if deepest == len(rounds):
            rounds.append(([], []))
        rounds[deepest][copy.out].append(copy)
    return rounds


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
    bytes_, count = np.uint64(size), len(copies)
    hbm = np.array([copy.hbm for copy in copies], dtype=np.uint64)
    dram = np.array([copy.dram for copy in copies], dtype=np.uint64)
    if size < COALESCE_BELOW and count > 1:
        piece = dram // np.uint64(places.piece_blocks)
        joined = (np.diff(hbm) == 1) & (np.diff(dram) == 1) & (np.diff(piece) == 0)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))
        sizes = np.diff(starts, append=count).astype(np.uint64) * bytes_
        hbm, dram = hbm[starts], dram[starts]
    else:  # in place, with nothing made that is not needed: this is most of what a batch costs its thread
        starts, sizes = np.arange(count), np.empty(count, dtype=np.uint64)
        sizes.fill(size)
    hbm *= bytes_
    hbm += np.uint64(places.hbm)
    dram *= bytes_
    dram += np.uint64(places.dram)
    ends = (dram, hbm) if copies[0].out else (hbm, dram)
    return Moves(*ends, sizes, starts)
