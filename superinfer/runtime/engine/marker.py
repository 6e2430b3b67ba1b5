"""Points in a device's stream of work, to wait for and to measure between."""

from __future__ import annotations

import time

import torch


class Marker:
    """A point in a device's stream of work; on the CPU, where work is done when submitted, just a time."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = 0.0

    def record(self) -> None:
        """Mark now."""
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    @property
    def reached(self) -> bool:
        """Whether everything before the mark is done."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Until everything before the mark is done."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Marker) -> float:
        """Device time between two marks that both have been reached."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time
