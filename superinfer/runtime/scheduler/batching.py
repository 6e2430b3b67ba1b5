"""Continuous batching with chunked prefill over the paged cache: the mechanics that simple policies share.

A policy is an order, `rank`: running sequences are served in it, waiting ones let in by it, and when blocks run out
the last of the running gives its own up (its computed prefix stays cached while nobody needs the room). With a second
tier it gives them up to that: see docs/duplexkv.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from superinfer.runtime.kv.cache import NO_PREFIX, Prefix
from superinfer.runtime.kv.copies import NO_COPIES
from superinfer.runtime.scheduler import stages
from superinfer.runtime.scheduler.cohort import Cohort
from superinfer.runtime.scheduler.draft import Draft
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan
from superinfer.runtime.scheduler.results import Results
from superinfer.runtime.scheduler.sequence import Sequence, Status

# Waiting sequences looked at in one step: a long queue behind one prefix that is being computed costs no more.
MAX_LOOKED_AT = 256
# A prompt that one step can take whole is not begun in what is left of a step, if that is less than this share of it:
# steps take as long as they have tokens, so that those in front end sooner and it ends no later.
LEAST_LEFT = 0.25
LEAST_COHORT = 32  # decodes, of which arrays are quicker than each for itself, even where some come and go


class BatchScheduler(Results):
    """Implements `Scheduler` for policies that are an order.

    headroom: free blocks for each running sequence that are left when another is let in: the one that it fills next.
    least_cohort: of fewer sequences no cohort is made, and it falls apart below half of it.
    """

    headroom = 1
    least_cohort = LEAST_COHORT

    # ------------------------------------------------------------------ plan

    def plan(self, now: float) -> StepPlan | None:
        """See Scheduler.plan."""
        draft = self._draft = Draft(self._limits.max_batch_tokens)
        if self._rotation is not None:
            self._rotation.watch(now)
        self._make_room(now)
        # Every decode takes one token of the budget before any prefill chunk takes the rest.
        prefills = self._decode(self._loose(), now, self._cohort)
        if len(prefills) > 1:
            prefills.sort(key=lambda s: self.rank(s, now))
        for sequence in prefills:
            self._continue(sequence, now)
        # What was preempted for others would come straight back; but where nobody else computes, someone must.
        if draft.budget > 0 and self._free_slots and not (draft.preempted and draft.num_sequences):
            self._admit(now)
        if not draft.num_sequences and self._rotation is not None:
            self._wait_with_first(now)
        self._draft = Draft(0)
        return self._finish_plan(draft, now)

    def _note_copy_waits(self, draft: Draft, now: float) -> None:
        """Who has a slot and no work in this plan for want of copies is waiting for them; the others are not."""
        if self._rotation is None or (draft.num_sequences == len(self._running) and not self._copy_waiting):
            return
        waiting, drafted = [], {step.cohort for step in draft.cohorts}  # with all their members
        for sequence in self._running:
            if sequence.cohort in drafted or sequence in draft.work or sequence.table is None:
                continue
            if self._rotation.kv.awaits(sequence.table):
                sequence.stages.enter(stages.COPY_WAIT, now)
                waiting.append(sequence)
        for sequence in self._copy_waiting:
            if sequence.status is Status.RUNNING and sequence not in waiting:
                sequence.stages.work(now)
        self._copy_waiting = waiting

    def _wait_with_first(self, now: float) -> None:
        """All that run wait for copies: the step waits with the first of them."""
        self._draft.patient = True
        for sequence in sorted(self._running, key=lambda s: self.rank(s, now)):
            if not self._draft.num_sequences:
                self._part(sequence)
                self._decode([sequence], now)
                self._continue(sequence, now)

    def _make_room(self, now: float) -> None:
        """For policies that rotate by choice: called before each plan."""

    def _finish_plan(self, draft: Draft, now: float) -> StepPlan | None:
        self._note_copy_waits(draft, now)
        copies = NO_COPIES
        if self._rotation is not None and self._returns is not None:
            self._returns.bring_back(now, self._rotation.background_blocks)
            copies = self._rotation.copies_of_plan(expected=len(self._returns) > 0)
        decodes = draft.all_decodes()
        if not draft.work and not len(decodes) and not copies:
            for step in draft.cohorts:  # of which nobody is left
                step.cohort.dissolve()
            draft.cohorts.clear()
            if self._rotation is None or self._planned or not self._rotation.kv.num_pending:
                return None
            if self._running or self._waiting:  # nothing to do but wait for copies
                draft.waits = {self._rotation.kv.oldest_pending}
        self._step += 1
        self._planned[self._step] = draft.work
        if draft.cohorts:
            self._cohort_steps[self._step] = draft.cohorts
        self._loads[self._step] = load = draft.load
        freed, self._freed = tuple(self._freed), []
        others, waits = tuple(draft.work.values()), tuple(sorted(draft.waits))
        plan = StepPlan(self._step, others, tuple(draft.init), freed, copies, waits, decodes)
        if self._rotation is not None:
            self._rotation.planned(self._step, load.tokens, load.decodes)
        return plan

    def _decode(self, sequences: list[Sequence], now: float, cohort: Cohort | None = None) -> list[Sequence]:
        """One token for every running sequence that is past its prefill, while the budget lasts. Returns the others.

        sequences: of no cohort. cohort: decode its members too; whoever can joins it. The others' loop is
        spelled out, with the fewest reads that will do.
        The order matters only if the budget cannot serve all. Should blocks run out, the last in rank gives its own up
        whoever asked first.
        """
        if not sequences and not cohort:
            return []
        draft, page_size, is_tiered = self._draft, self._kv.page_size, self._rotation is not None
        if cohort is not None:
            sequences = self._decode_cohort(cohort, sequences, now)
        if len(sequences) > draft.budget:
            sequences.sort(key=lambda s: self.rank(s, now))
        work, prefills, count, kv_read, budget = draft.work, [], 0, 0, draft.budget
        for sequence in sequences:
            start = sequence.own_scheduled
            if start < sequence.resume_at:
                prefills.append(sequence)
                continue
            slot = sequence.slot
            if slot < 0 or start >= sequence.last_position:
                continue  # lost its place to one before it in this loop, or all its tokens are planned
            if count >= budget:
                break
            new_blocks: tuple[int, ...] = ()
            if start % page_size == 0 or (is_tiered and sequence.table.awaits):  # type: ignore[union-attr]
                draft.count_decodes(count, kv_read)
                grown = self._next_block(sequence, now)
                count, kv_read, budget = 0, 0, draft.budget
                if grown is None:
                    continue
                new_blocks = grown
            sequence.own_scheduled = start = start + 1
            sequence.own_in_flight += 1
            work[sequence] = SlotWork(slot, start - 1, 1, (), new_blocks, True)
            count += 1
            kv_read += start
        draft.count_decodes(count, kv_read)
        return prefills

    def _loose(self) -> list[Sequence]:
        """Those that run and are in no cohort."""
        return [s for s in self._running if s.cohort is None] if len(self._cohort) < len(self._running) else []

    def _decode_cohort(self, cohort: Cohort, sequences: list[Sequence], now: float) -> list[Sequence]:
        """One token for each member of `cohort`, after those of `sequences` that can have joined. Returns the others.

        Where the budget may not serve all, or they are few, nobody is a member. Members that begin a block are looked
        at: one that cannot get it, or has to wait for copies, leaves; so does one whose last token this is.
        """
        draft, most = self._draft, len(cohort) + len(sequences)
        if most > draft.budget or most < (self.least_cohort // 2 if len(cohort) else self.least_cohort):
            members = list(cohort.members.values())
            for member in members:
                cohort.leave(member)
            return members + sequences
        rest = []
        for sequence in sequences:
            if sequence.may_join and self._can_join(sequence):
                cohort.join(sequence)
            else:
                rest.append(sequence)
        if not len(cohort):
            return rest
        ends, begin = cohort.due()
        for sequence in ends:
            cohort.leave(sequence)
            rest.append(sequence)
        grown: dict[Sequence, tuple[int, ...]] = {}
        kv, page_size, at, is_tiered = self._kv, self._kv.page_size, cohort.planned, self._rotation is not None
        for sequence in begin:
            if sequence.cohort is not cohort:
                continue  # ends, or has given its place up to one before it
            table = sequence.table
            assert table is not None
            held = len(table.blocks)
            is_plain = table.sent == held and held * page_size == sequence.own_scheduled + at
            new = kv.allocate(table, 1) if is_plain else None
            if new is not None and not (is_tiered and table.awaits):  # type: ignore[attr-defined]
                table.sent = held + 1
                grown[sequence] = tuple(new)
                continue
            new_blocks = self._next_block(sequence, now)
            if new_blocks is None:
                self._part(sequence)
            elif is_tiered and table.awaits:  # type: ignore[attr-defined]
                cohort.leave(sequence)
                start = sequence.own_scheduled
                sequence.own_scheduled, sequence.own_in_flight = start + 1, sequence.own_in_flight + 1
                draft.work[sequence] = SlotWork(sequence.slot, start, 1, (), new_blocks, True)
                draft.count_decodes(1, start + 1)
            else:
                grown[sequence] = new_blocks
        if len(cohort):
            draft.count_decodes(len(cohort), cohort.kv_read)
            stay = {s: blocks for s, blocks in grown.items() if s.cohort is cohort}  # some made room for those after
            draft.cohorts.append(cohort.plan(stay, draft.work))
        return rest

    def _can_join(self, sequence: Sequence) -> bool:
        """Whether all that it needs in the steps to come is a token in each."""
        start, table = sequence.own_scheduled, sequence.table
        return (
            sequence.slot >= 0
            and sequence.resume_at <= start < sequence.last_position - 1
            and sequence.own_timeline.count > 0
            and sequence.untold == 0
            and (self._rotation is None or not table.awaits)  # type: ignore[union-attr]
        )

    def _next_block(self, sequence: Sequence, now: float) -> tuple[int, ...] | None:
        """What a decode's table has grown by, at the first position of a block; None if it cannot be computed now."""
        draft, rotation, table = self._draft, self._rotation, sequence.table
        assert table is not None
        if not self._can_wait(sequence) or not self._grow(sequence, sequence.scheduled + 1, now):
            return None
        new_blocks: tuple[int, ...] = ()
        if table.sent < len(table.blocks):
            if not self._can_wait(sequence):
                return None
            new_blocks = tuple(table.blocks[table.sent :])
            table.sent = len(table.blocks)
        if rotation is not None:
            draft.waits.update(rotation.kv.awaits(table))
        return new_blocks

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
            whole = self._limits.max_batch_tokens - len(self._running)  # what the next step has for prompts at least
            if draft.budget < LEAST_LEFT * whole and draft.budget < self._missing(sequence, path) <= whole:
                break
            if not self._leaves_room(sequence, path) or not self._reserve(sequence, path):
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

    def _cached_path(self, sequence: Sequence) -> Prefix:
        """What of a sequence's prefix is cached and worth using. Empty for a rotated-out one: it has its own."""
        if sequence.table is not None:
            assert self._rotation is not None
            if not self._rotation.is_lost(sequence.table):
                return NO_PREFIX
            self._drop_table(sequence)
        limit = len(sequence.tokens) - 1 if sequence.score_start is None else sequence.score_start - 1
        path = self._kv.match(sequence.tokens, sequence.salt, limit)
        return path if self._rotation is None else self._rotation.worth_loading(path)

    def _missing(self, sequence: Sequence, path: Prefix) -> int:
        """Tokens that are to be computed before the next one is sampled. path: of its prefix, where it has no table."""
        there = sequence.scheduled if sequence.table is not None else len(path) * self._kv.page_size
        return sequence.compute_length - there

    def _leaves_room(self, sequence: Sequence, path: Prefix) -> bool:
        """Whether those that run can still grow once a sequence is let in. Who must go for want of room is computed
        again, and that costs more than a place left empty; where it moves to the second tier instead, it does not."""
        if self._rotation is not None and self._rotation.is_quick:
            return True
        held = path if sequence.table is None else sequence.table.prefix
        wanted = self._kv.blocks_for(sequence.compute_length) - self._kv.num_held(held)
        return self._kv.num_available >= wanted + self.headroom * len(self._running)

    def _reserve(self, sequence: Sequence, path: Prefix) -> bool:
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
        sequence.resume_at, sequence.committed = sequence.compute_length, sequence.scheduled
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
