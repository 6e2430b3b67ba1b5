"""By the weight of the promise."""

from __future__ import annotations

import math

from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.sequence import Sequence

HEAD_START_S = 10.0  # for every doubling of the weight


class Priority(BatchScheduler):
    """Heavier first, among equals the earlier; equals never displace each other in turns.

    A doubled weight is worth an arrival HEAD_START_S earlier: aging that no weight outruns, so nobody starves.
    """

    name = "priority"

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank."""
        weight = sequence.slo.weight if sequence.slo is not None else 1.0
        return (sequence.arrival - HEAD_START_S * math.log2(weight), sequence.id)
