"""How a plan's copies become batches: in an order in which each comes after those it waits for. Pure Python and numpy.

The device has a stream for each direction. Batches of one direction run in order, copies of one batch in any order; a
batch may also wait for one of the other direction. So of two copies of a plan that must follow each other, the later
one goes into a later batch, and everything else is free to be grouped. Batches are short (`BATCH_BYTES`), for who
waits for a copy waits for its batch: a sequence moving into the room of one moving out follows it a batch behind.
Between two batches a stream rests for some 30 µs (95 % of the link with batches of 32 MiB, on an H200), so they grow
where no copy of the plan follows another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.copies import BlockCopy, Copies, OneWay, no_copies

# Half a millisecond of PCIe 5, against some 20 µs of the host's time for each batch. From the second of a plan on they
# are LONGEST times that; where copies of the plan follow others, CHAINED times.
BATCH_BYTES = 32 << 20
LONGEST = 8
CHAINED = 2
MAX_BATCH = 512
MOST_NAMES = 1 << 14  # of copies that are over, kept until there are so many or nothing is under way
# Below this, neighbours are joined: a copy engine spends about a microsecond on a copy however small.
COALESCE_BELOW = 1 << 20

Ways = tuple[OneWay, OneWay]  # in, out


class Batch:
    """Copies that are submitted together. Events are handles of the device.

    seq: grows by one with each batch of its direction. after: the batch of the other direction that it waits for, 0
    for none. job: what it was submitted with. plan: its number; fence: the event that all its batches come after.
    begin: 0 where it begins as the one before it on its stream ends. wait: an event to wait for, 0 for none. ids, hbm,
    dram: of its copies. failed: ids of copies that could not be made; unordered: nothing marks its end, it counts as
    over once submitted.
    """

    __slots__ = (
        "after", "begin", "dram", "end", "failed", "fence", "hbm", "ids", "job", "out", "plan", "seq", "unordered",
        "wait",
    )  # fmt: skip

    def __init__(self, out: bool, ids: list[int], hbm: list[int], dram: list[int], after: int) -> None:
        self.out = out
        self.ids, self.hbm, self.dram = ids, hbm, dram
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
        # By direction (in, out) and copy, the seq of its batch. It may stay a while when the copy is over: who follows
        # such a copy finds its batch gone.
        self._seqs: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._most_seqs = [MOST_NAMES, MOST_NAMES]
        self._unnoted: tuple[list[Batch], list[Batch]] = ([], [])  # not in there until somebody asks for that direction
        self._under_way: tuple[dict[int, Batch], dict[int, Batch]] = ({}, {})  # by seq
        self._last = [0, 0]

    def find(self, id: int) -> Batch | None:
        """The batch of a copy that is not over."""
        ins, outs = self._noted(False), self._noted(True)
        return self._under_way[0].get(ins.get(id, 0)) or self._under_way[1].get(outs.get(id, 0))

    def forget(self, batches: Sequence[Batch]) -> None:
        """They are over and reported."""
        for batch in batches:
            del self._under_way[batch.out][batch.seq]
        for out, (seqs, unnoted, under_way) in enumerate(zip(self._seqs, self._unnoted, self._under_way, strict=True)):
            if len(unnoted) > 2 * len(under_way):
                unnoted[:] = [batch for batch in unnoted if batch.seq in under_way]
            if not under_way:
                seqs.clear()
            elif len(seqs) > self._most_seqs[out]:
                kept = {id: seq for seq, batch in under_way.items() for id in batch.ids}
                seqs.clear()
                seqs.update(kept)
                self._most_seqs[out] = max(MOST_NAMES, 2 * len(seqs))  # of many under way not with each report

    def arrange(self, copies: Copies, wanted: Collection[int]) -> list[Batch]:
        """Batches of one plan's copies, numbered, in an order fit to be submitted. wanted: ids that go first.

        This is the scheduling thread's time, so columns stay whole wherever they can.
        """
        if not wanted:
            return self._in_rounds(copies.ways)
        (ins, outs), (ins_first, outs_first) = copies.ways, _urgent_rows(copies.ways, wanted)
        first = self._in_rounds((ins.pick(ins_first), outs.pick(outs_first)))
        return first + self._in_rounds((ins.without(ins_first), outs.without(outs_first)))

    def _in_rounds(self, ways: Ways) -> list[Batch]:
        """Batches of copies none of which must follow one that comes later; of both directions in turn, so that both
        streams soon have work."""
        if not any([any(way.after) for way in ways]):
            longest = LONGEST * self._most
            return _in_turn(*[self._cut_free(out, ways[out], longest) for out in (False, True)])
        batches: list[Batch] = []
        for pair in _rounds(ways):
            batches += _in_turn(*[self._cut(out, pair[out]) for out in (False, True)])
        return batches

    def _cut_free(self, out: bool, way: OneWay, longest: int) -> list[Batch]:
        """Of copies that follow nothing of the other direction that is under way."""
        return [self._batch(out, way, begin, end, 0) for begin, end in _parts(len(way.ids), self._most, longest)]

    def _cut(self, out: bool, way: OneWay) -> list[Batch]:
        """Those that follow nothing of the other direction first, then the others in the order of what they follow:
        the last batch of it, as their own direction's come before them anyway."""
        longest = CHAINED * self._most
        lasts = self._followed(out, way) if any(way.after) else []
        if not any(lasts):
            return self._cut_free(out, way, longest)
        batches: list[Batch] = []
        if 0 in lasts:
            followers, free = way.split([last > 0 for last in lasts])
            batches = self._cut_free(out, free, longest)
            way, lasts = followers, [*filter(None, lasts)]
        in_order = sorted(lasts)
        if lasts != in_order and lasts == in_order[::-1]:
            way, lasts = way.backwards(), in_order
        elif lasts != in_order:
            order = sorted(range(len(lasts)), key=lasts.__getitem__)
            way, lasts = way.pick(order), [lasts[at] for at in order]
        for begin, end in _parts(len(way.ids), self._most, longest):  # cut as what they follow was
            batches.append(self._batch(out, way, begin, end, lasts[end - 1]))
        return batches

    def _followed(self, out: bool, way: OneWay) -> list[int]:
        """For each copy the last batch of the other direction that it must come after, 0 for none."""
        seq_of = self._noted(not out).get
        lasts = [seq_of(id, 0) for id in way.after]
        if way.also:  # of few plans: with a block that moved before, at a place that did too
            for at, id in enumerate(way.ids):
                lasts[at] = max([lasts[at], *(seq_of(other, 0) for other in way.also.get(id, ()))])
        return lasts

    def _batch(self, out: bool, way: OneWay, begin: int, end: int, after: int) -> Batch:
        batch = Batch(out, way.ids[begin:end], way.hbm[begin:end], way.dram[begin:end], after)
        self._last[out] = batch.seq = seq = self._last[out] + 1
        self._under_way[out][seq] = batch
        self._unnoted[out].append(batch)
        return batch

    def _noted(self, out: bool) -> dict[int, int]:
        """By copy of one direction, the seq of its batch."""
        seqs = self._seqs[out]
        for batch in self._unnoted[out]:
            for id in batch.ids:
                seqs[id] = batch.seq
        self._unnoted[out].clear()
        return seqs


def _parts(count: int, first: int, longest: int) -> list[tuple[int, int]]:
    """Where each begins and ends: one of `first`, so that its stream has work, then of `longest`; the last may have up
    to `first` more, where `longest` is more than that."""
    if count <= first:
        return [(0, count)] if count else []
    parts, at, beyond = [(0, first)], first, first if longest > first else 0
    while count - at > longest + beyond:
        parts.append((at, at + longest))
        at += longest
    return [*parts, (at, count)]


def _in_turn(ins: list[Batch], outs: list[Batch]) -> list[Batch]:
    """One out, one in, and so on."""
    if not ins or not outs:
        return ins or outs
    return [batch for pair in zip_longest(outs, ins) for batch in pair if batch is not None]


def _rounds(ways: Ways) -> list[Ways]:
    """Each round's copies, in and out, follow none of their own round."""
    first = min([way.ids[0] for way in ways if way.ids])  # who follows no later id follows nothing of these
    (late_ins, ins), (late_outs, outs) = [_split_late(way, first) for way in ways]
    late = [way for way in (late_ins, late_outs) if way.ids]
    if not late:
        return [ways]
    # As the others of a copy's are before the last that it comes after, none of the late ones follows another.
    if max([max(way.after) for way in late]) < min([way.ids[0] for way in late]):
        return [(ins, outs), (late_ins, late_outs)]
    followed = {*late_ins.after, *late_outs.after}
    followed.update([other for way in late for others in way.also.values() for other in others])
    if followed.isdisjoint([*late_ins.ids, *late_outs.ids]):
        return [(ins, outs), (late_ins, late_outs)]
    return [(ins, outs), *_rounds_of_chains((late_ins, late_outs))]


def _split_late(way: OneWay, first: int) -> tuple[OneWay, OneWay]:
    """Those that come after one with an id of `first` or later, and the others."""
    if not way.ids or max(way.after) < first:
        return no_copies(), way
    if min(way.after) >= first:
        return way, no_copies()
    return way.split([id >= first for id in way.after])


def _rounds_of_chains(ways: Ways) -> list[Ways]:
    """Like `_rounds`, of copies that may follow each other more than once."""
    level: dict[int, int] = {}
    for copy in Copies(*ways):
        level[copy.id] = max([level[id] + 1 for id in copy.after if id in level], default=0)
    ins, outs = ways
    return [
        (ins.pick(_at_level(ins, level, deep)), outs.pick(_at_level(outs, level, deep)))
        for deep in range(max(level.values()) + 1)
    ]


def _at_level(way: OneWay, level: dict[int, int], deep: int) -> list[int]:
    return [at for at, id in enumerate(way.ids) if level[id] == deep]


def _urgent_rows(ways: Ways, wanted: Collection[int]) -> tuple[list[int], list[int]]:
    """Of each direction the rows of what is `wanted`, and of what those follow in this plan."""
    rows: tuple[set[int], set[int]] = (set(), set())
    left = [*wanted]
    while left:
        id = left.pop()
        for way, known in zip(ways, rows, strict=True):
            row = bisect_left(way.ids, id)
            if row < len(way.ids) and way.ids[row] == id and row not in known:
                known.add(row)
                left += (way.after[row], *way.also.get(id, ()))
    return sorted(rows[0]), sorted(rows[1])


class Moves(NamedTuple):
    """One batch as the device takes it, [n] uint64 each. order: the batch's copies, by their positions, in the order of
    the moves; starts: [n], where in `order` each move begins."""

    dsts: np.ndarray
    srcs: np.ndarray
    sizes: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def copies_of(self, move: int) -> list[int]:
        """Positions in the batch of the copies that are one move."""
        end = self.starts[move + 1] if move + 1 < len(self.starts) else len(self.order)
        return self.order[self.starts[move] : end].tolist()


def moves_of(out: bool, hbm: Sequence[int], dram: Sequence[int], places: Places) -> Moves:
    """Addresses and sizes; neighbours in both pools are one move where blocks are small."""
    size, count = places.block_bytes, len(hbm)
    bytes_, order = np.uint64(size), np.arange(count)
    hbm_at, dram_at = np.array(hbm, dtype=np.uint64), np.array(dram, dtype=np.uint64)
    if size < COALESCE_BELOW and count > 1 and places.piece_blocks > 1:
        order = np.argsort(hbm_at, kind="stable")
        hbm_at, dram_at = hbm_at[order], dram_at[order]
        piece = dram_at // np.uint64(places.piece_blocks)
        joined = (np.diff(hbm_at) == 1) & (np.diff(dram_at) == 1) & (np.diff(piece) == 0)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))
        sizes = np.diff(starts, append=count).astype(np.uint64) * bytes_
        hbm_at, dram_at = hbm_at[starts], dram_at[starts]
    else:  # in place, with nothing made that is not needed: this is most of what a batch costs its thread
        starts, sizes = order, np.empty(count, dtype=np.uint64)
        sizes.fill(size)
    hbm_at *= bytes_
    hbm_at += np.uint64(places.hbm)
    dram_at *= bytes_
    dram_at += np.uint64(places.dram)
    ends = (dram_at, hbm_at) if out else (hbm_at, dram_at)
    return Moves(*ends, sizes, order, starts)


def moves_of_copies(copies: Sequence[BlockCopy], places: Places) -> Moves:
    """The same of copies of one direction, at least one, for who measures rather than serves."""
    return moves_of(copies[0].out, [copy.hbm for copy in copies], [copy.dram for copy in copies], places)
