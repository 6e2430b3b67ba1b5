"""Who has a slot and blocks, who waits, and how places are given up: the part of every policy that is not a decision.

A sequence that waits has a key by which the queue is in order. One that runs has a slot and a block table. With a
second tier one that waits may have a table too, parked there: see docs/duplexkv.md.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

from superinfer.runtime.config import Admission
from superinfer.runtime.kv.cache import BlockTable, KVCache
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.protocol import FinishReason
from superinfer.runtime.scheduler import stages
from superinfer.runtime.scheduler.base import SchedulerCounts, SchedulerLimits
from superinfer.runtime.scheduler.cohort import Cohort, CohortStep
from superinfer.runtime.scheduler.cost import StepCost, StepLoad, StepRates
from superinfer.runtime.scheduler.draft import Draft
from superinfer.runtime.scheduler.plan import SlotWork
from superinfer.runtime.scheduler.queue import WaitingQueue
from superinfer.runtime.scheduler.returns import Returns
from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, Status


class Places(ABC):
    """The sequences of a scheduler and what they hold. Owns the KV bookkeeping."""

    name = ""
    admission: Admission = "accept"

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> None:
        self.cost = cost if cost is not None else StepCost(StepRates.unknown())
        self._kv = kv
        self._rotation = Rotation(kv) if isinstance(kv, DuplexCache) else None
        self._returns = Returns(self._rotation) if self._rotation is not None else None
        self._draft = Draft(0)
        self._limits = limits
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._cohort = Cohort(limits.num_slots, kv.page_size)
        self._free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._freed: list[int] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._planned: dict[int, dict[Sequence, SlotWork]] = {}
        self._given_up: dict[Sequence, BlockTable] = {}  # with work under way, which may wait for a copy that will fail
        self._cohort_steps: dict[int, list[CohortStep]] = {}  # of the same steps, what cohorts do
        self._copy_waiting: list[Sequence] = []  # running, without work in the last plan for want of copies
        self._loads: dict[int, StepLoad] = {}
        self._step = 0
        self._preemptions = 0

    @abstractmethod
    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """Sort key: smaller is served first, let in first, and preempted last.

        A waiting sequence keeps the key it had when it began to wait: time must move all keys alike.
        """

    def expected_s(self, step: int) -> float:
        """See Scheduler."""
        load = self._loads[step]
        return self.cost.seconds(load) if load.tokens else 0.0

    def _queue_key(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """By which it waits: its rank, unless a policy keeps an order of its own."""
        return self.rank(sequence, now)

    # ------------------------------------------------------------------ requests come and go

    def add(self, sequence: Sequence) -> None:
        """See Scheduler.add."""
        self._waiting.add(sequence, self._queue_key(sequence, sequence.arrival))
        slo = sequence.slo
        if slo is not None and slo.deadline is not None and slo.on_miss != "finish":
            heapq.heappush(self._deadlines, (sequence.arrival + slo.deadline, sequence.id, sequence))
            self._prune_deadlines()

    def overload(self, sequence: Sequence, now: float) -> float | None:
        """See Scheduler.overload. A policy that foresees nothing takes all."""
        return None

    def cancel(self, sequence: Sequence, now: float) -> SequenceUpdate | None:
        """See Scheduler.cancel."""
        if sequence.status is Status.FINISHED:
            return None
        self._finish(sequence, "cancelled", now)
        return SequenceUpdate(sequence, [], None, "cancelled")

    def expire(self, now: float) -> list[SequenceUpdate]:
        """See Scheduler.expire."""
        updates = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, "deadline", now)
                updates.append(SequenceUpdate(sequence, [], None, "deadline"))
        return updates

    def _prune_deadlines(self) -> None:
        """Forget finished sequences whose deadline is far away, once they outnumber the live ones."""
        if len(self._deadlines) > 64 + 2 * (len(self._running) + len(self._waiting)):
            self._deadlines = [entry for entry in self._deadlines if entry[2].status is not Status.FINISHED]
            heapq.heapify(self._deadlines)

    def counts(self) -> SchedulerCounts:
        """See Scheduler.counts."""
        kv = self._kv
        return SchedulerCounts(
            len(self._running),
            len(self._waiting),
            self._preemptions,
            kv.num_blocks,
            kv.num_free,
            kv.num_cached,
            self._rotation.gauges() if self._rotation is not None else None,
            sum(sequence.table is not None for sequence in self._waiting) if self._rotation is not None else 0,
        )

    # ------------------------------------------------------------------ places given up

    def _finish(self, sequence: Sequence, reason: FinishReason | None, now: float) -> None:
        if sequence.status is Status.RUNNING:
            self._leave_slot(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.table is not None:
            if self._returns is not None and reason in ("stop", "length"):
                self._returns.ended(sequence, now)
            self._drop_table(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.finished_at = now
        sequence.stages.end(now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Room is needed: the sequence gives up its slot and blocks: to the second tier, if there is room and coming
        back from there is quicker than computing them anew."""
        self._draft.preempted = True
        self._undraft(sequence)
        rotation, table = self._rotation, sequence.table
        is_kept = rotation is not None and table is not None and rotation.worth_parking(table, sequence.scheduled)
        if is_kept and self._rotate_out(sequence, now):
            return
        self._preemptions += 1
        sequence.preemptions += 1
        self._leave_slot(sequence)
        self._drop_table(sequence)
        self._wait_again(sequence, now, stages.PREEMPTED)

    def _rotate_out(self, sequence: Sequence, now: float) -> bool:
        """The sequence's KV goes to the second tier; False when there is none, or it is full."""
        if self._rotation is None or sequence.table is None:
            return False
        if not self._rotation.kv.park(sequence.table, sequence.scheduled):
            return False
        sequence.rotations += 1
        self._leave_slot(sequence)
        self._wait_again(sequence, now, stages.ROTATED)
        return True

    def _undraft(self, sequence: Sequence) -> None:
        """Take back what the plan being made has for this sequence."""
        self._part(sequence)
        item = self._draft.work.pop(sequence, None)
        if item is not None:
            sequence.scheduled = item.start
            sequence.in_flight -= item.sample
            assert sequence.table is not None
            sequence.table.sent -= len(item.new_blocks)
            self._draft.count(item, -1)
            self._draft.budget += item.length

    def _drop_broken(self, now: float) -> None:
        """A copy failed: who holds what is lost starts again, and what it has under way is not believed, nor is what
        those have under way who have given up such a table since."""
        assert self._rotation is not None
        given_up, self._given_up = self._given_up, {}
        for sequence, table in given_up.items():
            if sequence.table is not None or not sequence.in_flight:
                continue  # what it had under way then is known
            if self._rotation.is_lost(table):
                self._disbelieve(sequence)
            else:
                self._given_up[sequence] = table
        for sequence in [*self._running, *self._waiting]:
            if sequence.table is None or not self._rotation.is_lost(sequence.table):
                continue
            self._restart(sequence, now)

    def _restart(self, sequence: Sequence, now: float) -> None:
        """What its table holds is not to be believed, nor what is under way: it starts again."""
        self._disbelieve(sequence)
        self._preemptions += 1
        sequence.preemptions += 1
        self._drop_table(sequence)
        if sequence.status is Status.RUNNING:
            self._leave_slot(sequence)
            self._wait_again(sequence, now, stages.PREEMPTED)
        sequence.stages.enter(stages.PREEMPTED, now)

    def _disbelieve(self, sequence: Sequence) -> None:
        """Take out what is under way of a sequence, whatever comes of it."""
        self._part(sequence)
        for works in self._planned.values():
            work = works.pop(sequence, None)
            if work is not None:
                sequence.in_flight -= work.sample
                sequence.untold -= work.is_untold

    def _wait_again(self, sequence: Sequence, now: float, stage: str) -> None:
        sequence.stages.enter(stage, now)
        sequence.status = Status.WAITING
        sequence.preempted_at = now
        self._waiting.add(sequence, self._queue_key(sequence, now))

    def _part(self, sequence: Sequence) -> None:
        """Something happens to it that does not happen to all of its cohort."""
        if sequence.cohort is not None:
            sequence.cohort.leave(sequence)

    def _leave_slot(self, sequence: Sequence) -> None:
        self._part(sequence)
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        if any(init.slot == sequence.slot for init in self._draft.init):  # never given to the executor
            self._draft.init = [init for init in self._draft.init if init.slot != sequence.slot]
        else:
            self._freed.append(sequence.slot)
        sequence.slot = -1

    def _drop_table(self, sequence: Sequence) -> None:
        """Its KV is given up. What chunks under way compute is no part of the table it will have next."""
        assert sequence.table is not None
        self._part(sequence)
        for works in self._planned.values():
            work = works.get(sequence)
            if work is not None and not work.sample:
                sequence.untold -= work.is_untold
                del works[sequence]
        if self._rotation is not None:
            self._given_up = {s: table for s, table in self._given_up.items() if s.in_flight}
            if sequence.in_flight:
                self._given_up[sequence] = sequence.table
        self._kv.release(sequence.table)
        sequence.table = None
        sequence.scheduled = sequence.committed = 0
