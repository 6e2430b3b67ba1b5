"""What the CUDA body asks of a device: streams, events, copies. Narrow, so that a test can stand in for the device."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class CopyDevice(Protocol):
    """Streams and events are handles of the device's own, whole numbers. Nothing here waits for the device.

    As on CUDA: what a stream is given it does in that order; `wait` makes a stream wait for the last `record` of the
    event that was *called* before it, and for nothing if there was none; an event may be recorded again.
    """

    def use(self) -> None:
        """Make the device the calling thread's own; to be called once by every thread."""

    def compute_stream(self) -> int:
        """The stream that the model's work is given to."""
        ...

    def new_stream(self) -> int: ...

    def new_event(self) -> int: ...

    def free(self, streams: list[int], events: list[int]) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None: ...

    def reached(self, event: int) -> bool:
        """Whether all before the event's last record is done."""
        ...

    def seconds(self, earlier: int, later: int) -> float:
        """Device time between two events that have both been reached. Precise to 1 µs within 16 s."""
        ...

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """Enqueue copies between addresses, [n] uint64 each, that may run in any order among themselves.

        Returns the positions of those that could not be made; the others are.
        """
        ...

    def synchronize(self, stream: int) -> None:
        """Until the stream has done all it was given. The only call that waits: for the end, and for measuring."""
