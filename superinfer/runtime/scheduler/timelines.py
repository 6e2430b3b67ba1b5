"""Many token timelines at once, as columns: what `TokenTimeline` keeps for one. NumPy; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from superinfer.runtime.slo import TokenTimeline

LAST, MAX_TBT, LAG, COUNT, ARRIVAL, START, TBT, DEADLINE = range(8)
ROUNDING_S = 1e-6  # so close to when it was due, whether a token was late is looked at
CHANGING = 4  # rows that tokens change; the others say what was promised


class Timelines:
    """Timelines by slot, of streams whose first token is known. Times are seconds on the engine's clock.

    Tokens are noted when they come and looked at when somebody asks: streams that get one in each of several steps are
    looked at together. What comes of it is what `TokenTimeline.tokens` would have made of them, to the last bit.
    """

    def __init__(self, num_slots: int) -> None:
        self._table = np.zeros((8, num_slots))
        self._came_late = np.zeros(num_slots, dtype=bool)  # before the slot was taken
        self._late: np.ndarray | None = None  # as `late` gives it, of what has been looked at
        self._noted: list[tuple[np.ndarray, float]] = []
        self._due = np.full(num_slots, math.inf)  # the first token that has not been looked at

    def take(self, slot: int, arrival: float, timeline: TokenTimeline) -> None:
        """From now on this slot is of `timeline`, which has a token. Look first at what came before: `settle`."""
        start, tbt, deadline = timeline.promised
        self._came_late[slot], self._late = timeline.is_late, None
        self._due[slot] = arrival + min(start + timeline.count * tbt, deadline)
        self._table[:, slot] = (
            timeline.last, timeline.max_tbt, timeline.lag, timeline.count, arrival, start, tbt, deadline,
        )  # fmt: skip

    def note(self, slots: np.ndarray, now: float) -> None:
        """A token came for each of these slots. An array that is the same as the last one is looked at with it."""
        self._noted.append((slots, now))

    def settle(self) -> None:
        """Look at what has been noted."""
        noted, self._noted = self._noted, []
        if not noted:
            return
        first, self._late = 0, None
        for at in range(1, len(noted) + 1):
            if at == len(noted) or noted[at][0] is not noted[first][0]:
                self._look(noted[first][0], np.array([now for _, now in noted[first:at]]))
                first = at

    def give(self, slot: int, timeline: TokenTimeline) -> None:
        """Bring `timeline`, whose slot this is, up to date."""
        self.settle()
        timeline.catch_up(*self._table[:CHANGING, slot].tolist())

    def give_all(self, slots: Sequence[int], timelines: Sequence[TokenTimeline]) -> None:
        """As `give`, of many."""
        self.settle()
        for timeline, state in zip(timelines, self._table[:CHANGING, slots].T.tolist(), strict=True):
            timeline.catch_up(*state)

    def late(self) -> np.ndarray:
        """[slots] bool: whether a token came late, as `TokenTimeline.is_late` says."""
        if not self._are_in_time():
            self.settle()
        if self._late is None:
            self._late = self._came_late | (self._table[LAG] > 0.0)
        return self._late

    def _are_in_time(self) -> bool:
        """Whether all that has been noted came before even the first of it was due."""
        noted, last = self._noted, len(self._noted) - 1
        for at, (slots, now) in enumerate(noted):
            if at < last and noted[at + 1][0] is slots:
                continue
            if float(self._due[slots].min(initial=math.inf)) - now < ROUNDING_S:
                return False
        return True

    def _look(self, slots: np.ndarray, times: np.ndarray) -> None:
        """One token for each slot at each of `times`."""
        table = self._table[:, slots]
        since = times[:, None] - table[ARRIVAL]
        gaps = since.copy()
        gaps[1:] -= since[:-1]
        gaps[0] -= table[LAST]
        counts = np.arange(len(times))[:, None] + table[COUNT]
        lags = since - np.minimum(table[START] + counts * table[TBT], table[DEADLINE])
        table[MAX_TBT] = np.maximum(table[MAX_TBT], gaps.max(axis=0))
        table[LAG] = np.maximum(table[LAG], lags.max(axis=0))
        table[LAST] = since[-1]
        table[COUNT] += len(times)
        self._table[:CHANGING, slots] = table[:CHANGING]
        self._due[slots] = table[ARRIVAL] + np.minimum(table[START] + table[COUNT] * table[TBT], table[DEADLINE])
