"""Who of those that wait is next, as a look found it: put in order no further than somebody asks. NumPy; no torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from superinfer.runtime.scheduler.roster import Roster
from superinfer.runtime.scheduler.sequence import Sequence

HEAD = 256  # of those who wait, so many are next: more are not looked at before the next look
AT_ONCE = 16  # of them made into Python's numbers: most plans let in fewer


class Line:
    """The kept that wait, by when their work must begin; and the others, by age. HEAD of each, at most."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._kept = (np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0))  # start, id, row, last
        self._next_kept: list[tuple[float, float, int, float]] = []  # the first of them
        self._rest: np.ndarray | None = None  # rows, in no order
        self._next_rest: list[int] = []

    def put(self, kept: np.ndarray, ids: np.ndarray, start: np.ndarray, last: np.ndarray, rest: np.ndarray) -> None:
        """Note the rows of the kept that wait, and of all others. start, last: when the work of each of the kept must
        begin, as it is planned, and lest it is late."""
        if len(kept) > HEAD:
            first = np.argpartition(start, HEAD)[:HEAD]
            kept, ids, start, last = kept[first], ids[first], start[first], last[first]
        order = np.lexsort((ids, start))
        self._kept, self._next_kept = (start[order], ids[order], kept[order], last[order]), []
        self._rest = rest

    def kept(self, now: float) -> Iterator[tuple[float, float, Sequence]]:
        """Who of the kept is next and not too late: when its work must begin, its id, itself."""
        sequences, columns, known = self._roster.sequences, self._kept, self._next_kept
        for begin in range(0, len(columns[0]), AT_ONCE):
            if begin == len(known):
                known += zip(*(column[begin : begin + AT_ONCE].tolist() for column in columns), strict=True)
            for start, id, row, last in known[begin : begin + AT_ONCE]:
                if last >= now:
                    sequence = sequences[row]
                    if sequence is not None and sequence.id == id:
                        yield start, id, sequence

    def rest(self) -> Iterator[Sequence]:
        """Who of the others is next: the oldest."""
        if self._rest is not None:  # seldom asked for while memory is full: not a part of every look
            roster, rest, self._rest = self._roster, self._rest, None
            if len(rest) > HEAD:
                rest = rest[np.argpartition(roster.arrival[rest], HEAD)[:HEAD]]
            self._next_rest = rest[np.lexsort((roster.id[rest], roster.arrival[rest]))].tolist()
        sequences = self._roster.sequences
        for row in self._next_rest:
            sequence = sequences[row]
            if sequence is not None:
                yield sequence
