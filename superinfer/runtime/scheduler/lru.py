"""Least recently let in: who waits gets in by rotating out whoever has run longest. The plainest use of two tiers."""

from __future__ import annotations

from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence, Status

# A rotation is worth its copies only if the one let in gets something done: about 50 decode steps of 10 ms.
MIN_RESIDENCY_S = 0.5


class LRU(BatchScheduler):
    """Round robin over memory: whole sequences, in the order in which they began to wait.

    A sequence may be rotated out after `min_residency_s` seconds. Without a second tier it is first come, first served.
    """

    name = "lru"
    min_residency_s = MIN_RESIDENCY_S

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank."""
        if self._rotation is None:
            return (sequence.arrival, sequence.id)
        if sequence.status is Status.RUNNING:
            return (-sequence.let_in, sequence.id)
        return (sequence.arrival if sequence.preempted_at is None else sequence.preempted_at, sequence.id)

    def _make_room(self, now: float) -> None:
        """Rotate out who ran longest, if that lets the first of the waiting in."""
        ready = [sequence for sequence in self._waiting if not sequence.in_flight]
        if self._rotation is None or not ready:
            return
        first = min(ready, key=lambda s: self.rank(s, now))
        for victim in self._victims(first, self._rotation, now):
            if not self._rotate_out(victim, now):
                return  # DRAM is full: all stay where they are

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
            if not sequence.worked or now - sequence.let_in < self.min_residency_s:
                continue
            assert sequence.table is not None
            victims.append(sequence)
            missing -= rotation.blocks_private(sequence.table)
            if missing <= 0:
                return victims
        return []
