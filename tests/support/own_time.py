"""Time as this process could use it. A machine that is busy, or takes the processor away, may let it stand still for a
second at any moment: where a test measures how long something takes, or lets time pass, that does not count."""

from __future__ import annotations

import threading
import time

SLICE_S = 0.005
AT_MOST_S = 0.025  # of one slice: what a busy machine adds to a short sleep; beyond it, the process stood still


def pass_time(seconds: float) -> None:
    """Let so much of this process's own time pass."""
    watch = time.monotonic
    left, before = seconds, watch()
    while left > 0:
        time.sleep(min(SLICE_S, left))
        now = watch()
        left -= min(now - before, AT_MOST_S)
        before = now


class OwnTime:
    """Seconds of this process's own time since the context was entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> OwnTime:
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._run, daemon=True)
        self._watch.start()
        return self

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(SLICE_S):
            now = time.monotonic()
            self.seconds += min(now - before, AT_MOST_S)
            before = now

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._watch.join()
