"""Least recently let in: who waits gets in by rotating out whoever has run longest. The plainest use of two tiers."""

from __future__ import annotations

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.cost import StepCost
from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence, Status

QUANTUM = 32
# A rotation is worth its copies only if the one let in gets something done: who leaves must have been there for so many
# times as long as places wait for the copies of a rotation. 32 decodes of 10 ms against 40 ms.
WORTH = 8.0
# Rotating by choice costs throughput, for it makes nobody need less: so much of HBM may be idle for copies in the mean,
# half of the 2 % that the second tier may cost. And of that share, seconds that may be saved up for a burst.
IDLE_SHARE = 0.01
SAVED_S = 2.0


class LRU(BatchScheduler):
    """Round robin over memory: whole sequences, in the order in which they began to wait.

    A sequence may be rotated out once it has generated `quantum` tokens since it was let in, and has been there for
    `worth` times as long as the copies will take; and while no more than `idle_share` of HBM is held by sequences that
    wait for copies. So few are on a slow link. Without a second tier it is first come, first served.
    """

    name = "lru"
    quantum = QUANTUM
    worth = WORTH
    idle_share = IDLE_SHARE

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> None:
        super().__init__(kv, limits, cost)
        self._saved_s = SAVED_S  # by which the idle share has not been used up; below 0 when it has
        self._now = self._stalled_s = 0.0

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank. Who has been rotated out waits for another turn; who is to compute anew what it had
        does not lose its place as well, and is, as first come, first served has it, who came last."""
        is_parked = sequence.status is Status.WAITING and sequence.table is not None
        if is_parked and sequence.preempted_at is not None:
            return (sequence.preempted_at, sequence.id)
        return (sequence.arrival, sequence.id)

    def _make_room(self, now: float) -> None:
        """Rotate out who ran longest, if that lets the first of the waiting in."""
        rotation = self._rotation
        if rotation is None:
            return
        self._count_idle(rotation, now)
        if self._saved_s < 0.0:
            return
        first = next((sequence for sequence in self._waiting if not sequence.is_under_way), None)
        if first is None:
            return
        for victim in self._victims(first, rotation, now):
            if not self._rotate_out(victim, now):
                return  # DRAM is full: all stay where they are

    def _count_idle(self, rotation: Rotation, now: float) -> None:
        """Note what copies have cost since the last plan: blocks of who sat out for them, all blocks while a step did.

        Measured, not foreseen: a block that leaves holds up whoever gets it next, with all that one holds.
        """
        passed, self._now = now - self._now, now
        held = sum(len(sequence.table.blocks) for sequence in self._copy_waiting if sequence.table is not None)
        stalled = rotation.stalled_s - self._stalled_s
        self._stalled_s = rotation.stalled_s
        idle_s = passed * held / self._kv.num_blocks + stalled
        self._saved_s = min(SAVED_S, self._saved_s + passed - idle_s / self.idle_share)

    def _victims(self, first: Sequence, rotation: Rotation, now: float) -> list[Sequence]:
        """The fewest sequences, longest resident first, whose blocks and slots let `first` in; none if none do."""
        path = self._cached_path(first)
        missing = rotation.blocks_wanted(first.table, path, self._kv.blocks_for(first.compute_length))
        missing -= self._kv.num_available
        slots = len(self._free_slots)
        if missing <= 0 and slots:
            return []
        victims = []
        for sequence in sorted(self._running, key=lambda s: (s.let_in, s.id)):
            made = sequence.num_output + sequence.in_flight - sequence.let_in_with
            if sequence.scheduled == sequence.let_in_at or made < self.quantum:
                continue
            table = sequence.table
            assert table is not None
            if now - sequence.let_in < self.worth * rotation.idle_s(table, sequence.scheduled):
                continue
            victims.append(sequence)
            missing -= self._kv.blocks_private(table)
            if missing <= 0:
                return victims
        return []
