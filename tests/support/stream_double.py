"""A device that is not there: streams and events as CUDA has them, carried out at whatever legal time a seed picks.

Copies read their source when they land, and their destination is garbage from when they begin until then. A copy of a
batch lands before or after any other of it. Deadlocks raise.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

COMPUTE = 1
GARBAGE = 0xFE  # -16843010 and the like: no token, and a NaN-like mess as floats


class Event:
    def __init__(self) -> None:
        self.recorded = self.reached = 0
        self.time = 0.0


class StreamDouble:
    """Implements `CopyDevice` on host memory.

    lazy: chance that a chance to do something is passed over, 0..1. fails: chance that a copy cannot be made.
    eager_compute: what the compute stream is given is done at once, with all it waits for (for executors that really
    compute when they submit). Faults, to be planted: skip_waits(stream) -> bool; ignore_events_not_yet_reached.
    """

    def __init__(self, seed: int = 0, *, lazy: float = 0.3, eager_compute: bool = False) -> None:
        self.random = random.Random(seed)
        self.lazy = lazy
        self.fails = 0.0
        self.eager_compute = eager_compute
        self.skip_waits: Callable[[int], bool] = lambda stream: False
        self.refuses: Callable[[str], bool] = lambda call: False
        self.now = 0.0
        self.streams: dict[int, deque[list]] = {COMPUTE: deque()}
        self.events: dict[int, Event] = {}
        self.copied = [0, 0]
        self.both_at_once = 0
        self.lock = threading.RLock()

    # ------------------------------------------------------------------ CopyDevice

    def use(self) -> None:
        pass

    def compute_stream(self) -> int:
        return COMPUTE

    def new_stream(self) -> int:
        with self.lock:
            self.streams[max(self.streams) + 1] = deque()
            return max(self.streams)

    def new_event(self) -> int:
        with self.lock:
            self.events[len(self.events) + 1000] = Event()
            return len(self.events) + 999

    def free(self, streams: list[int], events: list[int]) -> None:
        with self.lock:
            for stream in streams:
                assert not self.streams.pop(stream), "freed with work in it"

    def record(self, event: int, stream: int) -> None:
        self._refuse("record")
        with self.lock:
            self.events[event].recorded += 1
            self._give(stream, ["record", self.events[event], self.events[event].recorded])

    def wait(self, stream: int, event: int) -> None:
        self._refuse("wait")
        with self.lock:
            if not self.skip_waits(stream):
                self._give(stream, ["wait", self.events[event], self.events[event].recorded])

    def reached(self, event: int) -> bool:
        with self.lock:
            self.pass_time()
            return self.events[event].reached == self.events[event].recorded

    def seconds(self, earlier: int, later: int) -> float:
        with self.lock:
            for event in (self.events[earlier], self.events[later]):
                assert event.recorded and event.reached == event.recorded, "asked for the time of what is not over"
            return self.events[later].time - self.events[earlier].time

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        self._refuse("copy")
        with self.lock:
            items = list(zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True))
            failed = [at for at in range(len(items)) if self.random.random() < self.fails]
            self._give(stream, ["copy", [item for at, item in enumerate(items) if at not in failed], False])
            return failed

    def synchronize(self, stream: int) -> None:
        with self.lock:
            while self.streams[stream]:
                self.advance()

    # ------------------------------------------------------------------ the test's side

    def launch(self, work: Callable[[], None]) -> None:
        """Give work to the compute stream."""
        with self.lock:
            self._give(COMPUTE, ["call", work])

    def until(self, event: int) -> None:
        """The host waits for an event."""
        with self.lock:
            while self.events[event].reached < self.events[event].recorded:
                self.advance()

    def pass_time(self) -> None:
        """Whatever the device gets done between two calls of the host."""
        while self.random.random() > self.lazy and any(self._can_go(stream) for stream in self.streams):
            self.advance()

    def advance(self) -> None:
        """One thing that can be done, is."""
        ready = [stream for stream in self.streams if self._can_go(stream)]
        assert ready, "deadlock: every stream waits for another"
        self.now += 1e-4
        stream = self.random.choice(ready)
        operation = self.streams[stream][0]
        match operation:
            case ["record", event, version]:
                event.reached, event.time = version, self.now
            case ["call", work]:
                work()
            case ["copy", items, False]:
                for dst, _, size in items:
                    ctypes.memset(dst, GARBAGE, size)
                operation[2] = True
                others = [queue[0] for at, queue in self.streams.items() if at != stream and queue]
                self.both_at_once += any(other[0] == "copy" and other[2] for other in others)
                return
            case ["copy", items, True] if items:
                dst, src, size = items.pop(self.random.randrange(len(items)))
                ctypes.memmove(dst, src, size)
                if items:
                    return
        self.streams[stream].popleft()

    def _can_go(self, stream: int) -> bool:
        queue = self.streams[stream]
        return bool(queue) and not (queue[0][0] == "wait" and queue[0][1].reached < queue[0][2])

    def _give(self, stream: int, operation: list) -> None:
        self.streams[stream].append(operation)
        if self.eager_compute and stream == COMPUTE:
            self.synchronize(COMPUTE)
        else:
            self.pass_time()

    def _refuse(self, call: str) -> None:
        if self.refuses(call):
            raise RuntimeError(f"planted failure of {call}")


class LateSubmitter:
    """Implements `Submitter` without a thread: jobs run when they must have, or some time before."""

    def __init__(self, seed: int = 0, late: float = 0.5) -> None:
        self.jobs: deque[Callable[[], None]] = deque()
        self.random = random.Random(seed)
        self.late = late
        self._done = 0

    @property
    def done(self) -> int:
        """Time passes whenever somebody looks, unless it is never to (late=1)."""
        self._some_run()
        return self._done

    def put(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)
        self._some_run()

    def wake(self) -> None:
        self._some_run()

    def finish(self, count: int) -> None:
        while self._done < count:
            self.jobs.popleft()()
            self._done += 1

    def close(self) -> None:
        self.finish(self._done + len(self.jobs))

    def _some_run(self) -> None:
        while self.jobs and self.random.random() > self.late:
            self.finish(self._done + 1)
