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
    """The last HISTORY output lengths of one kind of request, sorted, with what is left of those beyond each length."""

    def __init__(self) -> None:
        self._in_order: deque[int] = deque()
        self._sorted: list[int] = []
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._sorted)

    def learn(self, length: int) -> None:
        """An answer ended after this many tokens."""
        if len(self._in_order) == HISTORY:
            oldest = self._in_order.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._in_order.append(length)
        insort(self._sorted, length)
        self._table = None

    def median(self) -> float:
        """Of the lengths. Must not be empty."""
        half = len(self._sorted) // 2
        return float(self._sorted[half] if len(self._sorted) % 2 else sum(self._sorted[half - 1 : half + 1]) / 2)

    def remaining(self, produced: np.ndarray) -> np.ndarray:
        """Tokens to come, at least 1: the mean over the answers that were longer than `produced`, less that.

        Beyond the longest one seen, as many again as have been produced: nothing is known there but that it is long.
        """
        if self._table is None:
            lengths = np.array(self._sorted, dtype=float)
            counts = np.arange(len(lengths), 0, -1)
            self._table = lengths, np.append(lengths[::-1].cumsum()[::-1] / counts, np.nan)
        lengths, means = self._table
        beyond = means[np.searchsorted(lengths, produced, side="right")] - produced
        return np.maximum(1.0, np.where(np.isnan(beyond), produced, beyond))


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

    def remaining(self, kind: str | None, produced: np.ndarray) -> np.ndarray:
        """Tokens that requests of a kind (as `kind` gave it) have still to come, of how many they have produced."""
        known = self._kinds.get(kind) if kind is not None else None
        if known is None or len(known) < ENOUGH:
            known = self._kinds[""]
        if len(known) < ENOUGH:
            return np.maximum(UNKNOWN - produced, np.maximum(1.0, produced))
        return known.remaining(produced)
