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
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.copies import BlockCopy

# Half a millisecond of PCIe 5, against some 20 µs of the host's time for each batch. From the second of a plan on they
# are LONGEST times that; where copies of the plan follow others, CHAINED times.
BATCH_BYTES = 32 << 20
LONGEST = 8
CHAINED = 2
MAX_BATCH = 512
MOST_NAMES = 1 << 14  # of copies that are over, kept until there are so many or nothing is under way
# Below this, neighbours are joined: a copy engine spends about a microsecond on a copy however small.
COALESCE_BELOW = 1 << 20


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
        # A batch's name is its seq, below 0 if it moves in. Names of copies that are over may stay a while: who follows
        # such a copy finds its batch gone.
        self._batch_of: dict[int, int] = {}  # by copy
        self._under_way: dict[int, Batch] = {}
        self._last = [0, 0]

    def find(self, id: int) -> Batch | None:
        """The batch of a copy that is not over."""
        return self._under_way.get(self._batch_of.get(id, 0))

    def forget(self, batches: Sequence[Batch]) -> None:
        """They are over and reported."""
        for batch in batches:
            del self._under_way[batch.seq if batch.out else -batch.seq]
        if not self._under_way:
            self._batch_of.clear()
        elif len(self._batch_of) > MOST_NAMES:
            self._batch_of = {id: name for name, batch in self._under_way.items() for id in batch.ids}

    def arrange(self, copies: Sequence[BlockCopy], wanted: Collection[int]) -> list[Batch]:
        """Batches of one plan's copies, numbered, in an order fit to be submitted. wanted: ids that go first.

        This is the scheduling thread's time: half a microsecond a copy, so few passes over them all, and those that
        are mostly comprehensions.
        """
        if not wanted:
            return self._in_rounds(copies)
        urgent = _with_those_before(copies, wanted)
        first = self._in_rounds([copy for copy in copies if copy.id in urgent])
        return first + self._in_rounds([copy for copy in copies if copy.id not in urgent])

    def _in_rounds(self, copies: Sequence[BlockCopy]) -> list[Batch]:
        """Batches of copies none of which must follow one that comes later; of both directions in turn, so that both
        streams soon have work."""
        if not any([copy.after for copy in copies]):
            longest = LONGEST * self._most
            return _in_turn(*[self._cut_free(out, _of(copies, out), longest) for out in (False, True)])
        batches: list[Batch] = []
        for pair in _rounds(copies):
            batches += _in_turn(*[self._cut(out, pair[out]) for out in (False, True)])
        return batches

    def _cut_free(self, out: bool, copies: list[BlockCopy], longest: int) -> list[Batch]:
        """Of copies that follow nothing of the other direction that is under way."""
        return [self._batch(out, part, 0) for part in _parts(copies, self._most, longest)]

    def _cut(self, out: bool, copies: list[BlockCopy]) -> list[Batch]:
        """Those that follow nothing of the other direction first, then the others in the order of what they follow:
        the last batch of it, as their own direction's come before them anyway."""
        longest, lasts = CHAINED * self._most, self._followed(out, copies)
        if not any(lasts):
            return self._cut_free(out, copies, longest)
        batches: list[Batch] = []
        if 0 in lasts:
            free = [copy for copy, last in zip(copies, lasts, strict=True) if not last]
            batches = self._cut_free(out, free, longest)
            copies, lasts = [copy for copy, last in zip(copies, lasts, strict=True) if last], [*filter(None, lasts)]
        if lasts != sorted(lasts):
            order = sorted(range(len(lasts)), key=lasts.__getitem__)
            copies, lasts = [copies[at] for at in order], [lasts[at] for at in order]
        end = 0
        for part in _parts(copies, self._most, longest):  # cut as what they follow was
            end += len(part)
            batches.append(self._batch(out, part, lasts[end - 1]))
        return batches

    def _followed(self, out: bool, copies: list[BlockCopy]) -> list[int]:
        """For each copy the last batch of the other direction that it must come after, 0 for none."""
        afters = [copy.after for copy in copies]
        if not any(afters):
            return [0] * len(copies)
        name_of, way = self._batch_of.get, -1 if out else 1
        names = [name_of(after[-1], 0) if after else 0 for after in afters]
        if max(map(len, afters)) == 1 and (max(names) <= 0 if out else min(names) >= 0):
            return [-name for name in names] if out else names
        # Few plans get here: with a block that moved before, at a place that did too.
        return [max([0, *(way * name_of(id, 0) for id in after)]) for after in afters]

    def _batch(self, out: bool, copies: list[BlockCopy], after: int) -> Batch:
        batch = Batch(out, copies, after)
        self._last[out] = batch.seq = seq = self._last[out] + 1
        name, known = seq if out else -seq, self._batch_of
        self._under_way[name] = batch
        for id in batch.ids:
            known[id] = name
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


def _of(copies: Sequence[BlockCopy], out: bool) -> list[BlockCopy]:
    """Those of one direction."""
    return [copy for copy in copies if copy.out] if out else [copy for copy in copies if not copy.out]


def _in_turn(ins: list[Batch], outs: list[Batch]) -> list[Batch]:
    """One out, one in, and so on."""
    if not ins or not outs:
        return ins or outs
    return [batch for pair in zip_longest(outs, ins) for batch in pair if batch is not None]


def _rounds(copies: Sequence[BlockCopy]) -> list[tuple[list[BlockCopy], list[BlockCopy]]]:
    """Each round's copies, in and out, follow none of their own round."""
    first = copies[0].id  # who follows no later id follows nothing of these
    ins: list[BlockCopy] = []
    outs: list[BlockCopy] = []
    late: list[BlockCopy] = []
    for copy in copies:
        if copy.after and copy.after[-1] >= first:
            late.append(copy)
        elif copy.out:
            outs.append(copy)
        else:
            ins.append(copy)
    if not late:
        return [(ins, outs)]
    if {copy.id for copy in late}.isdisjoint([id for copy in late for id in copy.after]):
        return [(ins, outs), (_of(late, False), _of(late, True))]
    return [(ins, outs), *_rounds_of_chains(late)]


def _rounds_of_chains(copies: Sequence[BlockCopy]) -> list[tuple[list[BlockCopy], list[BlockCopy]]]:
    """Like `_rounds`, of copies that may follow each other more than once."""
    level: dict[int, int] = {}
    rounds: list[tuple[list[BlockCopy], list[BlockCopy]]] = []
    for copy in copies:
        deepest = max([level[id] + 1 for id in copy.after if id in level], default=0)
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
