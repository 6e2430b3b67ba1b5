"""When all live sequences are looked at, and how much of a look each plan does; who began to wait meanwhile."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

from superinfer.runtime.scheduler.line import HEAD
from superinfer.runtime.scheduler.queue import Key, WaitingQueue
from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.slices import Slice, finish
from superinfer.runtime.scheduler.standing import Standing

TRIAGE_S = 0.05  # how old a triage may be: a few steps
LOOKED_AT = 2048  # live sequences; with more it may be older in proportion, so that looking takes no more of the time
# And so old, seconds, while all that may be kept are, they run, and since the last one nobody has come, been let in,
# ended or had to wait: what is left to find is who is late.
SETTLED_S = 0.2
PLAN_US = 240.0  # of a plan's time, microseconds: what decodes leave of it is for looking
PLAN_SHARE = 0.016  # of a step, if that is more: the step hides it, and a look over many long steps comes too late
DECODE_US = 0.3  # that a decode takes of it


class Looks:
    """The looks of a `Standing`, one after another.

    arrived: how many sequences came since the last look that is over began.
    joined: who began to wait since the last look began: the kept, by when their work must begin, then the others, by
    age; HEAD of them. seen: who had by then, but after the one before it began: until it is over.
    """

    def __init__(self, standing: Standing, residents: Residents) -> None:
        self._standing, self._residents = standing, residents
        self.arrived = 0
        self.joined, self.seen = WaitingQueue(), WaitingQueue()
        self._began = -math.inf  # when the last look did
        self._taken_in = 0  # of `arrived`
        self._slices: Generator[Slice, None, None] | None = None  # of a look under way
        self._next_us = 0.0  # about how long the next of them will take, microseconds

    @property
    def is_under_way(self) -> bool:
        """Whether a look has begun and is not over."""
        return self._slices is not None

    def look(self, block_s: float, now: float) -> None:
        """All of a new look; before it what is left of one under way. block_s: of the link, for a block."""
        self._finish()
        self._begin(block_s, now)
        self._finish()

    def look_on(self, num_live: int, block_s: float, now: float) -> None:
        """Begin a look if the last one may be old, of so many live sequences; do as much of the one under way as a plan
        has time for, and at least a slice: so no plan takes long, however many are live."""
        if self._slices is None:
            if now < self._began + self._may_be_old_s(num_live):
                return
            self._begin(block_s, now)
        assert self._slices is not None
        plan_us = max(PLAN_US, PLAN_SHARE * 1e6 * self._standing.step_s)
        room = max(self._next_us, plan_us - DECODE_US * len(self._residents))
        while self._next_us <= room:
            room -= self._next_us
            try:
                self._next_us = next(self._slices).us
            except StopIteration:
                self._end()
                return

    def join(self, sequence: Sequence, key: Key) -> None:
        """A sequence begins to wait, or does so in another order."""
        for queue in (self.joined, self.seen):
            if sequence in queue:
                queue.remove(sequence)
        self.joined.add(sequence, key)
        if len(self.joined) > HEAD:
            self.joined.drop_last()

    def have(self, sequence: Sequence) -> bool:
        """Whether it is in one of the two queues."""
        return sequence in self.joined or sequence in self.seen

    def entries(self) -> Iterator[list[tuple[Key, int, Sequence]]]:
        """Of each of the two that has any, those before the last look first: keys, ids and sequences, a copy."""
        return (queue.entries() for queue in (self.seen, self.joined) if len(queue))

    def _may_be_old_s(self, num_live: int) -> float:
        """How old the last triage may be by now, seconds. Until the next, who joins is looked at singly: not many."""
        if len(self.joined) == HEAD:
            return TRIAGE_S / 4
        age_s = TRIAGE_S * max(1.0, num_live / LOOKED_AT)
        if self.arrived:
            return age_s / 4
        return max(age_s, SETTLED_S) if self._standing.is_settled and not len(self.joined) else age_s

    def _begin(self, block_s: float, now: float) -> None:
        self._began, self._taken_in = now, self.arrived
        self.seen, self.joined = self.joined, WaitingQueue()
        self._slices = self._standing.look(self._residents, block_s, now)
        self._next_us = next(self._slices).us

    def _finish(self) -> None:
        """Do what is left of a look under way."""
        if self._slices is not None:
            finish(self._slices)
            self._end()

    def _end(self) -> None:
        self._slices, self.seen = None, WaitingQueue()
        self.arrived -= self._taken_in
