"""How everybody stands: from promises and costs, who is kept and who is furthest ahead. NumPy; no torch.

docs/rotasched.md says why. Nothing here changes who runs: that is the policy's (`rota.py`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepLoad
from superinfer.runtime.scheduler.forecast import Forecast, changing
from superinfer.runtime.scheduler.lengths import Curve, Guess, LengthPredictor
from superinfer.runtime.scheduler.line import Line
from superinfer.runtime.scheduler.programs import Programs
from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.roster import Columns, Roster
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.scheduler.slices import Slice
from superinfer.runtime.scheduler.triage import (
    FIRST_TOKEN,
    HORIZONS,
    NOTHING,
    Demand,
    Following,
    Verdicts,
    prefill_price,
    triage_in_slices,
)

LEFTOVER_SHARE = 0.05  # of the machine's time, for leftovers however much is promised to others: nobody starves
# Steps by which a token is planned for before it is due. A request is read when the step under way is over, and waits
# for one that computes prompts; that is planned while another runs; it has more to do than this one; and its client is
# told while the next is made ready. Each is up to a step.
EARLY_STEPS = 5.0
SMOOTHING = 0.1  # weight of the newest step
FRESH_S = 0.2  # how old the curves of lengths and what is foreseen may be: both are of what has been in seconds
PRESSING_S = 1.0  # whose work must begin sooner is let in by that alone
PATIENCE_S = 30.0  # a leftover that has waited so long may displace others


class _Soon(NamedTuple):
    """Requests to come, as a `Demand` has them: its numbers, [fields, requests]; `expected`; `following`. own_s: of a
    decode of theirs, without reading its own KV."""

    table: np.ndarray
    expected: np.ndarray
    following: Following
    own_s: float


class Standing:
    """What a policy of promises knows of its sequences, as of the last look; the roster is kept up to date beside.

    programs: what callers said of calls that are part of one.
    units: what work costs now. verdicts: of the last triage. step_s: of a step, smoothed; quick_s: of one without
        prompts, the quickest that an answer can go on. promised: kept sequences, and kept_s the machine time that all
        of them still ask for.
    tightest: the shortest time between tokens that a kept resident was promised, or a step as it is now while there are
        programs; late_pace: that any resident was promised.
    hurry: the shortest time for a token that the deadline of a kept resident leaves it, and is enough as steps are now.
    asked: prompt tokens that the kept are still to compute.
    outputs: how long answers will be, of all kinds together.
    next_return: when the first of the kept that are rotated out has to be let in.
    line: who of those that wait is next.
    aged: a leftover that has waited long enough: served before all others until it ends.
    """

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost) -> None:
        self._kv, self._limits, self._cost = kv, limits, cost
        self.roster = Roster()
        self.programs = Programs()
        self.lengths = LengthPredictor()
        self.forecast = Forecast()
        self.units = cost.units()
        self.verdicts: Verdicts = NOTHING
        # Victims in no order: rows, ids, due; and of the roster's ended when the look began.
        self._ahead = np.zeros(0, dtype=np.intp), np.zeros(0), np.zeros(0), 0
        self._victims: list[Sequence] | None = None
        self.line = Line(self.roster)
        self.aged: Sequence | None = None
        self._settled = -1  # of the roster's ended when a look began that settled everything; -1: the last did not
        self._curves: dict[str | None, Curve | Guess] = {}  # by kind, and until when
        self._curves_until = self._soon_until = -math.inf
        self._soon: _Soon | None = None
        self.tightest = self.late_pace = self.hurry = math.inf
        self.next_return = math.inf
        self.promised = 0
        self.outputs: Curve | Guess = Guess()
        self.kept_s = 0.0
        self.step_s = self.quick_s = 0.02
        self._square_s = self.step_s**2
        self.asked = 0.0
        self._matmul_s = 0.0
        self._own_s = 0.0  # of a decode, without reading its own KV
        self._room = float(kv.num_blocks * kv.page_size)  # tokens of HBM for what is not common

    def observe(self, load: StepLoad, elapsed: float) -> None:
        """A step of this load took so many seconds."""
        if load.tokens and elapsed > 0.0:
            self.step_s += SMOOTHING * (elapsed - self.step_s)
            self._square_s += SMOOTHING * (elapsed**2 - self._square_s)
            self._matmul_s += SMOOTHING * (load.tokens * self.units.token_s - self._matmul_s)

    @property
    def early_s(self) -> float:
        """How much sooner than promised a token is planned for, s: EARLY_STEPS of the length that a moment falls into.

        That is above the mean: most moments fall into the long ones.
        """
        return EARLY_STEPS * self._square_s / self.step_s

    def look(self, residents: Residents, block_s: float, now: float) -> Generator[Slice, None, None]:
        """See what is lost, what is kept, and how much of the machine that asks for.

        In slices: the first takes everybody in as of `now`, the last two tell those who are still there what came of
        it. Between them anything may happen to anyone; but one look at a time: the next writes its columns where this
        one has its own.

        residents: who runs, by the time of each slice; they are told whether they are kept. block_s: of the link, for a
        block.
        """
        roster = self.roster
        yield Slice("residents", 60 + len(residents) / 20 + len(roster.live) / 100)
        self.units = units = self._cost.units()
        is_resident = np.zeros(len(roster.live), dtype=bool)
        running, context = roster.update(residents)
        is_resident[running] = True
        in_use = float(context.sum())
        self._room = self._room_now(in_use - float(roster.common[running].sum()))
        decodes_s = units.decode_s * len(running) + units.kv_s * in_use
        self.quick_s = min(self.step_s, units.weights_s + units.step_s + decodes_s)
        rows = roster.hopeful.nonzero()[0]  # who may still be kept: all below is about these
        table, kinds, names, here = roster.columns(rows), roster.kind[rows], roster.kinds, is_resident[rows]
        under_way, asked = roster.produced[roster.produced > 0.0], self.asked
        roster.fresh.clear()
        ended = roster.ended

        if now >= self._curves_until:
            self._curves_until = now + FRESH_S
            self._curves.clear()
        yield Slice("lengths and lateness", 100 + len(rows) / 20 + (0 if self._curves else 80))
        seen = Columns(*table)
        left = self._left(seen, kinds, names, under_way)
        prefill_s, link_s = units.prefill_s(seen.prefill, seen.context - seen.prefill), seen.load * block_s
        due, pace, own_s = seen.streamed(), seen.pace, left * self.step_s
        at_best, by_end = due, seen.deadline - own_s  # when the next token is due for the last to be in time
        if float(by_end.min(initial=math.inf)) < math.inf:
            at_best = np.minimum(due, seen.deadline - left * self.quick_s)
            pace, due = np.where(by_end < due, self.step_s, pace), np.minimum(due, by_end)
        if self.programs:
            ends = by_end <= due  # what is due is its end, not a stream's next token
            at_best = at_best + np.where(ends, self.programs.spread_s[rows], 0.0)
            due = np.where(ends, self.programs.wanted(rows, due, own_s, now), due)
            by_end = np.where(ends, due, by_end)
        late = at_best - now < prefill_s + link_s
        late &= ~here | (prefill_s > 0.0)
        there = self._are_there(rows, seen.id, ended)
        roster.left[rows[there]] = left[there]
        is_timed = np.isfinite(seen.base)
        due = due - self.early_s * is_timed
        fine = np.isfinite(due)
        if late.any():
            roster.give_up(rows[there][late[there]])
            fine &= ~late
        if self.programs:
            fine &= ~self.programs.are_lost(rows, (roster.live & roster.late).nonzero()[0])
        if not fine.all():
            table, is_timed = table.compress(fine, axis=1), is_timed[fine]
            seen = Columns(*table)
            rows, here, left, due, pace = rows[fine], here[fine], left[fine], due[fine], pace[fine]
            prefill_s, link_s, at_best, by_end = prefill_s[fine], link_s[fine], at_best[fine], by_end[fine]

        yield Slice("costs", 45 + len(rows) / 40)
        token_s, held = self._costs(seen.context + left / 2, seen.common)
        first = FIRST_TOKEN * (is_timed & (seen.produced == 0.0))
        demand = Demand(due - now, pace, left, prefill_s, token_s, link_s, seen.weight, first, held, held * self.step_s)
        if self.programs:
            demand = demand._replace(following=self.programs.following(rows, token_s, seen.deadline - now))
        if len(rows) and len(self.forecast):
            yield Slice("requests to come", 60 if now < self._soon_until else 180)
            demand = self._with_foreseen(demand, now)
        verdicts = yield from triage_in_slices(demand, 1.0 - LEFTOVER_SHARE)

        yield Slice("who is told", 75 + len(rows) / 40)
        self.verdicts = verdicts
        streams = verdicts.streams[: len(rows)]
        mine = np.where(seen.produced > 0.0, streams, verdicts.prefills[: len(rows)])
        if roster.ended != ended:
            there = self._are_there(rows, seen.id, ended)
            streams, mine = streams & there, mine & there
        roster.keep(rows[mine], rows[streams])
        self.promised = int(np.count_nonzero(mine))
        self.kept_s = float((prefill_s + left * token_s)[mine].sum())
        self.asked += float(seen.prefill[mine].sum()) - asked
        self._age(now)
        runs = (mine & here).nonzero()[0]
        self._ahead, self._victims = (rows[runs], seen.id[runs], due[runs], ended), None
        running = residents.rows()  # also who was let in since the look began
        paces = roster.pace[running]
        self.tightest = float(paces[roster.kept[running] & ~roster.late[running]].min(initial=math.inf))
        self.late_pace = float(paces.min(initial=math.inf))
        in_time = runs[by_end[runs] > now]
        self.hurry = self.step_s + float(((by_end[in_time] - now) / left[in_time]).min(initial=math.inf))
        if self.programs and self.hurry < math.inf:  # what a call takes, those that follow it do not have
            self.tightest = min(self.tightest, self.step_s)
        residents.tell(roster.kept)

        yield Slice("who is next", 45 + len(rows) / 20 + len(roster.live) / 100)
        waits = (mine & ~here).nonzero()[0]
        is_back = seen.load[waits] > 0.0
        together = (seen.prefill + seen.shared)[waits]
        together_s = units.prefill_s(together, seen.context[waits] - together)
        start = due[waits] - np.where(is_back, 2.0 * (link_s[waits] + self.step_s), together_s)
        last = (at_best - prefill_s - link_s)[waits]
        self.next_return = float(start[is_back].min(initial=math.inf))
        rest = roster.live & ~roster.kept  # those who have come since run already, or are new
        rest[: len(is_resident)] &= ~is_resident
        self._settled = ended if not len(waits) and streams.all() else -1
        cost_s = (together_s + (left * token_s)[waits]) / seen.weight[waits]
        turns = turn(start - now, cost_s)
        if self.programs:  # what of a program's work is one call's says little of when the program is done
            turns = np.where(self.programs.is_part[rows[waits]] > 0.0, start - now, turns)
        self.line.put(rows[waits], seen.id[waits], now + turns, last, rest.nonzero()[0])

    @property
    def is_settled(self) -> bool:
        """Whether the last look kept all that may be, they run, and nobody has come, been let in or ended since."""
        return self._settled == self.roster.ended and not self.roster.fresh

    def _are_there(self, rows: np.ndarray, ids: np.ndarray, ended: int) -> np.ndarray | slice:
        """Which of the sequences that had these rows and ids when so many had ended still have them: an index."""
        if self.roster.ended == ended:
            return slice(None)
        return self.roster.live[rows] & (self.roster.id[rows] == ids)

    def expect(self, sequence: Sequence) -> None:
        """How long the answer to a new sequence will be, until a look says so."""
        roster, row = self.roster, sequence.row
        most = roster.most[row : row + 1]
        expected = float(roster.expected[row]) or float(self.outputs.below(most)[0])
        roster.left[row] = max(1.0, min(float(most[0]), expected))

    def is_worth(self, sequence: Sequence) -> bool:
        """Whether a new sequence is worth as much for its cost as any prefill that was let go at the last look."""
        if not self.verdicts.cut or self.programs.number[sequence.row]:  # a program's worth is not that of one call
            return True
        first = FIRST_TOKEN if self.roster.base[sequence.row] < math.inf else 0.0
        prefill_s, decode_s = self.cost_of(sequence)
        return prefill_price(float(self.roster.weight[sequence.row]), first, decode_s, prefill_s) >= self.verdicts.cut

    def cost_of(self, sequence: Sequence) -> tuple[float, float]:
        """Machine time of what is left of its prefill, and of its tokens to come, as of the last look."""
        roster, row, units = self.roster, sequence.row, self.units
        left, context, prefill = float(roster.left[row]), float(roster.context[row]), float(roster.prefill[row])
        return units.prefill_s(prefill, context - prefill), left * (units.kv_s * (context + left / 2) + self._own_s)

    def _age(self, now: float) -> None:
        """The leftover whose turn it is, however much is promised to others: the oldest, if it waits since long."""
        roster = self.roster
        if self.aged is None or self.aged.status is Status.FINISHED:
            old = (roster.live & ~roster.kept & (roster.arrival <= now - PATIENCE_S)).nonzero()[0]
            self.aged = roster.sequences[old[np.argmin(roster.arrival[old])]] if len(old) else None
        if self.aged is not None:
            roster.kept[self.aged.row] = True

    def _with_foreseen(self, demand: Demand, now: float) -> Demand:
        """With what will ask for its part soon; as it was foreseen up to FRESH_S ago."""
        if now >= self._soon_until:
            self._soon_until, self._soon = now + FRESH_S, self._foresee(now)
        soon = self._soon
        if soon is None:
            return demand
        self._own_s = soon.own_s
        both = Demand(*np.concatenate([np.array(demand[:-2]), soon.table], axis=1))
        expected = np.concatenate([np.ones(len(demand.due)), soon.expected])
        if demand.following is None:
            return both._replace(expected=expected)
        pairs = zip(demand.following, soon.following, strict=True)
        return both._replace(following=Following(*map(np.concatenate, pairs)), expected=expected)

    def _foresee(self, now: float) -> _Soon | None:
        """What is thought to come; None while nothing is."""
        ahead = self.forecast.ahead(now, float(HORIZONS[-1]))
        if ahead is None:
            return None
        output = self.outputs.below(ahead.most)
        token_s, held = self._costs(ahead.context + output / 2, ahead.common)
        prefill_s = self.units.prefill_s(ahead.prompt, ahead.context - ahead.prompt)
        places = changing((prefill_s + output * token_s) / ahead.weight)
        if places is not None:
            ahead = ahead.like(places)
            output, token_s, held, prefill_s = (of[places] for of in (output, token_s, held, prefill_s))
        stream, end = ahead.at + ahead.ttft, ahead.at + ahead.deadline - output * self.step_s
        # Who is let in for want of others, and let go when they come after all, has been computed for nothing.
        more = 1.0 + _deviation(prefill_s + output * token_s, ahead.recent)
        times = ahead.times * more
        table = np.zeros((len(Demand._fields) - 2, len(output)))
        mine = Demand(*table)
        np.minimum(stream, end, out=mine.due)
        mine.pace[:] = np.where(end < stream, self.step_s, ahead.pace)
        mine.left[:], mine.held[:] = output, held
        np.multiply(prefill_s, times, out=mine.prefill_s)
        np.multiply(token_s, times, out=mine.token_s)
        np.multiply(ahead.weight, times, out=mine.worth)
        np.multiply(np.isfinite(ahead.ttft), FIRST_TOKEN, out=mine.first)
        np.multiply(held, self.step_s * times, out=mine.held_s)
        later = Following(np.zeros(len(output)), ahead.rest * token_s * times, ahead.at + ahead.deadline, ahead.rest_s)
        return _Soon(table, np.full(len(output), 1.0 / more), later, self._own_s)

    def _left(
        self, seen: Columns, kinds: np.ndarray, names: list[tuple[str, ...]], under_way: np.ndarray
    ) -> np.ndarray:
        """Tokens still to come of each, at least 1, within max_tokens.

        kinds: of each, an index into `names`. under_way: what everybody who has a token has produced.
        """
        lengths, produced, most = self.lengths, seen.produced, seen.most
        begun = produced.nonzero()[0]
        left = np.empty(len(produced))
        resolved: dict[str | None, list[int]] = {lengths.kind(()): []}
        for kind in np.bincount(kinds).nonzero()[0].tolist():
            resolved.setdefault(lengths.kind(names[kind]), []).append(kind)
        for number, (name, members) in enumerate(resolved.items()):
            if len(resolved) == 1:
                self.outputs = self._curve(name, under_way)
                left = self.outputs.below(most)
                left[begun] = self.outputs.remaining(produced[begun], most[begun], left[begun])
                continue
            is_mine = np.isin(kinds, members)
            mine, fresh = begun[is_mine[begun]], is_mine & (produced == 0.0)
            curve = self._curve(name, under_way if name == "" or not number else produced[mine])
            left[fresh] = curve.below(most[fresh])
            left[mine] = curve.remaining(produced[mine], most[mine])
            if not number:  # of all kinds together
                self.outputs = curve
        if np.count_nonzero(seen.expected):
            left = np.where(seen.expected > produced, seen.expected - produced, left)
        return np.minimum(np.maximum(left, 1.0), np.maximum(seen.most - produced, 1.0))

    def _curve(self, kind: str | None, live: np.ndarray) -> Curve | Guess:
        """See `LengthPredictor.curve`; as long as it is fresh, the same."""
        curve = self._curves.get(kind)
        if curve is None:
            curve = self._curves[kind] = self.lengths.curve(kind, live)
        return curve

    def _costs(self, context: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of sequences of so many tokens, `common` of them in blocks that others hold: the machine time of one decode,
        its own and its part of what a step costs whoever is in it; and the share that each holds by itself of the HBM
        that there is for what is not common, or of the places in a batch."""
        if not len(context):
            return context, context
        units, own = self.units, context - common
        most = self._room / max(float(self._kv.page_size), float(own.sum()) / len(own))
        places = min(self._limits.num_slots, most, float(len(context)))
        step_s = units.step_s + max(0.0, units.weights_s - self._matmul_s)
        self._own_s = own_s = units.decode_s + units.token_s + step_s / max(1.0, places)
        return units.kv_s * context + own_s, np.maximum(own / self._room, 1.0 / self._limits.num_slots)

    def _room_now(self, own: float) -> float:
        """Tokens of HBM that are not taken by what several of those that run hold. own: the others that they hold."""
        kv = self._kv
        held = float((kv.num_blocks - kv.num_available) * kv.page_size)
        return max(float(kv.page_size), kv.num_blocks * kv.page_size - max(0.0, held - own))

    def victims(self) -> list[Sequence]:
        """Kept residents of the last look, those then furthest ahead first."""
        if self._victims is None:  # seldom asked: not a part of every look
            rows, ids, due, ended = self._ahead
            order = np.argsort(-due, kind="stable")
            order = order[self._are_there(rows[order], ids[order], ended)]
            sequences = [self.roster.sequences[row] for row in rows[order].tolist()]
            self._victims = [sequence for sequence in sequences if sequence is not None]
        return self._victims


def turn(start: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """By what the kept are let in, and keep their places: when their work must begin, in `start` seconds; of those with
    time the cheapest for its worth before all that have about as much, as they double: it is the last that would be
    let go, and the first to be done. cost: seconds of the machine for all that is left, by worth.
    """
    least = np.exp2(np.floor(np.log2(np.maximum(start, PRESSING_S))))
    return np.where(start > PRESSING_S, least * (1.0 + cost / (1.0 + cost)), start)


def turn_of_one(start: float, cost: float) -> float:
    """The same of one alone, as quick as a number can be."""
    if not PRESSING_S < start < math.inf:
        return start
    return 2.0 ** math.floor(math.log2(start)) * (1.0 + cost / (1.0 + cost))


def _deviation(works: np.ndarray, count: int) -> float:
    """By how much, of itself, the work that so many requests brought is off what requests like these bring on average:
    the standard deviation of a sum of independent works, of a number that is Poisson's."""
    mean = float(works.mean())
    return math.sqrt(float((works**2).mean()) / max(count, 1)) / mean if mean > 0.0 else 0.0
