"""`program.plan(deadline=...)`: each call's part of the time, and what cannot be kept, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from superinfer.lang.callgraph import Call, CallGraph
from superinfer.lang.history import Site
from superinfer.lang.planner import Estimate, Planner, share
from superinfer.lang.report import seconds, table


@dataclass(frozen=True, kw_only=True)
class PlannedCall:
    """One call of a plan. Seconds; None where nothing is known.

    after: the calls before it, as numbers of rows; None for a call that only earlier runs have come to.
    tokens: expected. takes_s: expected. due_s: by when it is to end, from the program's beginning. budget_s: what it is
    given, if all before it ended as expected. critical: on the longest way.
    """

    call: str
    after: tuple[int, ...] | None
    tokens: float | None = None
    takes_s: float | None = None
    budget_s: float | None = None
    due_s: float | None = None
    critical: bool = False


@dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """What a deadline means for each call. `str()` is a table.

    needs_s: expected along the longest way, without waiting for the engine; None where the speed is not known.
    complete: whether the trace reached the program's end; `stopped` says where it did not, and then `needs_s` is what
    earlier runs took, or else at least this much.
    infeasible: a sentence for each deadline that cannot be kept.
    """

    program: str
    deadline_s: float | None
    needs_s: float | None
    complete: bool
    stopped: str
    rows: tuple[PlannedCall, ...]
    infeasible: tuple[str, ...]

    @property
    def feasible(self) -> bool | None:
        """None where the speed is not known, so that nothing can be said."""
        if self.infeasible:
            return False
        return None if self.needs_s is None else True

    def __str__(self) -> str:
        head = ("", "call", "after", "tokens", "takes", "budget", "due", "critical")
        lines = [
            (
                str(at),
                row.call,
                "" if row.after is None else ", ".join(map(str, row.after)) or "-",
                "" if row.tokens is None else f"{row.tokens:.0f}",
                *(seconds(value) for value in (row.takes_s, row.budget_s, row.due_s)),
                "*" if row.critical else "",
            )
            for at, row in enumerate(self.rows)
        ]
        whole = ("", f"= {self.program}", "", "", seconds(self.needs_s), seconds(self.deadline_s), "", "")
        notes = [] if self.complete else [f"The trace stops where {self.stopped}."]
        if self.needs_s is None:
            notes.append("No run has been seen yet: times are unknown, the deadline is split by max_tokens.")
        return "\n".join([table(head, [*lines, whole], words={1, 2}), *notes, *self.infeasible])


@dataclass(frozen=True)
class _Weights:
    """Of each call of a graph: expected tokens and seconds (or tokens, where no speed is known), and the lag before."""

    tokens: list[float]
    own: list[float]
    lag: list[float]
    seconds: bool


def plan(planner: Planner, graph: CallGraph, deadline: float | None) -> ProgramPlan:
    """Plan `deadline` for the traced calls and, where the trace stopped early, for those that earlier runs made."""
    weights = _weights(planner, graph.calls)
    tails = graph.longest(weights.own, weights.lag)
    learnt = planner.history.program(planner.program)
    if not graph.complete and learnt is not None:
        for call in graph.calls:  # what follows beyond the trace's end is known from earlier runs only
            site = learnt.sites.get(call.site)
            if site is not None:
                tails[call.index] = max(tails[call.index], site.tail)
    starts = _starts(graph.calls, weights)
    ways = [starts[c.index] + weights.own[c.index] + tails[c.index] for c in graph.calls]
    whole = max(ways, default=0.0)
    if not graph.complete and learnt is not None:
        whole = max(whole, learnt.total)
    rows = [
        _row(
            call,
            weights,
            starts[call.index],
            tails[call.index],
            whole,
            deadline,
            critical=ways[call.index] >= whole * 0.999,
        )
        for call in graph.calls
    ]
    if not graph.complete and learnt is not None:
        met = {call.site for call in graph.calls}
        rows += [_learnt_row(name, site, deadline) for name, site in learnt.sites.items() if name not in met]
    needs = whole if weights.seconds and rows else None
    return ProgramPlan(
        program=planner.program,
        deadline_s=deadline,
        needs_s=needs,
        complete=graph.complete,
        stopped=graph.stopped,
        rows=tuple(rows),
        infeasible=tuple(_infeasible(graph.calls, weights, needs, deadline, graph.complete)),
    )


def _weights(planner: Planner, calls: Sequence[Call]) -> _Weights:
    sites = [planner.history.site(planner.program, call.site) for call in calls]
    speed = planner.history.token_s
    tokens = [site.tokens if site else float(call.max_tokens) for site, call in zip(sites, calls, strict=True)]
    if speed is None:
        return _Weights(tokens, [float(call.max_tokens) for call in calls], [0.0] * len(calls), seconds=False)
    own = [site.work if site else count * speed for site, count in zip(sites, tokens, strict=True)]
    return _Weights(tokens, own, [site.lag if site else 0.0 for site in sites], seconds=True)


def _starts(calls: Sequence[Call], weights: _Weights) -> list[float]:
    """When each call begins if everything takes what is expected."""
    starts: list[float] = []
    for call in calls:
        ready = max((starts[before] + weights.own[before] for before in call.after), default=0.0)
        starts.append(ready + weights.lag[call.index])
    return starts


def _row(
    call: Call, weights: _Weights, start: float, tail: float, whole: float, deadline: float | None, *, critical: bool
) -> PlannedCall:
    own = weights.own[call.index]
    budget = due = None
    if deadline is not None and whole > 0:
        begins = start if weights.seconds else deadline * start / whole
        left = deadline - begins
        budget = share(left, Estimate(own, tail, weights.seconds)) if left > 0 else 0.0
        due = begins + budget
    return PlannedCall(
        call="/".join((*call.path, call.name)),
        after=call.after,
        tokens=weights.tokens[call.index],
        takes_s=own if weights.seconds else None,
        budget_s=budget,
        due_s=due,
        critical=critical,
    )


def _learnt_row(name: str, site: Site, deadline: float | None) -> PlannedCall:
    due = None if deadline is None else max(0.0, deadline - site.tail)
    return PlannedCall(call=name, after=None, tokens=site.tokens, takes_s=site.work, due_s=due)


def _infeasible(
    calls: Sequence[Call], weights: _Weights, needs: float | None, deadline: float | None, complete: bool
) -> list[str]:
    found = []
    if deadline is not None and needs is not None and needs > deadline:
        least = "" if complete else " at least"
        found.append(f"The program's deadline of {seconds(deadline)} cannot be kept: it needs{least} {seconds(needs)}.")
    for call in calls:
        if weights.seconds and call.deadline is not None and weights.own[call.index] > call.deadline:
            name = "/".join((*call.path, call.name))
            takes = seconds(weights.own[call.index])
            found.append(f"The deadline of {seconds(call.deadline)} of call {name!r} cannot be kept: it takes {takes}.")
    return found
