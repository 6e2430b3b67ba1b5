"""What a copy between the tiers is, and what is told of it. Pure Python; no torch. See docs/duplexkv.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple


class BlockCopy(NamedTuple):
    """One whole block moves: HBM to DRAM when `out`, else DRAM to HBM.

    id: from 1 on, grows with every copy planned. hbm, dram: block ids of the two pools.
    after: ids of earlier copies, ascending, that must be over, done or failed, before this one touches its blocks.
    """

    id: int
    out: bool
    hbm: int
    dram: int
    after: tuple[int, ...] = ()


class OneWay(NamedTuple):
    """Copies of one direction as columns of equal length, in the order of their ids: an object for each would cost more
    than all that is decided about it.

    ids, hbm, dram: see BlockCopy. after: the last of those that it must come after, 0 where there is none.
    also: by id, the others, of the few that must come after several.
    """

    ids: list[int]
    hbm: list[int]
    dram: list[int]
    after: list[int]
    also: dict[int, tuple[int, ...]]

    def pick(self, rows: Sequence[int]) -> OneWay:
        """The copies of these rows, in that order."""
        ids, hbm, dram, after = [[column[row] for row in rows] for column in self[:4]]
        return OneWay(ids, hbm, dram, after, self.also)

    def backwards(self) -> OneWay:
        """The copies in the opposite order."""
        return OneWay(self.ids[::-1], self.hbm[::-1], self.dram[::-1], self.after[::-1], self.also)

    def without(self, rows: Sequence[int]) -> OneWay:
        """The copies of all rows but these few, which are in their order."""
        ids, hbm, dram, after = columns = [column[:] for column in self[:4]]
        for column in columns:
            for row in reversed(rows):
                del column[row]
        return OneWay(ids, hbm, dram, after, self.also)

    def split(self, chosen: Sequence[bool]) -> tuple[OneWay, OneWay]:
        """The chosen rows, and the others. chosen: of each row."""
        if not any(chosen):
            return no_copies(), self
        if all(chosen):
            return self, no_copies()
        return self._where(chosen), self._where([not each for each in chosen])

    def _where(self, chosen: Sequence[bool]) -> OneWay:
        ids, hbm, dram, after = [[*compress(column, chosen)] for column in self[:4]]
        return OneWay(ids, hbm, dram, after, self.also)

    def rows(self, out: bool) -> Iterator[BlockCopy]:
        """One by one."""
        for id, hbm, dram, after in zip(self.ids, self.hbm, self.dram, self.after, strict=True):
            yield BlockCopy(id, out, hbm, dram, (*self.also.get(id, ()), after) if after else ())


def no_copies() -> OneWay:
    """Of either direction; to be added to."""
    return OneWay([], [], [], [], {})


class Copies:
    """Copies of a plan. Not to be changed.

    ways: those in, and those out. One by one, in the order of their ids, for who does not care for columns.
    """

    __slots__ = ("ways",)

    def __init__(self, ins: OneWay, outs: OneWay) -> None:
        self.ways = (ins, outs)

    @classmethod
    def of(cls, copies: Iterable[BlockCopy]) -> Copies:
        """Those. ValueError where their ids do not grow, or one comes after what has no id of a copy."""
        ways, last = (no_copies(), no_copies()), -1
        for id, out, hbm, dram, after in copies:
            if id <= last:
                raise ValueError(f"the copy with id {id} comes behind that with id {last}: ids grow")
            if after and after[0] < 1:
                raise ValueError(f"the copy with id {id} is to follow one with id {after[0]}: ids begin at 1")
            way, last = ways[out], id
            way.ids.append(id)
            way.hbm.append(hbm)
            way.dram.append(dram)
            way.after.append(after[-1] if after else 0)
            if len(after) > 1:
                way.also[id] = after[:-1]
        return cls(*ways)

    def __len__(self) -> int:
        return len(self.ways[0].ids) + len(self.ways[1].ids)

    def __iter__(self) -> Iterator[BlockCopy]:
        return iter(sorted([*self.ways[0].rows(False), *self.ways[1].rows(True)]))


NO_COPIES = Copies(no_copies(), no_copies())


class LinkUse(NamedTuple):
    """Seconds the link was busy: in (DRAM to HBM), out, both at once; and seconds that work waited for copies."""

    in_s: float = 0.0
    out_s: float = 0.0
    both_s: float = 0.0
    stall_s: float = 0.0


@dataclass(slots=True)
class TierCounts:
    """Counters since the start, in blocks where nothing else is said.

    blocks_in, blocks_out: copies done. mirrored: copies out planned in the background. failed: copies that failed.
    left_clean: blocks that left HBM without a copy of their own. forgotten: dirty ones that were dropped.
    rotations_out, rotations_in: sequences. rotated: their blocks; rotated_clean: of these, mirrored before.
    hits: blocks of matched prefixes that were loaded from DRAM. prefetched: blocks loaded before anyone asked.
    """

    blocks_in: int = 0
    blocks_out: int = 0
    mirrored: int = 0
    failed: int = 0
    left_clean: int = 0
    forgotten: int = 0
    rotations_out: int = 0
    rotations_in: int = 0
    rotated: int = 0
    rotated_clean: int = 0
    hits: int = 0
    prefetched: int = 0
