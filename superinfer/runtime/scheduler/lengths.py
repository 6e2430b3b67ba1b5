"""How long answers will be, learnt from those that ended. Pure Python and NumPy; deterministic."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import NamedTuple

import numpy as np

HISTORY = 256  # finished outputs remembered of each kind
ENOUGH = 8  # of them, before they are believed
MAX_KINDS = 1024
UNKNOWN = 256.0  # tokens, while no answer at all has ended: a paragraph


class Lengths:
    """The last HISTORY output lengths of one kind of request."""

    def __init__(self) -> None:
        self._in_order: deque[int] = deque()
        self._sorted: list[int] = []
        self._ends: _Ends | None = None  # the same as arrays, once asked for

    def __len__(self) -> int:
        return len(self._sorted)

    def learn(self, length: int) -> None:
        """An answer ended after this many tokens."""
        self._ends = None
        if len(self._in_order) == HISTORY:
            oldest = self._in_order.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._in_order.append(length)
        insort(self._sorted, length)

    def median(self) -> float:
        """Of the lengths. Must not be empty."""
        half = len(self._sorted) // 2
        return float(self._sorted[half] if len(self._sorted) % 2 else sum(self._sorted[half - 1 : half + 1]) / 2)

    def remaining(self, produced: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Expected tokens to come, at least 1, of requests that have produced so many; `live`: of all not ended.

        Answers that ended lately are the short ones of their time; the long ones are still under way. So those under
        way count, as longer than they are by now: the Kaplan-Meier estimate of how many reach each length. Beyond the
        longest answer seen, tokens come with the chance of an end that all of them had (an exponential tail).
        """
        if self._ends is None:
            self._ends = _Ends.of(self._sorted)
        known, begun = self._ends, np.sort(live[live > 0.0])
        count = len(known.lengths)
        reached = np.empty(count + 1)  # share that gets beyond so many ends
        reached[0], share = 1.0, reached[1:]
        at_risk = known.at_least + (len(begun) - begun.searchsorted(known.lengths))
        np.cumprod(1.0 - 1.0 / at_risk, out=share)
        tail = (known.total + float(begun.sum())) / count
        ahead = np.zeros(count + 1)  # token-shares beyond each end
        ahead[:count] = (share * known.steps)[::-1].cumsum()[::-1] + share[-1] * tail
        before = known.lengths.searchsorted(produced, side="right")  # ends that are not beyond what has been produced
        first = known.bounds[before] - produced  # to the next end; of those beyond all, not used
        beyond = first + ahead[before] / np.maximum(reached, 1e-9)[before]
        return np.maximum(1.0, np.where(before == count, tail, beyond))


class _Ends(NamedTuple):
    """Lengths in order. at_least: how many are at least as long as each, itself and those after it. steps: from each to
    the next one. bounds: lengths, and 0 for what is beyond all. total: their sum."""

    lengths: np.ndarray
    at_least: np.ndarray
    steps: np.ndarray
    bounds: np.ndarray
    total: float

    @classmethod
    def of(cls, lengths: list[int]) -> _Ends:
        ends = np.array(lengths, dtype=float)
        return cls(
            ends, np.arange(len(ends), 0, -1), np.diff(ends, append=ends[-1]), np.append(ends, 0.0), float(ends.sum())
        )


class LengthPredictor:
    """`Lengths` of each kind of request, the most special kind first that is known well.

    A kind is what its caller says is alike: the calls of a program, the requests of an SLO class. Ends that were not
    the answer's own (cancelled, past its deadline) teach nothing.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Lengths] = {"": Lengths()}

    def learn(self, kinds: tuple[str, ...], length: int) -> None:
        """An answer of these kinds ended by itself after so many tokens."""
        for kind in {"", *kinds}:
            known = self._kinds.pop(kind, None) or Lengths()
            known.learn(length)
            self._kinds[kind] = known  # last in order: what has been silent longest is forgotten first
        while len(self._kinds) > MAX_KINDS:
            oldest = next(kind for kind in self._kinds if kind)
            del self._kinds[oldest]

    def kind(self, kinds: tuple[str, ...]) -> str | None:
        """The first of the kinds that is known well, "" for all requests together, None while too little is known."""
        for kind in (*kinds, ""):
            if len(self._kinds.get(kind, ())) >= ENOUGH:
                return kind
        return None

    def median(self, kinds: tuple[str, ...], max_tokens: int) -> float:
        """Output tokens expected of a request that has none yet, at most max_tokens; that, while nothing is known."""
        kind = self.kind(kinds)
        return float(max_tokens) if kind is None else min(self._kinds[kind].median(), float(max_tokens))

    def remaining(self, kind: str | None, produced: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Tokens to come of requests of a kind (as `kind` gave it). See `Lengths.remaining`."""
        if kind is None:
            return np.maximum(UNKNOWN - produced, np.maximum(1.0, produced))
        return self._kinds[kind].remaining(produced, live)
