"""Promises: what a program may take, and what of it is left to each call. Times in seconds, on one monotonic clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.runtime.slo import SLO

# Sent where nothing is left: an SLO holds no zero, and the call shall count as late.
SPENT_DEADLINE = 1e-6


def check_slo(slo: object, where: str = "slo") -> SLO | None:
    """`slo` if it is one, or None. Raises InvalidRequestError naming the value."""
    if slo is None or isinstance(slo, SLO):
        return slo
    raise InvalidRequestError(f"{where}={slo!r} is not an SLO; write {where}=SLO(deadline=...), seconds")


def check_deadline(deadline: object) -> float | None:
    """`deadline` in seconds, or None. Raises InvalidRequestError naming the value."""
    if deadline is None:
        return None
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
        raise InvalidRequestError(f"deadline={deadline!r} is not a number; give seconds, e.g. deadline=8.0")
    if not math.isfinite(deadline) or deadline <= 0:
        raise InvalidRequestError(f"deadline={deadline!r} must be a finite number of seconds greater than 0")
    return float(deadline)


def check_pause(name: str, seconds: object) -> float | None:
    """`seconds`, or None. Raises InvalidRequestError naming the value."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise InvalidRequestError(f"{name}={seconds!r} is not a number; give seconds, e.g. {name}=2.0")
    if not math.isfinite(seconds) or seconds < 0:
        raise InvalidRequestError(f"{name}={seconds!r} must be a finite number of seconds, at least 0")
    return float(seconds)


@dataclass(frozen=True)
class Promise:
    """What one call is sent. spent: the program's time was over before the call began. shared: its deadline is that of
    all calls together."""

    slo: SLO | None
    spent: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Promises:
    """What holds at one place of a program: SLO fields its calls inherit, and the moment by which all must be done."""

    slo: SLO | None = None
    due: float = math.inf

    def within(self, slo: SLO | None = None, deadline: float | None = None, *, now: float) -> Promises:
        """These, and inside them `slo` for each call and `deadline` from `now` on for all of them together."""
        due = self.due if deadline is None else min(self.due, now + deadline)
        return Promises(self.slo if slo is None else slo.within(self.slo), due)

    def for_call(self, slo: SLO | None, now: float) -> Promise:
        """The promise to a call with its own `slo` that starts `now`: its deadline is at most what is left."""
        merged = self.slo if slo is None else slo.within(self.slo)
        if self.due == math.inf:
            return Promise(merged)
        left = self.due - now
        merged = merged or SLO()
        own, left_of_all = merged.deadline or math.inf, max(left, SPENT_DEADLINE)
        slo = msgspec.structs.replace(merged, deadline=min(own, left_of_all))
        return Promise(slo, spent=left <= 0, shared=left_of_all <= own)
