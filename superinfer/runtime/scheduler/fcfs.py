"""First come, first served: the baseline every other policy is measured against."""

from __future__ import annotations

from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.sequence import Sequence


class FCFS(BatchScheduler):
    """Serves in order of arrival; preempts the latest arrival and recomputes it, as vLLM does by default."""

    name = "fcfs"

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank."""
        return (sequence.arrival, sequence.id)
