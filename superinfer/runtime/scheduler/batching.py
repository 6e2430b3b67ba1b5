"""Continuous batching with chunked prefill over the paged cache: the mechanics that simple policies share.

A policy is an order, `rank`: running sequences are served in it, waiting ones let in by it, and when blocks run out
the last of the running gives its own up (its computed prefix stays cached while nobody needs the room).
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from itertools import islice

from superinfer.runtime.kv.cache import KVCache, Node
from superinfer.runtime.protocol import FinishReason
from superinfer.runtime.scheduler.base import SchedulerCounts, SchedulerLimits
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan, StepResult
from superinfer.runtime.scheduler.queue import WaitingQueue
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, Status

# Waiting sequences looked at in one step: a long queue behind one prefix that is being computed costs no more.
MAX_LOOKED_AT = 256


class BatchScheduler(ABC):
    """Implements `Scheduler` for policies that are an order. Owns the KV bookkeeping."""

    name = ""

    def __init__(self, kv: KVCache, limits: SchedulerLimits) -> None:
        self._kv = kv
        self._limits = limits
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._freed: list[int] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._planned: dict[int, list[tuple[Sequence, SlotWork]]] = {}
        self._step = 0
        self._preemptions = 0

    @abstractmethod
    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """Sort key: smaller is served first, let in first, and preempted last.

        A waiting sequence keeps the key it had when it began to wait: time must move all keys alike.
        """

    # ------------------------------------------------------------------ requests come and go

    def add(self, sequence: Sequence) -> None:
        """See Scheduler.add."""
        self._waiting.add(sequence, self.rank(sequence, sequence.arrival))
        slo = sequence.slo
        if slo is not None and slo.deadline is not None and slo.on_miss != "finish":
            heapq.heappush(self._deadlines, (sequence.arrival + slo.deadline, sequence.id, sequence))
            self._prune_deadlines()

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
            len(self._running), len(self._waiting), self._preemptions, kv.num_blocks, kv.num_free, kv.num_cached
        )

    # ------------------------------------------------------------------ plan

    def plan(self, now: float) -> StepPlan | None:
        """See Scheduler.plan."""
        work: list[tuple[Sequence, SlotWork]] = []
        init: list[SlotInit] = []
        preempted_before = self._preemptions
        prefills = [s for s in self._running if s.scheduled < s.resume_at]
        # Every decode takes one token of the budget before any prefill chunk takes the rest.
        budget = self._decode(self._limits.max_batch_tokens, work, now)
        if len(prefills) > 1:
            prefills.sort(key=lambda s: self.rank(s, now))
        for sequence in prefills:
            if sequence.status is Status.RUNNING and budget > 0:
                item = self._continue(sequence, budget, now)
                if item is not None:
                    work.append((sequence, item))
                    budget -= item.length
        preempted = self._preemptions != preempted_before
        if preempted:
            work = self._without_preempted(work)
        # What was preempted for others would come straight back; but where nobody else computes, someone must.
        if budget > 0 and self._free_slots and not (preempted and work):
            self._admit(budget, work, init, now)
        if not work:
            return None
        self._step += 1
        self._planned[self._step] = work
        freed, self._freed = tuple(self._freed), []
        return StepPlan(self._step, tuple([item for _, item in work]), tuple(init), freed)

    def _decode(self, budget: int, work: list[tuple[Sequence, SlotWork]], now: float) -> int:
        """One token for every running sequence that is past its prefill. Returns what is left of the budget.

        The order matters only if the budget cannot serve all. Should blocks run out, the last in rank gives its own up
        whoever asked first. The loop is spelled out, without calls: it is most of the scheduler's time in a full batch.
        """
        decodes = [s for s in self._running if s.scheduled >= s.resume_at]
        if len(decodes) > budget:
            decodes.sort(key=lambda s: self.rank(s, now))
        page_size = self._kv.page_size
        for sequence in decodes:
            table, start = sequence.table, sequence.scheduled
            known = len(sequence.tokens) + sequence.in_flight
            if table is None or sequence.score_start is not None or known - sequence.num_prompt >= sequence.max_tokens:
                continue  # lost its place to one before it in this loop, or has all its tokens planned
            if budget <= 0:
                break
            new_blocks: tuple[int, ...] = ()
            if start >= len(table.blocks) * page_size:
                grown = self._grow(sequence, start + 1, now)
                if grown is None:
                    continue
                new_blocks = grown
            sequence.scheduled = start + 1
            sequence.in_flight += 1
            work.append((sequence, SlotWork(sequence.slot, start, 1, (), new_blocks, True)))
            budget -= 1
        return budget

    @staticmethod
    def _without_preempted(work: list[tuple[Sequence, SlotWork]]) -> list[tuple[Sequence, SlotWork]]:
        """What is left of a plan after some of its sequences lost their place to others."""
        for sequence, item in work:
            if sequence.status is not Status.RUNNING and item.sample:
                sequence.in_flight -= 1
        return [(sequence, item) for sequence, item in work if sequence.status is Status.RUNNING]

    def _continue(self, sequence: Sequence, budget: int, now: float) -> SlotWork | None:
        """The next chunk of a running sequence's prefill; None if it lost its own place for want of room."""
        length = min(budget, sequence.resume_at - sequence.scheduled)
        new_blocks = self._grow(sequence, sequence.scheduled + length, now)
        return self._work(sequence, length, new_blocks) if new_blocks is not None else None

    def _grow(self, sequence: Sequence, num_tokens: int, now: float) -> tuple[int, ...] | None:
        """Blocks until its table holds `num_tokens`, from those who rank last; None if that was the sequence itself."""
        table = sequence.table
        assert table is not None
        missing = self._kv.blocks_for(num_tokens) - len(table.blocks)
        if missing <= 0:
            return ()
        while (new_blocks := self._kv.allocate(table, missing)) is None:
            victim = max(self._running, key=lambda s: self.rank(s, now))
            self._preempt(victim, now)
            if victim is sequence:
                return None
        return tuple(new_blocks)

    def _admit(self, budget: int, work: list[tuple[Sequence, SlotWork]], init: list[SlotInit], now: float) -> None:
        """Let waiting sequences in, in order, while slots, blocks and the token budget last."""
        admitted: list[Sequence] = []
        for sequence in islice(self._waiting, MAX_LOOKED_AT):
            if budget <= 0 or not self._free_slots:
                break
            if sequence.in_flight:  # preempted while a step of its own was under way: its token is not known yet
                continue
            limit = len(sequence.tokens) - 1 if sequence.score_start is None else sequence.score_start - 1
            path = self._kv.match(sequence.tokens, sequence.salt, limit)
            if self._kv.is_being_computed(sequence.tokens, sequence.salt, path):
                continue  # its next block is on its way: share it rather than compute it twice
            new_blocks = self._reserve(sequence, path)
            if new_blocks is None:
                break
            admitted.append(sequence)
            init.append(self._start(sequence, now))
            item = self._work(sequence, min(budget, sequence.resume_at - sequence.scheduled), new_blocks)
            work.append((sequence, item))
            budget -= item.length
        for sequence in admitted:
            self._waiting.remove(sequence)

    def _reserve(self, sequence: Sequence, path: list[Node]) -> tuple[int, ...] | None:
        """Hold the matched prefix and blocks for all known tokens, so that a prefill, once begun, can end."""
        table = self._kv.open(sequence.salt)
        self._kv.adopt(table, path)
        needed = self._kv.blocks_for(sequence.compute_length) - len(table.blocks)
        if self._kv.allocate(table, max(0, needed)) is None:
            self._kv.release(table)
            return None
        sequence.table = table
        sequence.scheduled = sequence.committed = len(path) * self._kv.page_size
        return tuple(table.blocks)

    def _start(self, sequence: Sequence, now: float) -> SlotInit:
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.resume_at = sequence.compute_length
        self._running.append(sequence)
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            sequence.cached = sequence.scheduled
        if sequence.preempted_at is not None:
            sequence.preempted_s += now - sequence.preempted_at
            sequence.preempted_at = None
        tokens = sequence.tokens
        return SlotInit(
            slot=sequence.slot,
            sampling=sequence.sampling,
            seed=sequence.seed,
            prompt=tuple(tokens[: sequence.num_prompt]),
            output=tuple(tokens[sequence.num_prompt :]),
            stop_ids=sequence.stop_ids,
        )

    def _work(self, sequence: Sequence, length: int, new_blocks: tuple[int, ...]) -> SlotWork:
        start, end = sequence.scheduled, sequence.scheduled + length
        tokens = tuple(sequence.tokens[start:end]) if sequence.is_prefilling else ()
        sample = sequence.score_start is None and end == sequence.compute_length
        score: tuple[int, ...] = ()
        if sequence.score_start is not None:
            score = tuple(sequence.tokens[max(sequence.score_start, start + 1) : end + 1])
        sequence.scheduled = end
        if sample:
            sequence.in_flight += 1
        assert sequence.table is not None
        if tokens:
            self._kv.announce(sequence.table, sequence.tokens)
        return SlotWork(sequence.slot, start, length, tokens, new_blocks, sample, score)

    # ------------------------------------------------------------------ results

    def commit(self, result: StepResult, now: float) -> list[SequenceUpdate]:
        """See Scheduler.commit."""
        updates = []
        for sequence, work in self._planned.pop(result.step):
            if work.sample:
                sequence.in_flight -= 1
            if sequence.status is Status.FINISHED:
                continue
            if work.sample:
                sequence.tokens.append(result.tokens[work.slot])
                sequence.timeline.tokens(1, now - sequence.arrival)
            if sequence.status is Status.RUNNING and sequence.table is not None:
                table = sequence.table
                sequence.committed = work.start + work.length
                if sequence.committed >= (len(table.nodes) + 1) * self._kv.page_size:  # a block is full
                    self._kv.commit(table, sequence.tokens, sequence.committed)
                if sequence.is_prefilling:
                    self._kv.announce(sequence.table, sequence.tokens)
            update = self._update(sequence, work, result, now)
            if update is not None:
                updates.append(update)
        return updates

    def _update(self, sequence: Sequence, work: SlotWork, result: StepResult, now: float) -> SequenceUpdate | None:
        reason = self._finish_reason(sequence, work)
        if reason is not None:
            self._finish(sequence, reason, now)
        if work.sample:
            logprob = result.logprobs.get(work.slot)
            return SequenceUpdate(sequence, [sequence.tokens[-1]], [logprob] if logprob is not None else None, reason)
        if work.score:
            return SequenceUpdate(sequence, [], result.scores[work.slot], reason)
        return SequenceUpdate(sequence, [], None, reason) if reason is not None else None

    def _finish_reason(self, sequence: Sequence, work: SlotWork) -> FinishReason | None:
        if sequence.score_start is not None:
            return "scored" if work.start + work.length == sequence.compute_length else None
        if not work.sample:
            return None
        if sequence.tokens[-1] in sequence.stop_ids and sequence.num_output >= sequence.sampling.min_tokens:
            return "stop"
        return "length" if sequence.num_output >= sequence.max_tokens else None

    def abort(self, step: int, now: float) -> list[Sequence]:
        """See Scheduler.abort."""
        lost = []
        for sequence, work in self._planned.pop(step, []):
            if work.sample:
                sequence.in_flight -= 1
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, None, now)
                lost.append(sequence)
        return lost

    # ------------------------------------------------------------------ places given up

    def _finish(self, sequence: Sequence, reason: FinishReason | None, now: float) -> None:
        if sequence.status is Status.RUNNING:
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.finished_at = now

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._vacate(sequence)
        self._preemptions += 1
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        sequence.preempted_at = now
        self._waiting.add(sequence, self.rank(sequence, now))

    def _vacate(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        assert sequence.table is not None
        self._kv.release(sequence.table)
        sequence.table = None
        self._free_slots.append(sequence.slot)
        self._freed.append(sequence.slot)
        sequence.slot = -1
        sequence.scheduled = sequence.committed = 0
