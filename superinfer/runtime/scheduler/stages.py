"""Where a sequence's time goes: in one stage at a time from arrival to end, so that the stages sum to it. No torch."""

from __future__ import annotations

from collections.abc import Callable

QUEUE, PREFILL, DECODE = "queue", "prefill", "decode"
ROTATED, COPY_WAIT, PREEMPTED = "rotated out", "copy wait", "preempted"


class StageClock:
    """One sequence's stages. Times are seconds on the engine's monotonic clock.

    stage: the one it is in. seconds: by stage, up to `since`. before: `seconds` up to the first token.
    watch: told of each stage as it ends, with its begin and end; and of "" once all is over.
    """

    __slots__ = ("_entered", "_working", "before", "seconds", "since", "stage", "watch")

    def __init__(self, arrival: float) -> None:
        self.stage = QUEUE
        self.since = self._entered = arrival
        self.seconds: dict[str, float] = {}
        self.before: dict[str, float] | None = None
        self.watch: Callable[[str, float, float], None] | None = None
        self._working = PREFILL

    def enter(self, stage: str, now: float) -> None:
        """From now on it is in `stage`."""
        if stage != self.stage:
            self._close(now)
            self._change(stage, now)

    def work(self, now: float) -> None:
        """From now on it computes, or could: prefill up to its first token, decode afterwards."""
        self.enter(self._working, now)

    def first_token(self, now: float) -> None:
        """Its first token is known. A sequence rotated out meanwhile stays so."""
        self._close(now)
        self.before = dict(self.seconds)
        self._working = DECODE
        if self.stage == PREFILL:
            self._change(DECODE, now)

    def stalled(self, seconds: float, now: float) -> None:
        """Of the time it computed, the last step waited `seconds` for copies."""
        if self.stage in (PREFILL, DECODE):
            self._close(now)
            moved = min(seconds, self.seconds[self.stage])
            self.seconds[self.stage] -= moved
            self.seconds[COPY_WAIT] = self.seconds.get(COPY_WAIT, 0.0) + moved

    def end(self, now: float) -> None:
        """It is over."""
        self._close(now)
        self._change(self.stage, now)
        if self.watch is not None:
            self.watch("", now, now)
            self.watch = None  # which may hold on to the sequence that has this

    def so_far(self, now: float) -> dict[str, float]:
        """Seconds by stage up to `now`, the stage it is in included."""
        return {**self.seconds, self.stage: self.seconds.get(self.stage, 0.0) + now - self.since}

    def _close(self, now: float) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.since
        self.since = now

    def _change(self, stage: str, now: float) -> None:
        if self.watch is not None:
            self.watch(self.stage, self._entered, now)
        self.stage, self._entered = stage, now
