"""A full-duplex link in virtual time: when each copy would be over. Pure Python; no torch, no clock of its own."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable

from superinfer.runtime.kv.copies import BlockCopy, LinkUse


class VirtualLink:
    """Copies of one direction go one after another; both directions go at once.

    bytes_per_s: each way; None: no time at all. out_bytes_per_s: of copies out, where it differs.
    total_bytes_per_s: of both directions together, when both are busy (None: they do not share anything). Then each
        goes at its own rate times the same factor.
    latency_s: from a copy's last byte to when it counts as over.

    Time only goes forward: what one call was told has passed, has passed for the next.
    """

    def __init__(
        self,
        block_bytes: int,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        *,
        out_bytes_per_s: float | None = None,
        total_bytes_per_s: float | None = None,
    ) -> None:
        given = dict(bytes_per_s=bytes_per_s, out_bytes_per_s=out_bytes_per_s, total_bytes_per_s=total_bytes_per_s)
        for name, rate in given.items():
            if rate is not None and rate <= 0:
                raise ValueError(f"{name}={rate} must be above 0")
        if latency_s < 0:
            raise ValueError(f"latency_s={latency_s} must be at least 0")
        rate_in = bytes_per_s if bytes_per_s is not None else math.inf
        rate_out = out_bytes_per_s if out_bytes_per_s is not None else rate_in
        total = total_bytes_per_s if total_bytes_per_s is not None else math.inf
        self._block_s = (block_bytes / rate_in, block_bytes / rate_out)  # in, out, alone
        self._slower = max(1.0, (rate_in + rate_out) / total) if rate_in + rate_out < math.inf else 1.0
        self._latency_s = latency_s
        self._now = 0.0
        self._queues: tuple[deque[BlockCopy], deque[BlockCopy]] = (deque(), deque())
        self._left_s = [self._block_s[0], self._block_s[1]]  # of each queue's first copy, alone on the link
        self._queued: set[int] = set()
        self._over: dict[int, float] = {}  # copies sent and not given by `finished`: when each is over
        self._sent: list[tuple[float, int, BlockCopy]] = []
        self._busy_s = [0.0, 0.0]
        self._both_s = 0.0

    def start(self, copies: Iterable[BlockCopy], now: float) -> None:
        """Queue copies at time `now`, seconds."""
        self._pass_time(now)
        for copy in copies:
            self._queues[copy.out].append(copy)
            self._queued.add(copy.id)

    def over_at(self, ids: Iterable[int], now: float) -> float:
        """When all of `ids` are over, at least `now`; ids that `finished` has given count as over.

        The caller is to wait until then: copies started later do not slow these down.
        """
        wanted = list(ids)
        self._pass_time(now)
        while any(id in self._queued for id in wanted):
            self._next_event(math.inf)
        return max([now, *(self._over[id] for id in wanted if id in self._over)])

    def next_over_at(self, now: float) -> float:
        """When the next copy is over, at least `now`; `now` if none is under way. To be waited for, as `over_at`."""
        self._pass_time(now)
        while self._queued and not self._sent:
            self._next_event(math.inf)
        return max(now, self._sent[0][0]) if self._sent else now

    def finished(self, now: float) -> list[BlockCopy]:
        """Copies that are over by `now` and were not given before, in the order in which they ended."""
        self._pass_time(now)
        done = []
        while self._sent and self._sent[0][0] <= now:
            _, id, copy = heapq.heappop(self._sent)
            del self._over[id]
            done.append(copy)
        return done

    @property
    def num_under_way(self) -> int:
        """Copies that `finished` has not given yet."""
        return len(self._sent) + len(self._queued)

    def take_use(self) -> LinkUse:
        """Busy seconds since the last call, up to the latest time that any call was told."""
        use = LinkUse(self._busy_s[0], self._busy_s[1], self._both_s)
        self._busy_s, self._both_s = [0.0, 0.0], 0.0
        return use

    def _pass_time(self, until: float) -> None:
        while self._queued and self._now < until:
            self._next_event(until)
        while self._queued and not all(self._block_s):  # a direction without a rate of its own takes no time
            before = len(self._queued)
            self._next_event(self._now)
            if len(self._queued) == before:
                break
        self._now = max(self._now, until)

    def _next_event(self, until: float) -> None:
        """Let time pass to when the first copy ends or may begin, or to `until`."""
        begins = [self._begins(queue) for queue in self._queues]
        running = [begin <= self._now for begin in begins]
        slower = self._slower if all(running) else 1.0
        ends = [
            self._now + self._left_s[way] * slower if running[way] else begins[way]  # in seconds of the clock
            for way in (0, 1)
        ]
        at = min(until, *ends)
        passed = at - self._now
        for way in (0, 1):
            if running[way]:
                self._busy_s[way] += passed
                self._left_s[way] -= passed / slower
        if all(running):
            self._both_s += passed
        self._now = at
        for way in (0, 1):
            if running[way] and ends[way] <= at:
                self._send(way)

    def _begins(self, queue: deque[BlockCopy]) -> float:
        """When the first copy of a queue can begin, as far as is known by now."""
        if not queue:
            return math.inf
        after = queue[0].after
        if any(id in self._queued for id in after):
            return math.inf
        return max([0.0, *(self._over[id] for id in after if id in self._over)])

    def _send(self, way: int) -> None:
        copy = self._queues[way].popleft()
        self._queued.discard(copy.id)
        over = self._now + self._latency_s
        self._over[copy.id] = over
        heapq.heappush(self._sent, (over, copy.id, copy))
        self._left_s[way] = self._block_s[way]
