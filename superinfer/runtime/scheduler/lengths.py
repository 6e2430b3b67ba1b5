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
        self._sorted: list[int] = []  # twice the length, and one more for an answer that was cut
        self._ends: _Ends | None = None  # the same as arrays, once asked for

    def __len__(self) -> int:
        return len(self._sorted)

    def learn(self, length: int, is_cut: bool = False) -> None:
        """An answer ended after this many tokens. is_cut: at its max_tokens: it might have gone on."""
        self._ends = None
        if len(self._in_order) == HISTORY:
            oldest = self._in_order.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._in_order.append(2 * length + is_cut)
        insort(self._sorted, self._in_order[-1])

    def median(self) -> float:
        """Of the lengths. Must not be empty."""
        half = len(self._sorted) // 2
        middle = self._sorted[half : half + 1] if len(self._sorted) % 2 else self._sorted[half - 1 : half + 1]
        return sum(code // 2 for code in middle) / len(middle)

    def curve(self, live: np.ndarray) -> Curve:
        """How many answers get how far. live: tokens produced by each that has not ended. Must not be empty.

        Answers that ended lately are the short ones of their time; the long ones are still under way. So those under
        way count, as longer than they are by now, and so do those that were cut at their max_tokens: the Kaplan-Meier
        estimate of how many reach each length. Beyond the longest answer seen, tokens come with the chance of an end
        that all of them had (an exponential tail).
        """
        if self._ends is None:
            self._ends = _Ends.of(self._sorted)
        known, begun = self._ends, np.sort(live[live > 0.0])
        count = len(known.lengths)
        reached = np.ones(count + 1)
        at_risk = known.at_least + (len(begun) - begun.searchsorted(known.lengths))
        np.cumprod(1.0 - known.is_end / at_risk, out=reached[1:])
        area = np.zeros(count + 1)
        np.cumsum(reached[:-1] * known.steps, out=area[1:])
        tail = (known.total + float(begun.sum())) / max(known.num_ends, 1e-9)
        return Curve(known.bounds, reached, area, tail)


class Curve(NamedTuple):
    """How far answers of a kind get. bounds: 0, then the lengths at which some ended, in order. reached: the share that
    gets beyond each. area: tokens that an answer has below each on average. tail: tokens to come beyond the last.
    """

    bounds: np.ndarray
    reached: np.ndarray
    area: np.ndarray
    tail: float

    def below(self, most: np.ndarray) -> np.ndarray:
        """Tokens expected of answers that have none yet and end at these max_tokens at the latest."""
        tokens: np.ndarray = np.interp(most, self.bounds, self.area)
        beyond = np.maximum(most - self.bounds[-1], 0.0)
        if self.reached[-1] > 0.0 and beyond.any():
            tokens -= (self.reached[-1] * self.tail) * np.expm1(beyond / -self.tail)
        return tokens

    def remaining(self, produced: np.ndarray, most: np.ndarray, below: np.ndarray | None = None) -> np.ndarray:
        """Expected tokens to come, at least 1, of answers that have so many and end at these max_tokens, or before.

        below: `below(most)`, where that is known.
        """
        before = self.bounds.searchsorted(produced, side="right") - 1
        below = self.below(most) if below is None else below
        ahead = (below - self.below(produced)) / np.maximum(self.reached[before], 1e-9)
        beyond = before == len(self.bounds) - 1  # longer than all that ended
        if beyond.any():
            ahead[beyond] = -self.tail * np.expm1((most[beyond] - produced[beyond]) / -self.tail)
        return np.maximum(1.0, ahead)


class Guess:
    """In place of a `Curve` while too little is known: as long as a paragraph, then as long again as they are."""

    def below(self, most: np.ndarray) -> np.ndarray:
        """See Curve.below."""
        return np.minimum(most, UNKNOWN)

    def remaining(self, produced: np.ndarray, most: np.ndarray, below: np.ndarray | None = None) -> np.ndarray:
        """See Curve.remaining."""
        return np.maximum(1.0, np.minimum(np.maximum(UNKNOWN - produced, produced), most - produced))


class _Ends(NamedTuple):
    """Lengths in order. is_end: 1 for an answer's own end, 0 where it was cut. at_least: how many are at least as long
    as each, itself and those after it. steps: from the one before. bounds: 0, then lengths. total: their sum.
    """

    lengths: np.ndarray
    is_end: np.ndarray
    at_least: np.ndarray
    steps: np.ndarray
    bounds: np.ndarray
    total: float
    num_ends: float

    @classmethod
    def of(cls, codes: list[int]) -> _Ends:
        coded = np.array(codes)
        ends, is_end = (coded // 2).astype(float), 1.0 - coded % 2
        bounds = np.append(0.0, ends)
        at_least = np.arange(len(ends), 0, -1)
        return cls(ends, is_end, at_least, np.diff(bounds), bounds, float(ends.sum()), float(is_end.sum()))


class LengthPredictor:
    """`Lengths` of each kind of request, the most special kind first that is known well.

    A kind is what its caller says is alike: the calls of a program, the requests of an SLO class. Ends that its caller
    made (cancelled, past its deadline) teach nothing.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Lengths] = {"": Lengths()}

    def learn(self, kinds: tuple[str, ...], length: int, is_cut: bool = False) -> None:
        """An answer of these kinds ended after so many tokens, by itself or, is_cut, at its max_tokens."""
        for kind in {"", *kinds}:
            known = self._kinds.pop(kind, None) or Lengths()
            known.learn(length, is_cut)
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

    def curve(self, kind: str | None, live: np.ndarray) -> Curve | Guess:
        """How far answers of a kind (as `kind` gave it) get. See `Lengths.curve`."""
        return Guess() if kind is None else self._kinds[kind].curve(live)
