"""How long answers will be, learnt from those that ended. Pure Python and NumPy; deterministic."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

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
        self._ends: np.ndarray | None = None  # the same as an array, once asked for

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
            self._ends = np.array(self._sorted, dtype=float)
        ends = self._ends
        begun = np.sort(live[live > 0.0])
        at_risk = np.arange(len(ends), 0, -1) + (len(begun) - np.searchsorted(begun, ends))
        share = np.cumprod(1.0 - 1.0 / at_risk)  # that goes on beyond each end
        tail = (ends.sum() + float(live.sum())) / len(ends)
        steps = np.diff(ends, append=ends[-1])
        ahead = (share * steps)[::-1].cumsum()[::-1] + share[-1] * tail  # token-shares beyond each end
        before = np.searchsorted(ends, produced, side="right")  # ends that are not beyond what has been produced
        first = np.append(ends, 0.0)[before] - produced  # to the next end; of those beyond all, not used
        reached = np.concatenate([[1.0], share])[before]
        beyond = first + np.append(ahead, 0.0)[before] / np.maximum(reached, 1e-9)
        return np.maximum(1.0, np.where(before == len(ends), tail, beyond))


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
