"""Calls of one program: they stand and fall together, and what follows them is asked for with them. NumPy; no torch.

A program is worth nothing before its last call has ended. So of its time beyond what its calls take, each call may use
its own part only; what is still to come counts as work; and when one call is let go, all are. docs/rotasched.md says
what callers tell (`Hints.rest_tokens`, `rest_s`, `spread_s`, `follows`, `may_go_on`).
"""

from __future__ import annotations

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.triage import Following

FIRST_ROWS = 256
# Times the mean deviation of what it takes, by which a call is to be ahead of its deadline: of deviations that are
# normal, one in twenty is larger.
SAFETY = 2.0


class Programs:
    """What callers said of calls that are part of a program; of the roster's rows.

    number: of its program, 0 for what is on its own. rest: tokens, the machine time of what follows. rest_s: how long
    that takes at least, s. spread_s: mean deviation of how long it and what follows take. is_part: 1 for a call whose
    deadline is not for it alone.
    """

    def __init__(self) -> None:
        self._table = np.zeros((5, FIRST_ROWS))
        self._name()
        self._live: dict[str, tuple[int, set[int]]] = {}  # by program: its number, ids of its calls
        self._count = 0
        self._told = 0  # live sequences of which anything was said

    def __bool__(self) -> bool:
        """Whether anything was said of any live sequence."""
        return self._told > 0

    def add(self, sequence: Sequence) -> None:
        """A sequence has its row."""
        row, hints = sequence.row, sequence.hints
        while row >= self._table.shape[1]:
            self._table = np.hstack([self._table, np.zeros_like(self._table)])
            self._name()
        self._table[:, row] = 0.0
        if hints is None:
            return
        self.rest[row], self.rest_s[row], self.spread_s[row] = hints.rest_tokens, hints.rest_s, hints.spread_s
        self.is_part[row] = _tells(sequence)
        self._told += _tells(sequence)
        if sequence.program and (hints.rest_tokens > 0.0 or hints.follows):
            self._count += 1
            number, calls = self._live.setdefault(sequence.program, (self._count, set()))
            calls.add(sequence.id)
            self.number[row] = number

    def remove(self, sequence: Sequence) -> None:
        """It ended; its row is still its own."""
        self._told -= _tells(sequence)
        if self.number[sequence.row]:
            calls = self._live[sequence.program][1]
            calls.discard(sequence.id)
            if not calls:
                del self._live[sequence.program]

    def wanted(self, rows: np.ndarray, last: np.ndarray, own: np.ndarray, now: float) -> np.ndarray:
        """When a call's next token had best be computed, s, if `last` is the last moment. own: seconds to its end."""
        rest_s, spread_s = self.rest_s[rows], self.spread_s[rows]
        slack = np.maximum(last - now - SAFETY * spread_s, 0.0)
        return np.where(rest_s + spread_s > 0.0, np.minimum(last, now + slack * own / (own + rest_s)), last)

    def wanted_of(self, row: int, last: float, own: float, now: float) -> float:
        """As `wanted`, of one row."""
        rest_s, spread_s = float(self.rest_s[row]), float(self.spread_s[row])
        if rest_s + spread_s == 0.0:
            return last
        return min(last, now + max(last - now - SAFETY * spread_s, 0.0) * own / (own + rest_s))

    def are_lost(self, rows: np.ndarray, late: np.ndarray) -> np.ndarray:
        """[rows] bool: whose program cannot be in time any more, for a call of it (rows `late`) is not."""
        numbers = self.number[late]
        return np.isin(self.number[rows], numbers[numbers > 0.0])

    def following(self, rows: np.ndarray, token_s: np.ndarray, begins: np.ndarray) -> Following:
        """What follows the calls in these rows. token_s: of a decode; begins: seconds until it does."""
        return Following(self.number[rows], self.rest[rows] * token_s, begins, self.rest_s[rows])

    def _name(self) -> None:
        self.number, self.rest, self.rest_s, self.spread_s, self.is_part = self._table


def _tells(sequence: Sequence) -> bool:
    hints = sequence.hints
    return hints is not None and (
        hints.rest_tokens > 0.0 or hints.rest_s > 0.0 or hints.spread_s > 0.0 or hints.follows or hints.may_go_on
    )
