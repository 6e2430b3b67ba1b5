"""What will be asked for soon: as much, and of the same kind, as was of late. NumPy; deterministic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence

REMEMBERED = 512  # arrivals
RECENT_S = 5.0  # how often requests come is taken from the last seconds; what they are like, from all remembered
LIKELY = 3.0  # with a rate above 3 / t, a silence of t happens once in 20 times: so they come less often by now
BOLDNESS = 4.0  # what has been seen for so long is taken to go on for so many times as long
LEAST_S = 1.0  # seconds to have seen before anything is foreseen


class Foreseen(NamedTuple):
    """Requests to come. times: how many each entry stands for. at: seconds from now. most: max_tokens.

    context: tokens of the prompt, all of which a decode reads; prompt: of these, to compute, as the others are cached;
    common: of these, in blocks that others hold as well.

    recent: how many came in the last seconds, from which `times` is taken.
    ttft, pace, deadline: as promised, inf where nothing is. weight: of each. rest, rest_s: as in `Hints`.
    """

    times: float
    recent: int
    at: np.ndarray
    context: np.ndarray
    prompt: np.ndarray
    common: np.ndarray
    most: np.ndarray
    ttft: np.ndarray
    pace: np.ndarray
    deadline: np.ndarray
    weight: np.ndarray
    rest: np.ndarray
    rest_s: np.ndarray


class Forecast:
    """The last REMEMBERED requests that had a promise."""

    def __init__(self) -> None:
        self._seen = np.zeros((REMEMBERED, 11))  # arrival, and what is Foreseen of it from `context` on
        self._count = 0
        self._since = 0.0

    def __len__(self) -> int:
        return min(self._count, REMEMBERED)

    def saw(self, sequence: Sequence, prompt: int, common: int = 0) -> None:
        """A request came that nothing before it announced. prompt: tokens to compute; common: of its prompt, those in
        blocks that others hold."""
        slo = sequence.slo
        assert slo is not None
        if self._count == 0:
            self._since = sequence.arrival
        promised = [np.inf if value is None else value for value in (slo.ttft, slo.tbt, slo.deadline)]
        hints = sequence.hints
        rest = (hints.rest_tokens, hints.rest_s) if hints is not None else (0.0, 0.0)
        lengths = (sequence.num_prompt, prompt, common, sequence.max_tokens)
        self._seen[self._count % REMEMBERED] = (sequence.arrival, *lengths, *promised, slo.weight, *rest)
        self._count += 1

    def ahead(self, now: float, seconds: float) -> Foreseen | None:
        """The requests of the next so many seconds, or for less while little has been seen: those of the last ones, as
        often as they came of late. None while it is too early, and once they have stopped coming."""
        seen = self._seen[: min(self._count, REMEMBERED)]
        since = self._since if self._count <= REMEMBERED else float(seen[:, 0].min())
        window = min(now - since, seconds)
        if window < LEAST_S:
            return None
        arrivals = seen[:, 0]
        is_mine = arrivals > now - window
        mine = seen[is_mine]
        if not len(mine):
            return None
        recent = min(window, RECENT_S)
        count = int((arrivals > now - recent).sum())
        rate = count / recent
        silence = now - float(mine[:, 0].max())
        rate = min(rate, LIKELY / max(silence, 1e-9))
        ahead = min(seconds, BOLDNESS * window)
        at = (mine[:, 0] - (now - window)) * (ahead / window)
        return Foreseen(rate * ahead / len(mine), count, at, *mine[:, 1:].T)
