"""What the engine is doing now, for who watches: its unfinished sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from superinfer.runtime.protocol import GetLive, LiveReport, LiveRequest, LiveState
from superinfer.runtime.scheduler.sequence import Sequence


def live_report(asked: GetLive, live: Iterable[Sequence], now: float) -> LiveReport:
    """The report on `live`, in order of arrival for each client.

    One look at every sequence to sort it by state; all else is done for the `asked.limit` reported only.
    """
    states: dict[LiveState, list[Sequence]] = {"computing": [], "loading": [], "rotated": [], "waiting": []}
    computing, loading = states["computing"], states["loading"]
    rotated, waiting = states["rotated"], states["waiting"]
    for sequence in live:
        if sequence.slot >= 0:
            # Only tables of two tiers have copies to wait for; ids of those that ended stay until the next plan.
            (loading if getattr(sequence.table, "awaits", None) else computing).append(sequence)
        else:
            (waiting if sequence.table is None else rotated).append(sequence)
    taken = _shares({state: len(sequences) for state, sequences in states.items()}, asked.limit)
    return LiveReport(
        token=asked.token,
        requests=[
            _request(sequence, state, now)
            for state, sequences in states.items()
            for sequence in sequences[: taken[state]]
        ],
        omitted=sum(map(len, states.values())) - sum(taken.values()),
        **{state: len(sequences) for state, sequences in states.items()},
    )


def _shares(there: dict[LiveState, int], limit: int) -> dict[LiveState, int]:
    """How many of each state to report: an equal share for each, and what some do not use for the others."""
    taken = dict.fromkeys(there, 0)
    for place, state in enumerate(sorted(there, key=lambda state: there[state])):
        taken[state] = min(there[state], limit // (len(there) - place))
        limit -= taken[state]
    return taken


def _request(sequence: Sequence, state: LiveState, now: float) -> LiveRequest:
    age, timeline = now - sequence.arrival, sequence.timeline
    due = timeline.due(timeline.count)
    return LiveRequest(
        id=sequence.id,
        request_id=sequence.request_id,
        index=sequence.index,
        state=state,
        prompt_tokens=sequence.num_prompt,
        output_tokens=sequence.num_output,
        max_tokens=sequence.max_tokens,
        slo_class=sequence.slo_class,
        slack_s=due - age if math.isfinite(due) else None,
        age_s=age,
        program=sequence.program,
    )
