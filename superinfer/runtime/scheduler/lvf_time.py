"""Largest virtual lag first, by time in state: the rule of the paper's public artifact, as a baseline.

From the artifact of SuperInfer (MLSys 2026, arXiv 2601.20309; a fork of vLLM 0.6.6): when running and waiting requests
do not fit in HBM together, those that wait rank by how long they have waited, those that run by how long they have run.
While free blocks are below a fixed budget, the longest-running decodes are rotated out, whole; then the waiting side is
let in, new or rotated alike. New requests are not let in while DRAM is over 90 % used, nobody is rotated out over 95 %.
It knows no request's SLO.
"""

from __future__ import annotations

from collections.abc import Iterable

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.cost import StepCost
from superinfer.runtime.scheduler.sequence import Sequence, Status

BUDGET_BLOCKS = 2400  # free blocks to be kept, of a pool of
POOL_BLOCKS = 52_000  # blocks: Llama-3-8B's, of 16 tokens, beside its weights on a GH200 of 144 GB
ADMIT_BELOW, ROTATE_BELOW = 0.90, 0.95  # of DRAM that rotated-out requests use


class LVFTime(BatchScheduler):
    """Whole requests in turns, by time in state. Without a second tier it is first come, first served."""

    name = "lvf-time"

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> None:
        super().__init__(kv, limits, cost)
        self._budget = max(1, round(BUDGET_BLOCKS * kv.num_blocks / POOL_BLOCKS))

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank. Who began to wait first is let in first; who began to run first is rotated first."""
        if self._rotation is None:
            return (sequence.arrival, sequence.id)
        if sequence.status is Status.RUNNING:
            return (-sequence.let_in, sequence.id)
        return (sequence.arrival if sequence.preempted_at is None else sequence.preempted_at, sequence.id)

    def _make_room(self, now: float) -> None:
        """Rotate out the longest-running decodes until the budget is free, if not all fit."""
        rotation = self._rotation
        if rotation is None or not len(self._waiting):
            return
        wanted = sum(self._kv.blocks_for(sequence.compute_length) for sequence in self._waiting)
        if wanted <= self._kv.num_available:
            return
        most_parked = ROTATE_BELOW * rotation.kv.num_dram
        for victim in sorted(self._running, key=lambda s: (s.let_in, s.id)):
            if self._kv.num_available >= self._budget or rotation.kv.num_dram_pinned >= most_parked:
                return
            if victim.is_prefilling or victim.scheduled == victim.let_in_at:
                continue
            self._rotate_out(victim, now)

    def _candidates(self) -> Iterable[Sequence]:
        rotation = self._rotation
        if rotation is None or rotation.kv.num_dram_pinned < ADMIT_BELOW * rotation.kv.num_dram:
            return self._waiting
        return (sequence for sequence in self._waiting if sequence.table is not None)
