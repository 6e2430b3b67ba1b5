"""When the next step is planned: as late as the device allows, so that whoever comes until then is in it.

Steps overlap: a step is planned while the one before it runs, so that the device never waits for the host. Planned as
soon as that one begins, the next step would be without all that come while it runs, and they would wait for it to end
as well. So the host sleeps until just before the device runs out of work. Just before is the time that planning and
submitting take, and what the cost model may be wrong by: the 98th percentiles of both over the last `WINDOW` steps, so
that where steps cannot be foreseen they are planned at once. Steps of a kind are those that are expected to take about
as long, within a factor of two: a model that is right about decodes may be wrong about long prompts. What that is worth
is in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW = 128  # steps of a kind that are remembered
LEAST = 32  # steps of a kind to have seen before planning behind one is put off
RARE = 64  # one step in so many may be wrong by more, or take the host longer, than what is allowed for
LOOK_EVERY = 8  # steps: sorting takes the host 10 us
SLACK_S = 3e-4  # for waking up, and for telling that a step has ended
LEAST_S = 1e-4  # that are worth waiting: waking up takes half of it


@dataclass(slots=True)
class _Kind:
    """Steps of one kind. errors: how much sooner than expected each ended, as a share of that; error: what they rarely
    exceed."""

    seen: int = 0
    error: float = 0.0
    errors: deque[float] = field(default_factory=lambda: deque([0.0], maxlen=WINDOW))

    def ended(self, error: float) -> None:
        self.errors.append(error)
        self.seen += 1
        if self.seen % LOOK_EVERY == 0:
            self.error = _rarely_above(self.errors)


class PlanTiming:
    """Follows the steps under way. All times are of one clock, seconds."""

    def __init__(self, *, late: bool = True) -> None:
        """late: False plans each step as soon as there is room for it."""
        self._late = late
        self._running: deque[float] = deque()  # expected durations of the steps given to the device, oldest first
        self._began = 0.0  # the oldest
        self._put_off_to: float | None = None
        self._kinds: dict[int, _Kind] = {}
        self._delays: deque[float] = deque(maxlen=WINDOW)
        self._delay = 0.0
        self._ended = 0

    def wait_s(self, now: float) -> float:
        """How long to put off planning the next step; 0.0 for not at all, else at least `LEAST_S`."""
        if not self._late or not self._running:
            return 0.0
        least = 0.0  # that the device has to do
        for expected in self._running:
            kind = self._kind(expected)
            if kind.seen < LEAST:
                return 0.0
            least += expected * (1.0 - kind.error)
        spare = self._began + least - self._delay - SLACK_S - now
        if spare < LEAST_S:
            return 0.0
        self._put_off_to = now + spare
        return spare

    def submitted(self, expected_s: float, planned_at: float, now: float, waited_s: float = 0.0) -> None:
        """The device has a step more, which was planned from `planned_at` on. expected_s: what it is to take. waited_s:
        how long submitting it has waited for the device."""
        due, self._put_off_to = self._put_off_to, None
        self._delays.append(now - waited_s - (planned_at if due is None else min(due, planned_at)))
        if not self._running:
            self._began = now
        self._running.append(expected_s)

    def ended(self, took_s: float | None, now: float) -> None:
        """The oldest step is over, and the next has begun. took_s: as the device has it; None: it failed."""
        expected = self._running.popleft()
        self._began, self._put_off_to = now, None
        if took_s is not None and expected > 0.0:
            self._kind(expected).ended(max(0.0, 1.0 - took_s / expected))
        self._ended += 1
        if self._ended % LOOK_EVERY == 0:
            self._delay = _rarely_above(self._delays)

    def _kind(self, expected_s: float) -> _Kind:
        return self._kinds.setdefault(math.frexp(expected_s)[1], _Kind())


def _rarely_above(seen: deque[float]) -> float:
    """What one in `RARE` exceeds."""
    return sorted(seen)[-1 - len(seen) // RARE]
