"""RotaSched: promises decide who computes and whose KV is in HBM. docs/rotasched.md says what and why."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import chain

from superinfer.runtime.kv.cache import KVCache, Prefix
from superinfer.runtime.protocol import FinishReason
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.batching import BatchScheduler
from superinfer.runtime.scheduler.cohort import Cohort
from superinfer.runtime.scheduler.cost import LEAST_OUTLIER, StepCost
from superinfer.runtime.scheduler.draft import Draft
from superinfer.runtime.scheduler.looks import Looks
from superinfer.runtime.scheduler.plan import StepPlan, StepResult
from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.sequence import Sequence, Status, StepUpdates
from superinfer.runtime.scheduler.siblings import Siblings
from superinfer.runtime.scheduler.standing import LEFTOVER_SHARE, PRESSING_S, Standing, turn_of_one

TURNS = 2.0  # a choice to rotate is worth this many times what the link needs to turn the whole pool over
BUSY = 0.7  # share of the machine's time asked for, below which, if nobody is let go, requests are taken without a look
UNSEEN = 8  # unless so many have come since the last one
MARGIN = 1.1  # times the share of a step that prefills are thought to need: what comes is not quite what was foreseen
STEP_SHARE = 0.8  # of the tightest pace of a kept resident, the longest step: predictions err
LATE_CHUNKS = 2.0  # times what its decodes take, chunks may take of a step that only late ones bound
# Sequences rotated out in one plan: one in so many that run, or LEAST_MOVED, more only for one that needs more. Each
# takes the host 0.1 to 0.2 ms, hidden behind a step that is longer the more run.
MOVED_OF, LEAST_MOVED = 64, 4
MAX_LOST = 16  # waiting sequences found too late in one plan: the others are in the next, or by a look
# Gaps between tokens that may be rotations: fewer than one in a hundred, so that a stream's 99th percentile is a step.
TURN_SHARE = 0.006
MOST_TURNS = 64.0  # that may be saved up
PRESSING_STEPS = 8  # steps before its work must begin, somebody's KV is given up for a kept request, without DRAM


class Rota(BatchScheduler):
    """Keeps as many promises as fit (`triage`), in the order in which their tokens are due, by rotating whoever is
    furthest ahead. prefix_aware: count only what of a prompt is not cached (off: for measuring what that is worth)."""

    name = "rota"

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> None:
        super().__init__(kv, limits, cost)
        self.prefix_aware = True
        self._standing = Standing(kv, limits, self.cost)
        self._roster = self._standing.roster
        self._siblings = Siblings(kv.page_size)
        self._moved = 0  # sequences displaced in the plan being made
        self._turns = MOST_TURNS  # kept streams that may be rotated out now
        self._credit = 0.0  # seconds of machine time that leftovers may use now
        self._owed_s = 0.0  # machine time that prefills are owed, where they come in few steps
        self._planned_at = 0.0
        self._room_s = math.inf  # what chunks of the plan being made may take
        self._rest = Cohort(limits.num_slots, kv.page_size)  # of leftovers; `_cohort` is of the kept
        self._residents = Residents(self._running, (self._cohort, self._rest))
        self._looks = Looks(self._standing, self._residents)

    # ------------------------------------------------------------------ requests come and go

    def add(self, sequence: Sequence) -> None:
        """See Scheduler.add."""
        known = common = 0
        if self.prefix_aware and sequence.score_start is None:
            path = self._kv.match(sequence.tokens, sequence.salt, len(sequence.tokens) - 1)
            known, common = (blocks * self._kv.page_size for blocks in (len(path), self._kv.num_held(path)))
        shared = self._siblings.join(sequence) if self.prefix_aware else 0
        known, common = max(known, shared), max(common, shared)
        self._roster.add(sequence, len(sequence.tokens) - known, shared, common)
        self._standing.expect(sequence)
        self._standing.programs.add(sequence)
        if sequence.kept and (sequence.hints is None or not sequence.hints.follows):
            self._standing.forecast.saw(sequence, len(sequence.tokens) - known, common)
        self._standing.asked += len(sequence.tokens) - known
        self._looks.arrived += 1
        if sequence.kept and not self._standing.is_worth(sequence):
            roster = self._roster
            roster.kept[sequence.row] = sequence.kept = False  # until a look has taken it in
        super().add(sequence)
        self._join(sequence)

    def overload(self, sequence: Sequence, now: float) -> float | None:
        """See Scheduler.overload. It may stay if it is kept beside all that were promised something before it.

        Where nobody runs it may in any case: it is in nobody's way, and what it takes is learnt. Another try is worth
        it once what is kept now has been computed.
        """
        roster, verdicts, slo = self._roster, self._standing.verdicts, sequence.slo
        if self.admission == "accept" or slo is None or not slo.promises_anything:
            return None
        if sequence.row in roster.fresh:  # else it came with another, for whom all have been looked at
            is_quiet = verdicts.load < BUSY and verdicts.streams.all() and sequence.kept
            is_fine = not self._running or (is_quiet and not self._is_too_late(sequence, now))
            if is_fine and self._looks.arrived < UNSEEN:
                return None
            self._look(now)
        if roster.whole[sequence.row]:
            return None
        if self.admission == "refuse":
            return max(1.0, self._standing.kept_s)
        roster.give_up(sequence.row)
        sequence.is_degraded = True
        roster.kept[sequence.row] = sequence.kept = False
        return None

    def rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """Kept before leftovers; the kept by when their work must begin, as in `turn`, the others by age."""
        if sequence is self._standing.aged:
            return (-1.0, 0.0, sequence.id)
        if not sequence.kept:
            return (1.0, sequence.arrival, sequence.id)
        start = self._start_by(sequence) - now
        if not self._standing.programs.is_part[sequence.row]:
            cost_s = sum(self._standing.cost_of(sequence)) / float(self._roster.weight[sequence.row])
            start = turn_of_one(start, cost_s)
        return (0.0, start, sequence.id)

    def _queue_key(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """By age alone: who is next is seen at each look, and costs no sequence its place in a sorted queue."""
        return (sequence.arrival, sequence.id)

    def _due(self, sequence: Sequence, early_s: float = 0.0, at_best: bool = False) -> float:
        """When a sequence's next token is due; if that is streamed, earlier by so much. A program's call that is to end
        in time is due when it had best be computed; at_best: when it may still be in time if all goes well."""
        roster, row, programs = self._roster, sequence.row, self._standing.programs
        pace, produced = float(roster.pace[row]), sequence.num_output + sequence.in_flight
        due = float(roster.base[row]) - early_s
        if produced and pace < math.inf:
            due += produced * pace
        elif produced:
            due = math.inf
        deadline = float(roster.deadline[row])
        if deadline == math.inf:
            return due
        own_s = max(1.0, float(roster.left[row])) * (self._standing.quick_s if at_best else self._standing.step_s)
        last = deadline - own_s
        if at_best:
            return min(due, last + float(programs.spread_s[row]))
        return min(due, programs.wanted_of(row, last, own_s, self._planned_at))

    def _start_by(self, sequence: Sequence) -> float:
        """When the work on a sequence's next token must begin at the latest, were it alone."""
        due = self._due(sequence, self._standing.early_s)
        if sequence.status is Status.RUNNING:
            return due
        if sequence.table is not None:  # the copies, behind as many others, and the step that notices
            return due - 2 * self._kv.blocks_for(sequence.scheduled) * self._block_s() - 2 * self._standing.step_s
        roster, row = self._roster, sequence.row
        together = float(roster.prefill[row] + roster.shared[row])
        return due - self._standing.units.prefill_s(together, float(roster.context[row]) - together)

    def _is_too_late(self, sequence: Sequence, now: float) -> bool:
        """Whether a sequence that waits could not be in time even if it were next, as a look would find."""
        roster, row = self._roster, sequence.row
        prefill = float(roster.prefill[row])
        needs_s = self._standing.units.prefill_s(prefill, float(roster.context[row]) - prefill)
        needs_s += float(roster.load[row]) * self._block_s()
        return self._due(sequence, at_best=True) - now < needs_s

    def _is_lost(self, sequence: Sequence, now: float) -> bool:
        """Whether a kept sequence that waits is too late by now; it is let go then."""
        if not self._is_too_late(sequence, now) or sequence is self._standing.aged:
            return False
        self._let_go(sequence)
        self._join(sequence)  # among the others that wait: nobody else may be left to compute for
        return True

    def _let_go(self, sequence: Sequence) -> None:
        roster, row = self._roster, sequence.row
        roster.give_up(row)
        roster.kept[row] = roster.whole[row] = sequence.kept = False
        self._part(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason | None, now: float) -> None:
        if reason in ("stop", "length"):
            kinds = self._roster.kinds[self._roster.kind[sequence.row]]
            self._standing.lengths.learn(kinds, sequence.num_output, is_cut=reason == "length")
        super()._finish(sequence, reason, now)
        self._siblings.leave(sequence)
        self._standing.programs.remove(sequence)
        self._roster.remove(sequence)

    def commit(self, result: StepResult, now: float) -> StepUpdates:
        """See Scheduler.commit."""
        self._standing.observe(self._loads[result.step], result.elapsed - result.link.stall_s)
        return super().commit(result, now)

    # ------------------------------------------------------------------ plan

    def plan(self, now: float) -> StepPlan | None:
        """See Scheduler.plan."""
        self._looks.look_on(len(self._running) + len(self._waiting), self._block_s(), now)
        if self._rotation is not None:
            self._rotation.watch(now)
        passed, self._planned_at, self._moved = max(0.0, now - self._planned_at), now, 0
        spare = max(LEFTOVER_SHARE, 1.0 - self._standing.verdicts.load) if self._standing.promised else 1.0
        self._credit = min(self._credit + spare * min(passed, 1.0), max(spare, 0.1) * 0.2)
        draft = self._draft = Draft(self._limits.max_batch_tokens)
        loose = self._residents.loose()
        kept, leftovers = [s for s in loose if s.kept], [s for s in loose if not s.kept]
        prefills = self._decode(kept, now, self._cohort)
        if (leftovers or self._rest) and (self._credit > 0.0 or not self._standing.promised):
            before = self._seconds()
            self._decode(leftovers, now, self._rest)
            self._credit -= self._seconds() - before
        self._turns = min(self._turns + TURN_SHARE * draft.decodes, MOST_TURNS)
        draft.budget = min(draft.budget, self._chunk_tokens(now, passed))
        self._prefill(prefills, now)
        self._admit_kept(now)
        self._standing.asked -= draft.prefill
        is_idle = not draft.num_sequences  # the kept wait for something: a step without work would help nobody
        if is_idle:
            self._decode(leftovers, now, self._rest)
        if (self._credit > 0.0 or not self._standing.promised or is_idle) and draft.budget > 0:
            tokens, pairs = draft.prefill, draft.pairs
            self._prefill(leftovers, now)
            self._admit_leftovers(now)
            tokens, pairs = draft.prefill - tokens, draft.pairs - pairs
            units = self._standing.units
            self._credit -= units.prefill_s(tokens) + units.pair_s * (pairs - tokens**2 / 2)
        if not draft.num_sequences and (self._looks.is_under_way or (len(self._waiting) and not self._running)):
            self._look(now)  # there is time to look at all who wait, and one of them can be computed
            self._admit_kept(now)
            self._admit_leftovers(now)
        if not draft.num_sequences and self._rotation is not None:
            self._wait_with_first(now)
        if draft.prefill:
            units = self._standing.units
            took_s = units.chunk_s(draft.prefill) + units.launch_s(draft.prefill + draft.decodes)
            self._owed_s = max(0.0, self._owed_s - took_s)
        self._draft = Draft(0)
        return self._finish_plan(draft, now)

    def _prefill(self, running: list[Sequence], now: float) -> None:
        prefills = [s for s in running if s.scheduled < s.resume_at]
        if len(prefills) > 1:
            prefills.sort(key=lambda s: self.rank(s, now))
        for sequence in prefills:
            self._continue(sequence, now)

    def _seconds(self) -> float:
        """How long the step will take as it has been drafted so far."""
        units, draft = self._standing.units, self._draft
        return (
            max(units.weights_s, units.token_s * (draft.prefill + draft.decodes))
            + units.kv_s * draft.kv_read
            + units.pair_s * draft.pairs
            + units.decode_s * draft.decodes
            + units.step_s
        )

    def _chunk_tokens(self, now: float, passed: float) -> int:
        """Prompt tokens for this step, so that prefills and decodes each get the share of time that they ask for.

        Each step gives each resident stream one token. So a long step is a slow pace: prefills get what the kept
        streams' pace leaves, or what first tokens need, if that is more and streams live on their slack. Where only
        ends are promised they come first, as more decodes make each cheaper, unless a deadline leaves its tokens less
        time than steps would take then. In every step a little, so that all steps hide the weights; but where launching
        chunks costs a step more than that saves, and more than predictions are off anyway, in few steps that are as
        full as the streams' pace allows.
        """
        standing, draft = self._standing, self._draft
        units, verdicts = standing.units, standing.verdicts
        token_s = max(units.chunk_s(1.0), 1e-12)
        self._room_s = math.inf
        if not draft.decodes:  # as many as there are, unless somebody has to be back before the step would be over
            room_s = max(standing.next_return - now, 0.0)
            return max(self._kv.page_size, int(min(draft.budget, room_s / token_s))) if room_s else draft.budget
        base_s = self._seconds()
        free_s = max(units.weights_s - units.token_s * draft.decodes, 0.0)  # hidden behind reading the weights
        share = needed = MARGIN * verdicts.prefill_load
        if standing.tightest == math.inf:
            share = max(share, 1.0 - verdicts.decodes_soon)
        elif verdicts.load < BUSY:
            share = max(share, 1.0 - verdicts.decode_load)
        share = min(share, max(needed, 1.0 - base_s / (STEP_SHARE * standing.hurry)), 0.99)
        room_s = STEP_SHARE * standing.tightest - base_s
        if room_s == math.inf:  # late as they are, somebody reads them; but who was promised what cannot be has no say
            room_s = max(STEP_SHARE * standing.late_pace - base_s, LATE_CHUNKS * base_s)
        if units.pieces_s <= max(free_s, LEAST_OUTLIER * base_s):  # so little may be learnt where it costs nothing
            chunk_s = max(min((base_s - free_s) * share / (1.0 - share), room_s), 0.0)
            tokens = max(self._kv.page_size, int(max(chunk_s, free_s) / token_s))
        else:
            tokens = self._lot(share, room_s, token_s, passed)
        self._room_s = max(room_s, tokens * token_s)
        return tokens

    def _work(self, sequence: Sequence, length: int) -> None:
        """See BatchScheduler. Far into a prompt a token takes longer: no step gets longer than streams allow for it."""
        if sequence.is_prefilling:
            token_s = self._standing.units.chunk_s(1.0, sequence.scheduled + length / 2)
            if length * token_s > self._room_s:
                length = min(length, max(self._kv.page_size, int(self._room_s / token_s)))
            self._room_s = max(0.0, self._room_s - length * token_s)
        super()._work(sequence, length)

    def _lot(self, share: float, room_s: float, token_s: float, passed: float) -> int:
        """Prompt tokens for this step if it is one of the few that have any, as prefills are owed so many; else 0.

        As many as graphs take beside the decodes; more only if their launch, kernel by kernel, costs each half of that:
        long steps are long gaps.
        """
        units, draft, asked = self._standing.units, self._draft, self._standing.asked
        least = math.ceil(units.pieces_s / token_s)  # a chunk is worth its launch
        lot = int(min(units.captured - draft.decodes, (room_s - units.pieces_s) / token_s))
        longer = int(min(draft.budget, (room_s - units.eager_s) / token_s))
        if lot < least or longer * units.pieces_s > 2 * lot * units.eager_s:
            lot = max(least, longer)
        lot_s = min(lot, max(asked, 1.0)) * token_s + units.launch_s(lot + draft.decodes)
        self._owed_s = min(self._owed_s + share * passed, max(lot_s, room_s))
        return lot if self._owed_s >= lot_s else 0

    # ------------------------------------------------------------------ who gets in

    def _waiting_kept(self, now: float) -> Iterator[Sequence]:
        """The kept that wait, whose work must begin soonest first."""
        aged, flags = self._standing.aged, self._roster.kept
        if aged is not None and aged.status is Status.WAITING:
            aged.kept = True
            yield aged
        looks = self._looks
        before = (entry for entry in self._standing.line.kept(now) if not looks.have(entry[2]))
        new = [((key[0], id, s) for key, id, s in entries if key[0] < math.inf) for entries in looks.entries()]
        for _, _, sequence in heapq.merge(before, *new) if new else before:
            if sequence.status is Status.WAITING and flags[sequence.row] and sequence is not aged:
                sequence.kept = True
                yield sequence

    def _admit_kept(self, now: float) -> None:
        """Let kept sequences in, soonest due first; for one whose turn it is, rotate out whoever is furthest ahead."""
        backs_wait, lost = False, 0
        for sequence in self._waiting_kept(now):
            if backs_wait and self._draft.budget <= 0:
                break
            if sequence.is_under_way:
                continue
            is_back = sequence.table is not None
            if (is_back and backs_wait) or (not is_back and self._draft.budget <= 0):
                continue
            if self._is_lost(sequence, now):
                lost += 1
                if lost == MAX_LOST:
                    break
                continue
            start_by = self._start_by(sequence) if sequence is not self._standing.aged else now
            if is_back and start_by > now + 2 * self._standing.step_s and not self._has_room(sequence):
                backs_wait = True  # those behind it are in less of a hurry
                continue
            if is_back and self._rotation is not None and self._rotation.backlog_s > 2 * self._standing.step_s:
                backs_wait = True
                continue
            if self._rotation is None and not self._free_slots and not self._may_displace(sequence, start_by - now):
                break  # nor for those behind it
            path = self._cached_path(sequence)
            if sequence.table is None and self.prefix_aware:
                if self._kv.is_being_computed(sequence.tokens, sequence.salt, path):
                    continue
                roster, row = self._roster, sequence.row
                roster.prefill[row] = len(sequence.tokens) - len(path) * self._kv.page_size
                roster.common[row] = self._kv.num_held(path) * self._kv.page_size
            if not (self._free_slots and self._reserve(sequence, path)) and not (
                self._displace(sequence, path, start_by - now, now) and self._reserve_anew(sequence)
            ):
                break
            self._let_in(sequence, now)

    def _admit_leftovers(self, now: float) -> None:
        """Let leftovers in, oldest first, where there is room beyond what the running may soon need."""
        if not self._free_slots:
            return
        has_displaced = False
        new = (entry[2] for entries in self._looks.entries() for entry in entries)
        for sequence in chain(self._standing.line.rest(), new):
            if self._draft.budget <= 0 or not self._free_slots:
                break
            if sequence.status is not Status.WAITING or self._roster.kept[sequence.row] or sequence.is_under_way:
                continue
            sequence.kept = False
            path = self._cached_path(sequence)
            if sequence.table is None and self._kv.is_being_computed(sequence.tokens, sequence.salt, path):
                continue
            if not self._has_room(sequence):
                if has_displaced or not self._is_for_free(sequence) or not self._displace(sequence, path, 0.0, now):
                    break
                has_displaced = True
            if not self._reserve_anew(sequence):
                break
            self._let_in(sequence, now)

    def _reserve_anew(self, sequence: Sequence) -> bool:
        """Reserve after others were rotated out: DRAM may have forgotten what of the prefix was cached until then."""
        return self._reserve(sequence, self._cached_path(sequence))

    def _is_for_free(self, sequence: Sequence) -> bool:
        """Whether a prompt can be computed while the step reads the weights anyway, as its decodes alone do not."""
        return (
            sequence.table is None
            and self._standing.units.token_s * self._draft.decodes < self._standing.units.weights_s / 2
        )

    def _let_in(self, sequence: Sequence, now: float) -> None:
        standing, roster = self._standing, self._roster
        self._waiting.remove(sequence)
        pace = float(roster.pace[sequence.row])  # which steps are to keep before a look says so
        if sequence.kept:
            standing.tightest = min(standing.tightest, pace)
        else:
            standing.late_pace = min(standing.late_pace, pace)
        roster.fresh.append(sequence.row)  # what a look under way will say of it is about one that waits
        self._draft.init.append(self._start(sequence, now))
        if self._draft.budget > 0 and self._can_wait(sequence):
            self._work(sequence, min(self._draft.budget, sequence.resume_at - sequence.scheduled))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence that is in no hurry fits, with room for those that run to grow."""
        headroom = len(self._running) // 2
        return self._kv.num_available >= self._kv.blocks_for(sequence.compute_length) + headroom

    def _displace(self, first: Sequence, path: Prefix, slack: float, now: float) -> bool:
        """Make room for `first`, whose work must begin in `slack` seconds: leftovers go, the latest first, then kept
        streams that are further ahead by more than a rotation is worth. False, and nothing done, if that is not enough.
        """
        if not self._may_displace(first, slack):
            return False
        missing = self._kv.blocks_for(first.compute_length) - self._kv.num_available
        missing -= self._kv.num_held(path if first.table is None else first.table.prefix)
        chosen: list[Sequence] = []
        for victim in self._by_dispensability(first, slack, now):
            if missing <= 0 and (chosen or self._free_slots):
                break
            if victim.status is not Status.RUNNING or victim.table is None or victim is self._standing.aged:
                continue
            if victim.let_in == now or (victim.kept and victim.is_prefilling):
                continue
            chosen.append(victim)
            missing -= self._kv.blocks_private(victim.table)
        if missing > 0 or not (chosen or self._free_slots):
            return False
        self._moved += len(chosen)
        self._turns -= sum(victim.kept for victim in chosen)
        for victim in reversed(chosen):  # a kept one first: nobody else has to go if it cannot
            self._undraft(victim)
            if not self._rotate_out(victim, now):
                if victim.kept:
                    return False
                self._preempt(victim, now)
        return True

    def _may_displace(self, first: Sequence, slack: float) -> bool:
        """Whether anybody may have to make room for `first`, whose work must begin in `slack` seconds, in this plan."""
        if slack > PRESSING_STEPS * self._standing.step_s and not self._is_worth_moving(first.compute_length):
            return False  # who goes would have to be computed again
        return self._moved < max(LEAST_MOVED, len(self._running) // MOVED_OF)

    def _by_dispensability(self, first: Sequence, slack: float, now: float) -> Iterator[Sequence]:
        """Who may make room for `first`: leftovers, then, with a second tier, kept streams far enough ahead."""
        if first.kept:
            for sequence in self._running:
                if sequence.kept and sequence.is_late and sequence is not self._standing.aged:
                    self._let_go(sequence)  # as the next look would
            yield from sorted((s for s in self._running if not s.kept), key=lambda s: (-s.arrival, s.id))
        if self._rotation is None or self._turns < 1.0:
            return
        turn_s = TURNS * self._kv.num_blocks * self._block_s()
        if slack > max(PRESSING_S, turn_s):
            return  # a place will be free before
        worth = now + max(0.0, slack) + turn_s
        for victim in self._standing.victims():  # in the order of the last look: since then all have come on alike
            if victim.kept and victim.status is Status.RUNNING:
                if self._due(victim, self._standing.early_s) <= worth:
                    break
                if self._is_worth_moving(victim.scheduled):  # else it would be computed again, and none is for choice
                    yield victim

    def _block_s(self) -> float:
        return self._rotation.block_s if self._rotation is not None else 0.0

    def _is_worth_moving(self, tokens: int) -> bool:
        """Whether moving the KV of so many tokens out and back is quicker than computing it again."""
        moved_s = 2 * self._kv.blocks_for(tokens) * self._block_s()
        return self._rotation is not None and moved_s <= self._standing.units.prefill_s(float(tokens))

    # ------------------------------------------------------------------ triage

    def _look(self, now: float) -> None:
        """Triage, all of it: who is kept from now on."""
        self._looks.look(self._block_s(), now)

    def _wait_again(self, sequence: Sequence, now: float, stage: str) -> None:
        super()._wait_again(sequence, now, stage)
        self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        is_kept = self._roster.kept[sequence.row]
        self._looks.join(sequence, (self._start_by(sequence),) if is_kept else (math.inf, sequence.arrival))

    def _rotate_out(self, sequence: Sequence, now: float) -> bool:
        """See BatchScheduler. DRAM that is full of leftovers makes room for who is kept: the latest is forgotten."""
        if not self._is_worth_moving(sequence.scheduled):
            return False
        roster, row = self._roster, sequence.row
        roster.produced[row] = sequence.num_output + sequence.in_flight
        roster.context[row] = sequence.length
        roster.prefill[row] = max(0, sequence.resume_at - sequence.scheduled)
        roster.load[row] = self._kv.blocks_for(sequence.scheduled)
        while not super()._rotate_out(sequence, now):
            parked = (
                [s for s in self._waiting if s.table is not None and not roster.kept[s.row]] if sequence.kept else []
            )
            if self._rotation is None or not parked:
                return False
            latest = max(parked, key=lambda s: (s.arrival, s.id))
            self._preemptions += 1
            latest.preemptions += 1
            self._drop_table(latest)
        return True

    def _drop_table(self, sequence: Sequence) -> None:
        super()._drop_table(sequence)
        roster, row = self._roster, sequence.row
        roster.load[row], roster.prefill[row] = 0, sequence.compute_length
