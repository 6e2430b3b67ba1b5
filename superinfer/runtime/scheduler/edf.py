"""Earliest deadline first: whose next token is due soonest."""

from __future__ import annotations

import math

from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.sequence import Sequence

DUE_AFTER_S = 60.0  # a token that nothing promises is due this long after the request's arrival, so that its turn comes


class EDF(BatchScheduler):
    """Ranks by the due time of the next token on the request's own timeline; deaf to length and to what is lost anyway.

    A time that has been set only moves closer, and whatever arrives later is due later: nobody starves.
    """

    name = "edf"

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank."""
        due = sequence.timeline.due(sequence.timeline.count)
        return (sequence.arrival + (due if due < math.inf else DUE_AFTER_S), sequence.id)
