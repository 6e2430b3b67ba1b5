"""What a request was promised, and the one function that says whether the promise was kept.

All times are seconds. An SLO holds durations only: it is stamped once, by the engine, when the request arrives, so no
clock has to agree with another. Token k (from 0) of a streamed request is due at `ttft + k * tbt` after arrival; the
last token is due at `deadline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

OnMiss = Literal["finish", "truncate", "raise"]


class SLO(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Service level objective of one call. Every field is optional; seconds.

    ttft: time to first token, from arrival.
    tbt: time between tokens; token k is due at `ttft + k * tbt` (without `ttft`: counted from the first token).
    deadline: time until the last token, from arrival.
    weight: relative worth of meeting this promise, > 0.
    on_miss: what happens once the deadline has passed: `finish` late, `truncate` (return what there is, with
        finish_reason "deadline"), or `raise` DeadlineMissedError.

    Raises ValueError (msgspec.ValidationError when decoded) for NaN, infinite, zero or negative values.
    """

    ttft: float | None = None
    tbt: float | None = None
    deadline: float | None = None
    weight: float = 1.0
    on_miss: OnMiss = "finish"

    def __post_init__(self) -> None:
        for name in ("ttft", "tbt", "deadline", "weight"):
            value = getattr(self, name)
            if value is None and name != "weight":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"SLO {name}={value!r} is not a number; give seconds as a float, e.g. {name}=0.5")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"SLO {name}={value!r} must be a finite number greater than 0")
        if self.on_miss not in ("finish", "truncate", "raise"):
            raise ValueError(f"SLO on_miss={self.on_miss!r} must be 'finish', 'truncate' or 'raise'")

    @classmethod
    def interactive(cls) -> SLO:
        """Streamed to a person: first token within 1 s, then 10 tokens a second."""
        return cls(ttft=1.0, tbt=0.1)

    @classmethod
    def batch(cls) -> SLO:
        """No promise: runs in what is left over."""
        return cls(weight=0.1)

    def within(self, outer: SLO | None) -> SLO:
        """This SLO inside `outer`: the nearest value wins field by field, deadlines take the minimum."""
        if outer is None:
            return self
        deadlines = [d for d in (self.deadline, outer.deadline) if d is not None]
        return SLO(
            ttft=self.ttft if self.ttft is not None else outer.ttft,
            tbt=self.tbt if self.tbt is not None else outer.tbt,
            deadline=min(deadlines) if deadlines else None,
            weight=self.weight if self.weight != 1.0 else outer.weight,
            on_miss=self.on_miss if self.on_miss != "finish" else outer.on_miss,
        )

    @property
    def promises_anything(self) -> bool:
        """False for an SLO without ttft, tbt and deadline: nothing to miss."""
        return self.ttft is not None or self.tbt is not None or self.deadline is not None


class Verdict(NamedTuple):
    """Whether a promise was kept. `lateness` is the worst lag behind the timeline in seconds (negative: slack)."""

    met: bool
    ttft_met: bool
    tbt_met: bool
    deadline_met: bool
    lateness: float


class TokenTimeline:
    """Watches one request's tokens against its SLO, in O(1) memory. Times are seconds since arrival.

    is_late: a token came after it was due: what was promised of the stream cannot be met any more.
    """

    __slots__ = (
        "_deadline",
        "_lag",
        "_start",
        "_tbt",
        "_ttft_lag",
        "count",
        "first",
        "is_late",
        "last",
        "max_tbt",
        "slo",
    )

    def __init__(self, slo: SLO | None) -> None:
        self.slo = slo
        self.first: float | None = None
        self.last = 0.0
        self.count = 0
        self.max_tbt = 0.0
        self.is_late = False
        self._lag = -math.inf
        self._ttft_lag = -math.inf
        # Of a stream, as plain numbers: `tokens` runs for every token of every request.
        self._tbt = slo.tbt if slo is not None else None
        self._start = slo.ttft if slo is not None and slo.ttft is not None else math.inf
        self._deadline = slo.deadline if slo is not None and slo.deadline is not None else math.inf

    def due(self, k: int) -> float:
        """When token `k` (from 0) is due, seconds after arrival; infinity where nothing is promised."""
        slo = self.slo
        if slo is None:
            return math.inf
        stream = math.inf
        if slo.tbt is not None:
            start = slo.ttft if slo.ttft is not None else self.first
            stream = math.inf if start is None else start + k * slo.tbt
        elif slo.ttft is not None and k == 0:
            stream = slo.ttft
        return min(stream, slo.deadline) if slo.deadline is not None else stream

    def tokens(self, n: int, now: float) -> None:
        """Record `n` tokens that arrived together at `now`."""
        if n <= 0:
            return
        count = self.count
        if count == 0:
            self.first = now
            self._ttft_lag = now - self._start
            self.is_late = self._ttft_lag > 0
            if self._start == math.inf:
                self._start = now
        elif now - self.last > self.max_tbt:
            self.max_tbt = now - self.last
        if self._tbt is not None:  # of tokens arriving together the first is latest
            due = self._start + count * self._tbt
            lag = now - (due if due < self._deadline else self._deadline)
            if lag > self._lag:
                self._lag = lag
                if lag > 0:
                    self.is_late = True
        self.last = now
        self.count = count + n

    @property
    def promised(self) -> tuple[float, float, float]:
        """Of a stream with a token: (start, tbt, deadline), token k being due at the earlier of start + k * tbt and the
        deadline; infinite tbt and deadline where no pace is promised."""
        return (self._start, math.inf, math.inf) if self._tbt is None else (self._start, self._tbt, self._deadline)

    @property
    def lag(self) -> float:
        """The worst lag of a token that has a pace to keep; minus infinity before the first."""
        return self._lag

    def catch_up(self, last: float, max_tbt: float, lag: float, count: float) -> None:
        """Take over what tokens that were watched elsewhere have come to; `lag` as the property."""
        self.last, self.max_tbt, self._lag, self.count = last, max_tbt, lag, int(count)
        if lag > 0:
            self.is_late = True

    def verdict(self, now: float) -> Verdict:
        """Judge the request as finished (or given up) at `now`."""
        slo = self.slo or SLO()
        no_token = self.first is None
        ttft_lag = now - slo.ttft if no_token and slo.ttft is not None else self._ttft_lag
        deadline_lag = now - slo.deadline if slo.deadline is not None else -math.inf
        ttft_met = ttft_lag <= 0
        tbt_met = self._lag <= 0
        deadline_met = deadline_lag <= 0
        return Verdict(
            met=ttft_met and tbt_met and deadline_met,
            ttft_met=ttft_met,
            tbt_met=tbt_met,
            deadline_met=deadline_met,
            lateness=max(ttft_lag, self._lag, deadline_lag),
        )


STAGES = ("queue", "prefill", "rotated out", "copy wait", "preempted", "decode", "client")


def why_late(
    verdict: Verdict, slo: SLO | None, tokens: int, before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """The stage that cost most of what made a request late; "" for one that was not.

    tokens: how many it has. before, after: seconds by stage, up to its first token and from then on. What was promised
    to take its time costs nothing: stages before a first token that came in time, and decoding at the promised pace.
    """
    if verdict.met or slo is None:
        return ""
    cost = dict.fromkeys(STAGES, 0.0)
    if not (verdict.ttft_met and verdict.deadline_met):
        for stage, seconds in before.items():
            cost[stage] += seconds
    if not (verdict.tbt_met and verdict.deadline_met):
        for stage, seconds in after.items():
            cost[stage] += seconds
        if slo.tbt is not None and verdict.deadline_met:
            cost["decode"] -= (tokens - 1) * slo.tbt
    worst = max(cost, key=lambda stage: cost[stage])
    return worst if cost[worst] > 0 else "decode"  # on pace as a whole, late for a token in between


def why_late_at_client(lateness: float, engine_lateness: float | None, engine_why: str) -> str:
    """Why a request that its caller saw `lateness` seconds late was: the engine's own reason, or "client".

    engine_lateness: as the engine saw it (None: not known, negative: kept). What lies outside the engine is to blame
    where it added more than the engine did.
    """
    if not engine_why or engine_lateness is None:
        return engine_why or "client"
    return "client" if lateness - engine_lateness > max(0.0, engine_lateness) else engine_why
