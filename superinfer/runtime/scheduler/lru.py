"""Least recently let in: who waits gets in by rotating out whoever has run longest. The plainest use of two tiers."""

from __future__ import annotations

from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence, Status

# A rotation is worth its copies only if the one let in gets something done: 32 decodes of 10 ms against the 40 ms that
# 1,000 blocks of 2 MiB take over PCIe 5.
QUANTUM = 32


class LRU(BatchScheduler):
    """Round robin over memory: whole sequences, in the order in which they began to wait.

    A sequence may be rotated out once it has generated `quantum` tokens since it was let in. Without a second tier it
    is first come, first served.
    """

    name = "lru"
    quantum = QUANTUM

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """See BatchScheduler.rank."""
        if self._rotation is None:
            return (sequence.arrival, sequence.id)
        if sequence.status is Status.RUNNING:
            return (-sequence.let_in, sequence.id)
        return (sequence.arrival if sequence.preempted_at is None else sequence.preempted_at, sequence.id)

    def _make_room(self, now: float) -> None:
        """Rotate out who ran longest, if that lets the first of the waiting in."""
        if self._rotation is None:
            return
        first = next((sequence for sequence in self._waiting if not sequence.is_under_way), None)
        if first is None:
            return
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
            made = sequence.num_output + sequence.in_flight - sequence.let_in_with
            if sequence.scheduled == sequence.let_in_at or made < self.quantum:
                continue
            assert sequence.table is not None
            victims.append(sequence)
            missing -= self._kv.blocks_private(sequence.table)
            if missing <= 0:
                return victims
        return []
