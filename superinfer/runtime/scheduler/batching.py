"""Continuous batching with chunked prefill over the paged cache: the mechanics that simple policies share.

A policy is an order, `rank`: running sequences are served in it, waiting ones let in by it, and when blocks run out
the last of the running gives its own up (its computed prefix stays cached while nobody needs the room). With a second
tier it gives them up to that: see docs/duplexkv.md.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from superinfer.runtime.config import Admission
from superinfer.runtime.kv.cache import KVCache, Node
from superinfer.runtime.kv.copies import BlockCopy
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.protocol import FinishReason
from superinfer.runtime.scheduler import stages
from superinfer.runtime.scheduler.base import SchedulerCounts, SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepLoad, StepRates
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan, StepResult
from superinfer.runtime.scheduler.queue import WaitingQueue
from superinfer.runtime.scheduler.rotation import Rotation
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, Status

# Waiting sequences looked at in one step: a long queue behind one prefix that is being computed costs no more.
MAX_LOOKED_AT = 256


@dataclass(slots=True)
class Draft:
    """A plan being made. budget: tokens left. waits: copies its work depends on; `patient`: however many they are.

    decodes, kv_read, prefill, pairs: what its work comes to, as in a `StepLoad`.
    """

    budget: int
    decodes: int = 0
    kv_read: int = 0
    prefill: int = 0
    pairs: float = 0.0
    work: dict[Sequence, SlotWork] = field(default_factory=dict)
    init: list[SlotInit] = field(default_factory=list)
    waits: set[int] = field(default_factory=set)
    preempted: bool = False
    patient: bool = False

    @property
    def load(self) -> StepLoad:
        """What the work comes to."""
        return StepLoad(self.prefill + self.decodes, self.decodes, self.kv_read, self.pairs)

    def count(self, item: SlotWork, sign: int = 1) -> None:
        """Count a prefill chunk's or a decode's load in, or out with -1."""
        if item.tokens:
            self.prefill += sign * item.length
            self.kv_read += sign * item.start
            self.pairs += sign * item.length * (item.start + (item.length + 1) / 2)
        else:
            self.decodes += sign
            self.kv_read += sign * (item.start + 1)


class BatchScheduler(ABC):
    """Implements `Scheduler` for policies that are an order. Owns the KV bookkeeping."""

    name = ""
    admission: Admission = "accept"

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> None:
        self.cost = cost if cost is not None else StepCost(StepRates.unknown())
        self._kv = kv
        self._rotation = Rotation(kv) if isinstance(kv, DuplexCache) else None
        self._draft = Draft(0)
        self._limits = limits
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._freed: list[int] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._planned: dict[int, list[tuple[Sequence, SlotWork]]] = {}
        self._loads: dict[int, StepLoad] = {}
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

    # ------------------------------------------------------------------ plan

    def plan(self, now: float) -> StepPlan | None:
        """See Scheduler.plan."""
        draft = self._draft = Draft(self._limits.max_batch_tokens)
        if self._rotation is not None:
            self._rotation.watch(now)
        self._make_room(now)
        prefills = [s for s in self._running if s.scheduled < s.resume_at]
        # Every decode takes one token of the budget before any prefill chunk takes the rest.
        self._decode([s for s in self._running if s.scheduled >= s.resume_at], now)
        if len(prefills) > 1:
            prefills.sort(key=lambda s: self.rank(s, now))
        for sequence in prefills:
            self._continue(sequence, now)
        # What was preempted for others would come straight back; but where nobody else computes, someone must.
        if draft.budget > 0 and self._free_slots and not (draft.preempted and draft.work):
            self._admit(now)
        if not draft.work and self._rotation is not None:
            self._wait_with_first(now)
        self._note_copy_waits(draft, now)
        self._draft = Draft(0)
        return self._finish_plan(draft)

    def _note_copy_waits(self, draft: Draft, now: float) -> None:
        """Who has a slot and no work in this plan for want of copies is waiting for them; the others are not."""
        if self._rotation is None:
            return
        for sequence in self._running:
            table = sequence.table
            if table is not None and sequence not in draft.work and self._rotation.kv.awaits(table):
                sequence.stages.enter(stages.COPY_WAIT, now)
            else:
                sequence.stages.work(now)

    def _wait_with_first(self, now: float) -> None:
        """All that run wait for copies: the step waits with the first of them."""
        self._draft.patient = True
        for sequence in sorted(self._running, key=lambda s: self.rank(s, now)):
            if not self._draft.work:
                self._decode([sequence] if not sequence.is_prefilling else [], now)
                self._continue(sequence, now)

    def _make_room(self, now: float) -> None:  # noqa: B027 - most policies do nothing here
        """For policies that rotate by choice: called before each plan."""

    def _finish_plan(self, draft: Draft) -> StepPlan | None:
        copies: tuple[BlockCopy, ...] = ()
        if self._rotation is not None:
            copies = self._rotation.copies_of_plan()
        if not draft.work and not copies:
            if self._rotation is None or self._planned or not self._rotation.kv.num_pending:
                return None
            if self._running or self._waiting:  # nothing to do but wait for copies
                draft.waits = {self._rotation.kv.oldest_pending}
        self._step += 1
        self._planned[self._step] = list(draft.work.items())
        self._loads[self._step] = draft.load
        freed, self._freed = tuple(self._freed), []
        plan = StepPlan(
            self._step, tuple(draft.work.values()), tuple(draft.init), freed, copies, tuple(sorted(draft.waits))
        )
        if self._rotation is not None:
            self._rotation.planned(plan)
        return plan

    def _decode(self, decodes: list[Sequence], now: float) -> None:
        """One token for every running sequence that is past its prefill, while the budget lasts.

        The order matters only if the budget cannot serve all. Should blocks run out, the last in rank gives its own up
        whoever asked first. The loop is spelled out, without calls: it is most of the scheduler's time in a full batch.
        """
        draft, rotation, page_size = self._draft, self._rotation, self._kv.page_size
        if len(decodes) > draft.budget:
            decodes.sort(key=lambda s: self.rank(s, now))
        for sequence in decodes:
            table, start = sequence.table, sequence.scheduled
            known = len(sequence.tokens) + sequence.in_flight
            if sequence.slot < 0 or table is None or sequence.score_start is not None:
                continue  # lost its place to one before it in this loop, or has nothing to decode
            if known - sequence.num_prompt >= sequence.max_tokens:
                continue  # all its tokens are planned
            if draft.budget <= 0:
                break
            if rotation is not None and table.awaits and not self._can_wait(sequence):  # type: ignore[attr-defined]
                continue
            new_blocks: tuple[int, ...] = ()
            if start >= len(table.blocks) * page_size and not self._grow(sequence, start + 1, now):
                continue
            if table.sent < len(table.blocks):
                if rotation is not None and not self._can_wait(sequence):
                    continue
                new_blocks = tuple(table.blocks[table.sent :])
                table.sent = len(table.blocks)
            if rotation is not None and table.awaits:  # type: ignore[attr-defined]
                draft.waits.update(rotation.kv.awaits(table))
            sequence.scheduled = start + 1
            sequence.in_flight += 1
            draft.work[sequence] = SlotWork(sequence.slot, start, 1, (), new_blocks, True)
            draft.budget -= 1
            draft.decodes += 1
            draft.kv_read += start + 1

    def _continue(self, sequence: Sequence, now: float) -> None:
        """The next chunk of a running sequence's prefill, unless it loses its own place for want of room."""
        if sequence.status is not Status.RUNNING or not sequence.is_prefilling or self._draft.budget <= 0:
            return
        length = min(self._draft.budget, sequence.resume_at - sequence.scheduled)
        if not self._can_wait(sequence) or not self._grow(sequence, sequence.scheduled + length, now):
            return
        if self._can_wait(sequence):  # the blocks it grew by may have copies pending
            self._work(sequence, length)

    def _grow(self, sequence: Sequence, num_tokens: int, now: float) -> bool:
        """Blocks until its table holds `num_tokens`, from those who rank last; False if that was itself."""
        table = sequence.table
        assert table is not None
        missing = self._kv.blocks_for(num_tokens) - len(table.blocks)
        while missing > 0 and self._kv.allocate(table, missing) is None:
            victim = max(self._running, key=lambda s: self.rank(s, now))
            self._preempt(victim, now)
            if victim is sequence:
                return False
        return True

    def _can_wait(self, sequence: Sequence) -> bool:
        """Whether this step may wait for the copies the sequence needs: few enough, with those it waits for anyway."""
        if self._rotation is None or sequence.table is None or self._draft.patient:
            return True
        awaits = self._rotation.kv.awaits(sequence.table)
        return not awaits or self._rotation.can_wait(awaits, self._draft.waits)

    def _admit(self, now: float) -> None:
        """Let waiting sequences in, in order, while slots, blocks and the token budget last."""
        draft = self._draft
        admitted: list[Sequence] = []
        for sequence in islice(self._candidates(), MAX_LOOKED_AT):
            if draft.budget <= 0 or not self._free_slots:
                break
            if sequence.is_under_way:  # preempted while a step of its own was: its token is not known yet
                continue
            path = self._cached_path(sequence)
            if sequence.table is None and self._kv.is_being_computed(sequence.tokens, sequence.salt, path):
                continue  # its next block is on its way: share it rather than compute it twice
            if not self._reserve(sequence, path):
                break
            admitted.append(sequence)
            draft.init.append(self._start(sequence, now))
            if self._can_wait(sequence):
                self._work(sequence, min(draft.budget, sequence.resume_at - sequence.scheduled))
        for sequence in admitted:
            self._waiting.remove(sequence)

    def _candidates(self) -> Iterable[Sequence]:
        """Who may be let in, in order: all that wait, unless a policy holds some back though there is room."""
        return self._waiting

    def _cached_path(self, sequence: Sequence) -> list[Node]:
        """What of a sequence's prefix is cached and worth using. Empty for a rotated-out one: it has its own."""
        if sequence.table is not None:
            assert self._rotation is not None
            if not self._rotation.is_lost(sequence.table):
                return []
            self._drop_table(sequence)
        limit = len(sequence.tokens) - 1 if sequence.score_start is None else sequence.score_start - 1
        path = self._kv.match(sequence.tokens, sequence.salt, limit)
        return path if self._rotation is None else self._rotation.worth_loading(path)

    def _reserve(self, sequence: Sequence, path: list[Node]) -> bool:
        """Hold the matched prefix and blocks for all known tokens, so that a prefill, once begun, can end."""
        wanted = self._kv.blocks_for(sequence.compute_length)
        if sequence.table is not None:
            assert self._rotation is not None
            return self._rotation.kv.resume(sequence.table, wanted - self._kv.blocks_for(sequence.scheduled))
        table = self._kv.open(sequence.salt)
        self._kv.adopt(table, path)
        if self._kv.allocate(table, max(0, wanted - len(table.blocks))) is None:
            self._kv.release(table)
            return False
        sequence.table = table
        sequence.scheduled = sequence.committed = len(path) * self._kv.page_size
        return True

    def _start(self, sequence: Sequence, now: float) -> SlotInit:
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.resume_at = sequence.compute_length
        sequence.let_in, sequence.let_in_with, sequence.let_in_at = now, sequence.num_output, sequence.scheduled
        self._running.append(sequence)
        sequence.stages.work(now)
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            sequence.cached = sequence.scheduled
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

    def _work(self, sequence: Sequence, length: int) -> None:
        draft, table = self._draft, sequence.table
        assert table is not None
        start, end = sequence.scheduled, sequence.scheduled + length
        tokens = tuple(sequence.tokens[start:end]) if sequence.is_prefilling else ()
        sample = sequence.score_start is None and end == sequence.compute_length
        score: tuple[int, ...] = ()
        if sequence.score_start is not None:
            score = tuple(sequence.tokens[max(sequence.score_start, start + 1) : end + 1])
        sequence.scheduled = end
        if sample:
            sequence.in_flight += 1
        if tokens:
            self._kv.announce(table, sequence.tokens)
        if self._rotation is not None:
            draft.waits.update(self._rotation.kv.awaits(table))
        new_blocks = tuple(table.blocks[table.sent :])
        table.sent = len(table.blocks)
        draft.work[sequence] = item = SlotWork(sequence.slot, start, length, tokens, new_blocks, sample, score)
        draft.count(item)
        draft.budget -= length

    # ------------------------------------------------------------------ results

    def commit(self, result: StepResult, now: float) -> list[SequenceUpdate]:
        """See Scheduler.commit."""
        load = self._loads.pop(result.step)
        if load.tokens:
            self.cost.observe(load, result.elapsed - result.link.stall_s)
        if self._rotation is not None and self._rotation.settle(result):
            self._drop_broken(now)
        updates = []
        tokens, page_size, has_logprobs = result.tokens, self._kv.page_size, bool(result.logprobs)
        planned = self._planned.pop(result.step)
        if result.link.stall_s > 0.0:
            for sequence, _ in planned:
                sequence.stages.stalled(result.link.stall_s, now)
        for sequence, work in planned:
            sample = work.sample
            if sample:
                sequence.in_flight -= 1
            if sequence.status is Status.FINISHED:
                continue
            if sample:
                token = tokens[work.slot]
                sequence.tokens.append(token)
                sequence.timeline.tokens(1, now - sequence.arrival)
                if sequence.timeline.count == 1:
                    sequence.stages.first_token(now)
            table = sequence.table
            followed: list[int] = []
            if sample and result.forced and work.slot in result.forced:
                followed = self._follow(sequence, result.forced[work.slot], now)
            if table is not None:
                sequence.committed = committed = work.start + work.length
                if sequence.status is Status.RUNNING:
                    if committed >= (len(table.nodes) + 1) * page_size:  # a block is full
                        self._kv.commit(table, sequence.tokens, committed)
                    if sequence.scheduled < sequence.resume_at:
                        self._kv.announce(table, sequence.tokens)
            if sample and token not in sequence.stop_ids and not (has_logprobs and work.slot in result.logprobs):
                # Nearly all: without further calls.
                reason: FinishReason | None = None
                if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
                    reason = "length"
                    self._finish(sequence, reason, now)
                updates.append(SequenceUpdate(sequence, [token, *followed], None, reason))
                continue
            update = self._update(sequence, work, result, now)
            if update is not None:
                updates.append(update)
        return updates

    def _follow(self, sequence: Sequence, forced: tuple[int, ...], now: float) -> list[int]:
        """Take tokens that a grammar forces as known; returns them, as far as max_tokens lets them be. Their KV is
        computed like a prompt's, and steps under way that sample the first of them tell nothing new."""
        taken = list(forced[: sequence.max_tokens - sequence.num_output])
        sequence.tokens.extend(taken)
        sequence.timeline.tokens(len(taken), now - sequence.arrival)
        for items in self._planned.values():
            for at, (other, work) in enumerate(items):
                if other is sequence and work.sample:
                    sequence.in_flight -= 1
                    items[at] = (sequence, msgspec.structs.replace(work, sample=False))
        if sequence.status is Status.RUNNING:
            sequence.resume_at = sequence.compute_length
        return taken

    def _update(self, sequence: Sequence, work: SlotWork, result: StepResult, now: float) -> SequenceUpdate | None:
        reason = self._finish_reason(sequence, work)
        if reason is not None:
            self._finish(sequence, reason, now)
        if work.sample:
            logprob = result.logprobs.get(work.slot)
            return SequenceUpdate(sequence, [sequence.tokens[-1]], [logprob] if logprob is not None else None, reason)
        if work.score and sequence.score_start is not None:
            sequence.score_start += len(work.score)  # told: a preemption later on does not score them again
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
        if self._rotation is not None:
            self._rotation.dropped(step)
        self._loads.pop(step, None)
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
            self._leave_slot(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.table is not None:
            self._drop_table(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.finished_at = now
        sequence.stages.end(now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Room is needed: the sequence gives up its slot and blocks, to the second tier if there is room."""
        self._draft.preempted = True
        self._undraft(sequence)
        if self._rotate_out(sequence, now):
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
        item = self._draft.work.pop(sequence, None)
        if item is not None:
            sequence.scheduled = item.start
            sequence.in_flight -= item.sample
            assert sequence.table is not None
            sequence.table.sent -= len(item.new_blocks)
            self._draft.count(item, -1)
            self._draft.budget += item.length

    def _drop_broken(self, now: float) -> None:
        """A copy failed: who holds what is lost starts again, and what it has under way is not believed."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.table is None or not self._rotation or not self._rotation.is_lost(sequence.table):
                continue
            for items in self._planned.values():
                sequence.in_flight -= sum(work.sample for s, work in items if s is sequence)
                items[:] = [(s, work) for s, work in items if s is not sequence]
            self._preemptions += 1
            sequence.preemptions += 1
            self._drop_table(sequence)
            if sequence.status is Status.RUNNING:
                self._leave_slot(sequence)
                self._wait_again(sequence, now, stages.PREEMPTED)
            sequence.stages.enter(stages.PREEMPTED, now)

    def _wait_again(self, sequence: Sequence, now: float, stage: str) -> None:
        sequence.stages.enter(stage, now)
        sequence.status = Status.WAITING
        sequence.preempted_at = now
        self._waiting.add(sequence, self.rank(sequence, now))

    def _leave_slot(self, sequence: Sequence) -> None:
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
        for items in self._planned.values():
            items[:] = [(s, work) for s, work in items if s is not sequence or work.sample]
        self._kv.release(sequence.table)
        sequence.table = None
        sequence.scheduled = sequence.committed = 0
