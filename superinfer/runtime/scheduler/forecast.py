"""What will be asked for soon: as much, and of the same kind, as was of late. NumPy; deterministic."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from superinfer.runtime.scheduler.sequence import Sequence

REMEMBERED = 512  # arrivals
RECENT_S = 5.0  # from the last seconds is taken how often requests come, and what they are like: both may change
LIKE = 64  # but at least from so many: of fewer, as widely as they differ, the mean cost is known to an eighth only
LIKELY = 3.0  # with a rate above 3 / t, a silence of t happens once in 20 times: so they come less often by now
BOLDNESS = 4.0  # what has been seen for so long is taken to go on for so many times as long
LEAST_S = 1.0  # seconds to have seen before anything is foreseen
CHANCE = 3.0  # standard deviations: requests that do not change look as if they did once in 370 times


class Foreseen(NamedTuple):
    """Requests to come. times: how many each entry stands for. at: seconds from now. most: max_tokens.

    context: tokens of the prompt, all of which a decode reads; prompt: of these, to compute, as the others are cached;
    common: of these, in blocks that others hold as well.

    Entries are evenly spaced, in the order in which those came that they are like.

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

    def like(self, places: np.ndarray) -> Foreseen:
        """As many, at the same times, like those at these places."""
        return Foreseen(self.times, self.recent, self.at, *(of[places] for of in self[3:]))


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
        """The requests of the next so many seconds, or of fewer while little has been seen: like the last ones, and as
        often as they came. None while it is too early, and once they have stopped coming."""
        seen = self._seen[: min(self._count, REMEMBERED)]
        since = self._since if self._count <= REMEMBERED else float(seen[:, 0].min())
        window = min(now - since, seconds)
        if window < LEAST_S:
            return None
        mine = seen[seen[:, 0] > now - window]
        if not len(mine):
            return None
        recent = min(window, RECENT_S)
        count = int((mine[:, 0] > now - recent).sum())
        mine = mine[np.argsort(mine[:, 0], kind="stable")[-max(count, LIKE) :]]
        silence = now - float(mine[-1, 0])
        rate = min(count / recent, LIKELY / max(silence, 1e-9))
        ahead = min(seconds, BOLDNESS * window)
        at = (np.arange(len(mine)) + 0.5) * (ahead / len(mine))
        return Foreseen(rate * ahead / len(mine), count, at, *mine[:, 1:].T)


def changing(costs: np.ndarray) -> np.ndarray | None:
    """Where requests become dearer or cheaper: the places, in `costs`, of those that the next ones are like, in order.
    None where they do not, and the next ones are like all of them. costs: of the last requests, as they came.

    The next ones stand to all of these as the later half stands to the earlier half. Where it is dearer than chance
    would make it, with odds of so many to one, the next are each taken to be as dear as the dearest of so many; where
    it is cheaper, as cheap as the cheapest. So if each is dearer than any before it, nobody cheaper is foreseen.
    """
    count, half = len(costs), len(costs) // 2
    if not half:
        return None
    early, late = np.sort(costs[:half]), costs[-half:]
    dearer = float(np.searchsorted(early, late, "left").sum())  # pairs of which the later is
    cheaper = half**2 - float(np.searchsorted(early, late, "right").sum())
    if abs(dearer - cheaper) <= CHANCE * half * math.sqrt((2 * half + 1) / 3):  # the deviation of a sum of ranks
        return None
    share = (np.arange(count) + 0.5) / count
    rank = share ** (cheaper / dearer) if dearer > cheaper else 1.0 - (1.0 - share) ** (dearer / cheaper)
    order = np.argsort(costs, kind="stable")
    return np.sort(order[np.minimum((rank * count).astype(np.intp), count - 1)])
