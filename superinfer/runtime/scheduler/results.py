"""What comes of a step: tokens told, full blocks put into the tree, sequences ended. The same for all policies.

A sequence whose logits are no numbers fails alone, and no block that may be why is found again: a prompt's blocks are
shared as soon as they are computed, but only logits say whether what was computed are numbers. So a block is proven
when a position that attends to it has given logits that are, and who fails takes what is not proven of its prefix out
of the tree.
"""

from __future__ import annotations

import msgspec

from superinfer.runtime.protocol import FinishReason
from superinfer.runtime.scheduler.cohort import CohortStep
from superinfer.runtime.scheduler.places import Places
from superinfer.runtime.scheduler.plan import SlotWork, StepResult
from superinfer.runtime.scheduler.sequence import Sequence, SequenceUpdate, Status, StepUpdates

RUNNING, FINISHED = Status.RUNNING, Status.FINISHED  # looked up for every token


class Results(Places):
    """Takes in the results of steps that were planned, oldest first."""

    def commit(self, result: StepResult, now: float) -> StepUpdates:
        """See Scheduler.commit."""
        load = self._loads.pop(result.step)
        if load.tokens:
            self.cost.observe(load, result.elapsed - result.link.stall_s)
        if self._rotation is not None and self._rotation.settle(result):
            self._drop_broken(now)
        planned = self._planned.pop(result.step)
        cohorts = [step for step in self._cohort_steps.pop(result.step, ()) if not step.is_void]
        if result.link.stall_s > 0.0:
            for sequence in planned:
                sequence.stages.stalled(result.link.stall_s, now)
            for sequence in (s for step in cohorts for s in step.sequences if step.has(s)):
                sequence.stages.stalled(result.link.stall_s, now)
        sequences, told = self._commit_cohorts(cohorts, result, now)
        updates: list[SequenceUpdate] = []
        not_finite: list[Sequence] = []
        tokens, forced = result.tokens, result.forced
        page_size, is_plain = self._kv.page_size, not result.logprobs and not result.not_finite
        for sequence, work in planned.items():
            if work.tokens or not is_plain or not work.sample or work.slot in forced:
                if work.slot in result.not_finite:
                    sequence.in_flight -= work.sample
                    sequence.untold -= work.is_untold
                    if sequence.status is not FINISHED:
                        not_finite.append(sequence)
                    continue
                update = self._commit_work(sequence, work, result, now)
                if update is not None:
                    updates.append(update)
                continue
            # Its own state, though it may have joined a cohort since: that knows of later steps only.
            sequence.own_in_flight -= 1
            status = sequence.status
            if status is FINISHED:
                continue
            token = tokens[work.slot]
            sequence.own_tokens.append(token)
            sequence.own_timeline.tokens(1, now - sequence.arrival)
            end = work.start + 1
            if end % page_size == 0 and status is RUNNING:  # a block is full
                self._kv.commit(sequence.table, sequence.own_tokens, end)  # type: ignore[arg-type]
            reason: FinishReason | None = None
            if end >= sequence.last_position or token in sequence.stop_ids:
                reason = self._finish_reason(sequence, work)
                if reason is not None:
                    self._finish(sequence, reason, now)
            updates.append(SequenceUpdate(sequence, [token], None, reason))
        for sequence in not_finite:
            self._finish(sequence, None, now)
        for sequence in not_finite:
            self._forget_suspect(sequence, now)
        return StepUpdates(sequences, told, updates, not_finite)

    def _forget_suspect(self, failed: Sequence, now: float) -> None:
        """The logits of `failed` were no numbers: what is not proven of its prefix leaves the tree. Who shares that
        starts again without it."""
        node = self._kv.unproven(failed.tokens, failed.salt)
        if node is None:
            return
        for other in [*self._running, *self._waiting]:
            if other.table is not None and node in other.table.node.path():
                self._restart(other, now)
        self._kv.forget(node)

    def _commit_cohorts(
        self, steps: list[CohortStep], result: StepResult, now: float
    ) -> tuple[list[Sequence], list[int]]:
        """(sequences that got a token and nothing else, those tokens). The others leave, their tokens in
        `result.tokens`."""
        all_sequences: list[Sequence] = []
        all_tokens: list[int] = []
        first = 0
        for step in steps:
            count = len(step.slots)
            decoded = result.decoded
            tokens = step.tokens(result.tokens) if decoded is None else decoded[first : first + count]
            first += count
            for slot in (*result.forced, *result.logprobs, *result.not_finite):
                sequence = step.cohort.members.get(slot)
                if sequence is not None and step.has(sequence):
                    self._part(sequence)
            if len(step.stops):
                for at in (tokens == step.stops).any(axis=0).nonzero()[0].tolist():
                    if step.has(step.sequences[at]):
                        self._part(step.sequences[at])
            sequences, told = step.sequences, tokens.tolist()
            if step.gone:
                stay = step.stay()
                gone = ~stay
                result.tokens.update(zip(step.slots[gone].tolist(), tokens[gone].tolist(), strict=True))
                sequences = [sequence for sequence, stays in zip(sequences, stay.tolist(), strict=True) if stays]
                told = tokens[stay].tolist()
            for sequence in step.cohort.commit(step, tokens, now):
                assert sequence.table is not None
                self._kv.commit(sequence.table, sequence.own_tokens, step.index + 1 + sequence.own_scheduled)
            all_sequences = all_sequences + sequences if all_sequences else sequences
            all_tokens += told
        return all_sequences, all_tokens

    def _commit_work(self, sequence: Sequence, work: SlotWork, result: StepResult, now: float) -> SequenceUpdate | None:
        """What came of a prefill chunk, of a step with logprobs, or of a token that others must follow."""
        if work.sample:
            sequence.in_flight -= 1
        elif work.is_untold:
            sequence.untold -= 1
        if sequence.status is FINISHED:
            return None
        followed: list[int] = []
        if work.sample:
            token = result.tokens[work.slot]
            sequence.tokens.append(token)
            sequence.timeline.tokens(1, now - sequence.arrival)
            if sequence.timeline.count == 1:
                sequence.stages.first_token(now)
            if work.slot in result.forced:
                followed = self._follow(sequence, result.forced[work.slot], now)
        table = sequence.table
        if table is not None:
            sequence.committed = committed = work.start + work.length
            is_proven = not work.tokens or work.sample or bool(work.score)
            if work.tokens and is_proven:
                self._kv.prove(table)
            if sequence.status is RUNNING:
                if committed >= (table.num_cached + 1) * self._kv.page_size:  # a block is full
                    self._kv.commit(table, sequence.tokens, committed, is_proven=is_proven)
                if sequence.scheduled < sequence.resume_at:
                    self._kv.announce(table, sequence.tokens)
        if not followed:
            return self._update(sequence, work, result, now)
        reason: FinishReason | None = "length" if sequence.num_output >= sequence.max_tokens else None
        if reason is not None:
            self._finish(sequence, reason, now)
        return SequenceUpdate(sequence, [token, *followed], None, reason)

    def _follow(self, sequence: Sequence, forced: tuple[int, ...], now: float) -> list[int]:
        """Take tokens that a grammar forces as known; returns them, as far as max_tokens lets them be. Their KV is
        computed like a prompt's, and steps under way that sample the first of them tell nothing new."""
        self._part(sequence)
        taken = list(forced[: sequence.max_tokens - sequence.num_output])
        sequence.tokens.extend(taken)
        sequence.timeline.tokens(len(taken), now - sequence.arrival)
        for planned in self._planned.values():
            work = planned.get(sequence)
            if work is not None and work.sample:
                sequence.in_flight -= 1
                if sequence.table is None:  # given up: what they compute is no part of the table it will have next
                    del planned[sequence]
                else:
                    planned[sequence] = msgspec.structs.replace(work, sample=False)
                    sequence.untold += 1
        if sequence.status is RUNNING:
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
        for part in self._cohort_steps.pop(step, ()):
            part.cohort.dissolve()
        for sequence, work in self._planned.pop(step, {}).items():
            sequence.in_flight -= work.sample
            sequence.untold -= work.is_untold
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, None, now)
                lost.append(sequence)
        return lost
