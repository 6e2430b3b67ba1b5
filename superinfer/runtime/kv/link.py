"""A full-duplex link in virtual time: when each copy would be over. Pure Python; no torch, no clock of its own."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from superinfer.runtime.kv.copies import BlockCopy, LinkUse


class VirtualLink:
    """Copies of one direction go one after another, each at the full rate; the two directions do not share.

    bytes_per_s: each way; None: no time at all. latency_s: from a copy's last byte to when it counts as over.
    """

    def __init__(self, block_bytes: int, bytes_per_s: float | None = None, latency_s: float = 0.0) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s={bytes_per_s} must be above 0")
        if latency_s < 0:
            raise ValueError(f"latency_s={latency_s} must be at least 0")
        self._transfer_s = block_bytes / bytes_per_s if bytes_per_s else 0.0
        self._latency_s = latency_s
        self._free_at = [0.0, 0.0]  # in, out
        self._busy_s = [0.0, 0.0]
        self._both_s = 0.0
        self._spans: tuple[deque[tuple[float, float]], ...] = (deque(), deque())
        self._over: dict[int, float] = {}
        self._under_way: list[tuple[float, int, BlockCopy]] = []

    def start(self, copies: Iterable[BlockCopy], now: float) -> None:
        """Queue copies at time `now`, seconds."""
        for copy in copies:
            begin = max([now, self._free_at[copy.out], *(self._over.get(id, now) for id in copy.after)])
            end = begin + self._transfer_s
            self._free_at[copy.out] = end
            self._account(copy.out, begin, end, now)
            self._over[copy.id] = end + self._latency_s
            heapq.heappush(self._under_way, (end + self._latency_s, copy.id, copy))

    def over_at(self, ids: Iterable[int], now: float) -> float:
        """When all of `ids` are over, at least `now`; ids that `finished` has given count as over."""
        return max((self._over.get(id, now) for id in ids), default=now)

    def finished(self, now: float) -> list[BlockCopy]:
        """Copies that are over by `now` and were not given before, in the order in which they ended."""
        done = []
        while self._under_way and self._under_way[0][0] <= now:
            _, id, copy = heapq.heappop(self._under_way)
            del self._over[id]
            done.append(copy)
        return done

    @property
    def num_under_way(self) -> int:
        """Copies that `finished` has not given yet."""
        return len(self._under_way)

    def take_use(self) -> LinkUse:
        """Busy seconds of the copies started since the last call."""
        use = LinkUse(self._busy_s[0], self._busy_s[1], self._both_s)
        self._busy_s, self._both_s = [0.0, 0.0], 0.0
        return use

    def _account(self, out: bool, begin: float, end: float, now: float) -> None:
        """Add a busy span, joined to the one before where they touch, and its overlap with the other direction's."""
        self._busy_s[out] += end - begin
        mine, others = self._spans[out], self._spans[not out]
        self._both_s += sum(max(0.0, min(end, e) - max(begin, b)) for b, e in others)
        if mine and mine[-1][1] == begin:
            begin = mine.pop()[0]
        mine.append((begin, end))
        for spans in self._spans:
            while spans and spans[0][1] <= now:  # nothing to come can overlap it
                spans.popleft()
