"""How long a link was busy each way, and both ways at once, from the spans of its copies. Pure Python; no torch."""

from __future__ import annotations

from collections import deque


class BusySpans:
    """Spans of each direction come in their order; those of one direction do not overlap. Seconds, any origin."""

    def __init__(self) -> None:
        self._busy_s = [0.0, 0.0]  # in, out
        self._both_s = 0.0
        self._spans: tuple[deque[tuple[float, float]], ...] = (deque(), deque())

    def __len__(self) -> int:
        """Spans that one still to come may overlap."""
        return sum(map(len, self._spans))

    def add(self, out: bool, begin: float, end: float) -> None:
        """A busy span, joined to the one before where they touch; counts its overlap with the other direction's."""
        self._busy_s[out] += end - begin
        mine, others = self._spans[out], self._spans[not out]
        for other_begin, other_end in others:
            both = (end if end < other_end else other_end) - (begin if begin > other_begin else other_begin)
            if both > 0.0:
                self._both_s += both
        if mine and mine[-1][1] == begin:
            begin = mine.pop()[0]
        mine.append((begin, end))

    def forget(self, out: bool, before: float) -> None:
        """No span of the other direction still to come begins earlier than `before`."""
        spans = self._spans[out]
        while spans and spans[0][1] <= before:
            spans.popleft()

    def take(self) -> tuple[float, float, float]:
        """Seconds busy in, out and both, of the spans added since the last call."""
        taken = self._busy_s[0], self._busy_s[1], self._both_s
        self._busy_s, self._both_s = [0.0, 0.0], 0.0
        return taken
