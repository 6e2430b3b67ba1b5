"""Who runs, all at once: what of it cohorts have as arrays already, and the others one by one. NumPy; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np

from superinfer.runtime.scheduler.cohort import Cohort
from superinfer.runtime.scheduler.sequence import Sequence


class Residents:
    """Those that run, by the time of each question. Arrays have who is in no cohort first, then each cohort's members.

    sequences: a list that somebody else keeps up to date. cohorts: all that they may be in. Members of one are all
    kept, or none is.
    """

    def __init__(self, sequences: list[Sequence], cohorts: Seq[Cohort] = ()) -> None:
        self._sequences, self._cohorts = sequences, cohorts

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def loose(self) -> list[Sequence]:
        """Those in no cohort, in the order in which they run."""
        if len(self._sequences) == sum(map(len, self._cohorts)):
            return []
        return [s for s in self._sequences if s.cohort is None]

    def rows(self, loose: list[Sequence] | None = None) -> np.ndarray:
        """The row of each. loose: as just asked for."""
        loose = self.loose() if loose is None else loose
        rows = [cohort.rows() for cohort in self._cohorts if len(cohort)]
        if loose or not rows:
            rows.insert(0, np.array([s.row for s in loose], dtype=np.intp))
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def lengths(self, loose: list[Sequence] | None = None) -> np.ndarray:
        """`Sequence.length` of each."""
        loose = self.loose() if loose is None else loose
        lengths = [cohort.lengths() for cohort in self._cohorts if len(cohort)]
        if loose or not lengths:
            lengths.insert(0, np.array([s.length for s in loose], dtype=np.int64))
        return np.concatenate(lengths) if len(lengths) > 1 else lengths[0]

    def late(self, loose: list[Sequence]) -> list[Sequence]:
        """Whose `is_late` is true."""
        return [s for s in loose if s.is_late] + [s for cohort in self._cohorts if len(cohort) for s in cohort.late()]

    def tell(self, is_kept: np.ndarray) -> None:
        """Each hears whether it is kept, by row; who hears otherwise than before leaves its cohort."""
        for sequence in self.loose():
            sequence.kept = bool(is_kept[sequence.row])
        for cohort in self._cohorts:
            if not len(cohort):
                continue
            before = next(iter(cohort.members.values())).kept
            for sequence in cohort.at((is_kept[cohort.rows()] != before).nonzero()[0]):
                cohort.leave(sequence)
                sequence.kept = not before
