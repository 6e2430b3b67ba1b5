"""What of a program's time one call may take, and what the engine is told of it. See docs/slo.md.

Pure: what was learnt and what was traced go in, numbers come out. Times in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from superinfer.lang.callgraph import Call, CallGraph
from superinfer.lang.history import History
from superinfer.lang.promise import SPENT_DEADLINE, Promise
from superinfer.runtime.protocol import Hints
from superinfer.runtime.slo import SLO

LEAST_SHARE = 1e-3  # of its program's worth, that a call is sent with: a weight is above 0
YIELD_S = 60.0  # later than its program's deadline is due what belongs to a program that will miss it


@dataclass(frozen=True)
class Estimate:
    """What a call takes and what must follow it. `seconds`: False where only their proportion is known.

    spread: how far what follows is from `tail` on average. share: of what its program has left to do, with its part of
    what follows it, where runs have been seen.
    """

    own: float
    tail: float
    seconds: bool = True
    share: float = 1.0
    spread: float = 0.0

    @property
    def least(self) -> float:
        """Less than this is too little, even for a run that goes well."""
        return self.own + max(0.0, self.tail - self.spread)


@dataclass(frozen=True)
class Sent:
    """What goes to the engine with a call. planned: the deadline in `slo` is a plan, not the promise; it cuts
    nothing short. enforced: the promise, where it may cut the call short: that is then the client's to do."""

    slo: SLO | None
    hints: Hints | None
    planned: float | None = None
    enforced: SLO | None = None


@dataclass(frozen=True)
class Pauses:
    """How long a session's text waits until it is extended, where that is known; seconds.

    tools: between two calls of a turn, before any run has been seen. idle: between two turns.
    """

    tools: float | None = None
    idle: float | None = None


NO_PAUSES = Pauses()


def share(left: float, estimate: Estimate) -> float:
    """The part of `left` that the call may take: all that what must follow leaves, or else in proportion."""
    if estimate.seconds and left - estimate.tail >= estimate.own:
        return left - estimate.tail
    whole = estimate.own + estimate.tail
    return left * estimate.own / whole if whole > 0 else left


def unseen(pauses: Pauses) -> float | None:
    """When a call is extended of which nothing has been seen yet: tools may come, or else the next turn."""
    return pauses.tools if pauses.tools is not None else pauses.idle


def hints_unseen(group: str, keep_s: float | None, may_go_on: bool) -> Hints | None:
    """What the engine is told of a call of which nothing has been seen yet."""
    if group or keep_s is not None or may_go_on:
        return Hints(group=group, keep_s=keep_s, may_go_on=may_go_on)
    return None


class Planner:
    """Plans the calls of one program from its history, and from a trace where there is one."""

    def __init__(self, program: str, history: History) -> None:
        self.program = program
        self.history = history
        self._traced: dict[str, Estimate] = {}
        self._extended: set[str] = set()

    def learn_trace(self, graph: CallGraph) -> None:
        """Use a trace for the places that no run has come to yet. One that stopped early does not know what follows."""
        if not graph.complete:
            return
        own = [float(call.max_tokens) for call in graph.calls]
        tails = graph.longest(own, [0.0] * len(own))
        shares = graph.traced_shares(own)
        self._traced = {
            call.site: Estimate(own[call.index], tails[call.index], seconds=False, share=shares[call.index])
            for call in graph.calls
        }
        extended = {call.extends for call in graph.calls}
        self._extended = {call.site for call in graph.calls if call.index in extended}

    def estimate(self, site: str) -> Estimate | None:
        """None where nothing is known."""
        known = self.history.site(self.program, site)
        if known is not None:
            return Estimate(known.work, known.tail, share=known.share, spread=known.tail_spread)
        return self._traced.get(site)

    def send(self, call: Call, promise: Promise, left: float, group: str, pauses: Pauses = NO_PAUSES) -> Sent:
        """What to send with a call that has been promised `promise`, with `left` of the program's time."""
        return self._planned(call, promise, left, self._hints(call, promise, group, pauses))

    def _planned(self, call: Call, promise: Promise, left: float, hints: Hints | None) -> Sent:
        slo = promise.slo
        if slo is None or slo.deadline is None or not 0 < left < math.inf:
            return Sent(slo, hints)
        estimate = self.estimate(call.site)
        if estimate is None:
            return Sent(slo, hints)
        weight = slo.weight * max(estimate.share, LEAST_SHARE)
        if estimate.seconds and left < estimate.least:
            planned = left + YIELD_S  # the promise is as good as lost: those that can be kept go first
        elif (planned := max(share(left, estimate), SPENT_DEADLINE)) >= slo.deadline:
            return Sent(slo if weight == slo.weight else msgspec.structs.replace(slo, weight=weight), hints)
        sent = SLO(ttft=slo.ttft, tbt=slo.tbt, deadline=planned, weight=weight)
        return Sent(sent, hints, planned, enforced=slo if slo.on_miss != "finish" else None)

    def _hints(self, call: Call, promise: Promise, group: str, pauses: Pauses) -> Hints | None:
        known = self.history.site(self.program, call.site)
        if known is None:
            keep, traced = 0.0 if call.site in self._extended else unseen(pauses), self._traced.get(call.site)
            return hints_unseen(group, keep, promise.shared and (traced is None or traced.tail > 0.0))
        return Hints(
            group=group,
            expected_tokens=known.tokens if known.tokens > 0 else None,
            keep_s=known.gap if known.extended >= 0.5 else pauses.idle,
            rest_tokens=known.rest,
            rest_s=known.tail if known.rest > 0 else 0.0,
            spread_s=known.work_spread + known.tail_spread,
            follows=bool(call.after),
        )
