"""What will be asked for soon: as much, and of the same kind, as was of late. NumPy; deterministic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence

REMEMBERED = 512  # arrivals
RECENT_S = 5.0  # how often requests come is taken from the last seconds; what they are like, from all remembered
LEAST_S = 1.0  # seconds to have seen before anything is foreseen


class Foreseen(NamedTuple):
    """Requests to come. times: how many each entry stands for. at: seconds from now. prompt: tokens; most: max_tokens.

    ttft, pace, deadline: as promised, inf where nothing is. weight: of each.
    """

    times: float
    at: np.ndarray
    prompt: np.ndarray
    most: np.ndarray
    ttft: np.ndarray
    pace: np.ndarray
    deadline: np.ndarray
    weight: np.ndarray


class Forecast:
    """The last REMEMBERED requests that had a promise."""

    def __init__(self) -> None:
        self._seen = np.zeros((REMEMBERED, 7))  # arrival, prompt, most, ttft, pace, deadline, weight
        self._count = 0
        self._since = 0.0

    def saw(self, sequence: Sequence, prompt: int) -> None:
        """A request came. prompt: tokens to compute."""
        slo = sequence.slo
        assert slo is not None
        if self._count == 0:
            self._since = sequence.arrival
        promised = [np.inf if value is None else value for value in (slo.ttft, slo.tbt, slo.deadline)]
        self._seen[self._count % REMEMBERED] = (sequence.arrival, prompt, sequence.max_tokens, *promised, slo.weight)
        self._count += 1

    def ahead(self, now: float, seconds: float) -> Foreseen | None:
        """The requests of the next so many seconds: those of the last ones, once more. None while it is too early."""
        seen = self._seen[: min(self._count, REMEMBERED)]
        since = self._since if self._count <= REMEMBERED else float(seen[:, 0].min())
        window = min(now - since, seconds)
        if window < LEAST_S:
            return None
        mine = seen[seen[:, 0] > now - window]
        if not len(mine):
            return None
        stretch = seconds / window
        recent = min(window, RECENT_S)
        faster = float((mine[:, 0] > now - recent).sum()) / recent / (len(mine) / window)
        return Foreseen(stretch * faster, (mine[:, 0] - (now - window)) * stretch, *mine[:, 1:].T)
