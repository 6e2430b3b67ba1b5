"""How everybody stands: from promises and costs, who is kept and who is furthest ahead. NumPy; no torch.

docs/rotasched.md says why. Nothing here changes who runs: that is the policy's (`rota.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepLoad
from superinfer.runtime.scheduler.forecast import Forecast
from superinfer.runtime.scheduler.lengths import LengthPredictor
from superinfer.runtime.scheduler.programs import Programs
from superinfer.runtime.scheduler.roster import Roster
from superinfer.runtime.scheduler.sequence import Sequence, Status
from superinfer.runtime.scheduler.triage import FIRST_TOKEN, HORIZONS, NOTHING, Demand, Following, Verdicts, triage

LEFTOVER_SHARE = 0.05  # of the machine's time, for leftovers however much is promised to others: nobody starves
# Steps by which a token is planned for before it is due. A request is read when the step under way is over, and waits
# for one that computes prompts; that is planned while another runs; it has more to do than this one; and its client is
# told while the next is made ready. Each is up to a step.
EARLY = 5.0
SMOOTHING = 0.1  # weight of the newest step
PATIENCE_S = 30.0  # a leftover that has waited so long may displace others
HEAD = 256  # of those who wait, so many are next: more are not looked at before the next look


class Standing:
    """What a policy of promises knows of its sequences, as of the last look; the roster is kept up to date beside.

    programs: what callers said of calls that are part of one.
    units: what work costs now. verdicts: of the last triage. step_s: of a step, smoothed. promised: kept sequences, and
    kept_s the machine time that all of them still ask for. tightest: pace of the kept residents that promise most.
    asked: prompt tokens that the kept are still to compute.
    mean_output: tokens that a request without any is expected to have.
    victims: kept residents, those furthest ahead first: when their next token is due, and who they are.
    next_return: when the first of the kept that are rotated out has to be let in.
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
        self.victims: tuple[np.ndarray, list[Sequence | None]] = (np.zeros(0), [])
        self._next_kept: tuple[list[float], list[float], list[int]] = ([], [], [])  # start, id, row
        self._next_rest: list[int] = []
        self.aged: Sequence | None = None
        self.tightest = math.inf
        self.next_return = math.inf
        self.promised = 0
        self.mean_output = 1.0
        self.kept_s = 0.0
        self.step_s = 0.02
        self._square_s = self.step_s**2
        self.asked = 0.0
        self._matmul_s = 0.0

    def observe(self, load: StepLoad, elapsed: float) -> None:
        """A step of this load took so many seconds."""
        if load.tokens and elapsed > 0.0:
            self.step_s += SMOOTHING * (elapsed - self.step_s)
            self._square_s += SMOOTHING * (elapsed**2 - self._square_s)
            self._matmul_s += SMOOTHING * (load.tokens * self.units.token_s - self._matmul_s)

    @property
    def early_s(self) -> float:
        """How much sooner than promised a token is planned for, s: EARLY steps of the length that a moment falls into.

        That is above the mean: most moments fall into the long ones.
        """
        return EARLY * self._square_s / self.step_s

    def look(self, residents: list[Sequence], block_s: float, now: float) -> None:
        """See what is lost, what is kept, and how much of the machine that asks for.

        residents: who runs; they are told whether they are kept. block_s: seconds of the link for a block.
        """
        self.units = units = self._cost.units()
        roster = self.roster
        running = np.array([s.row for s in residents], dtype=np.intp)
        roster.update(residents, running)
        live = np.flatnonzero(roster.live)
        is_resident = np.zeros(len(roster.live), dtype=bool)
        is_resident[running] = True
        produced = roster.produced[live]
        # Whoever may still be kept: all below is about these.
        rows = live[~roster.late[live] & np.isfinite(np.minimum(roster.base[live], roster.deadline[live]))]
        roster.left[rows] = left = self._left(rows, produced)
        due, pace = roster.due(rows, left, self.step_s)
        early = np.where(np.isfinite(roster.base[rows]), self.early_s, 0.0)
        prefill_s, link_s = units.prefill_s(roster.prefill[rows]), roster.load[rows] * block_s
        here = is_resident[rows]
        needs_s = np.where(here, np.where(prefill_s > 0.0, prefill_s, -np.inf), prefill_s + link_s)
        late = due - now < needs_s
        if self.programs:
            own_s = left * self.step_s
            ends = roster.deadline[rows] - own_s <= due  # what is due is its end, not a stream's next token
            late = due - now + np.where(ends, self.programs.spread_s[rows], 0.0) < needs_s  # even if it goes well
            due = np.where(ends, self.programs.wanted(rows, due, own_s, now), due)
        roster.late[rows[late]] = True
        if self.programs:
            late |= self.programs.are_lost(rows, live[roster.late[live]])
        due = due - early
        fine = ~late & np.isfinite(due)
        rows, left, due, pace, here = rows[fine], left[fine], due[fine], pace[fine], here[fine]
        prefill_s, link_s = prefill_s[fine], np.where(here, 0.0, link_s[fine])
        produced = roster.produced[rows]
        context = roster.context[rows] + left / 2
        token_s = self._token_s(context)
        first = np.where((produced == 0) & np.isfinite(roster.base[rows]), FIRST_TOKEN, 0.0)
        held, weight = self._held(context), roster.weight[rows]
        demand = Demand(due - now, pace, left, prefill_s, token_s, link_s, weight, first, held, held * self.step_s)
        if self.programs:
            demand = demand._replace(following=self.programs.following(rows, token_s, roster.deadline[rows] - now))
        self.verdicts = verdicts = triage(self._with_foreseen(demand, now), 1.0 - LEFTOVER_SHARE)
        streams, prefills = verdicts.streams[: len(rows)], verdicts.prefills[: len(rows)]
        mine = np.where(produced > 0, streams, prefills)
        were_kept = roster.kept[running]
        roster.whole[:] = roster.kept[:] = False
        roster.kept[rows], roster.whole[rows] = mine, streams
        self.promised = int(mine.sum())
        self.kept_s = float((prefill_s + left * token_s)[mine].sum())
        self._age(live, now)
        now_kept = roster.kept[running]
        for at in np.flatnonzero(now_kept != were_kept).tolist():
            residents[at].kept = bool(now_kept[at])
        self._order_victims(rows[mine & here], due[mine & here], pace[mine & here])
        waits = mine & ~here
        self.asked = float(roster.prefill[rows[mine]].sum())
        together_s = units.prefill_s(roster.prefill[rows] + roster.shared[rows])
        start = due - np.where(roster.load[rows] > 0.0, 2.0 * (link_s + self.step_s), together_s)
        self.next_return = float(start[waits & (roster.load[rows] > 0.0)].min(initial=math.inf))
        self._line_up(rows[waits], start[waits], live[~roster.kept[live] & ~is_resident[live]])

    def _age(self, live: np.ndarray, now: float) -> None:
        """The leftover whose turn it is, however much is promised to others: the oldest, if it waits since long."""
        roster = self.roster
        if self.aged is None or self.aged.status is Status.FINISHED:
            old = live[~roster.kept[live] & (roster.arrival[live] <= now - PATIENCE_S)]
            self.aged = roster.sequences[old[np.argmin(roster.arrival[old])]] if len(old) else None
        if self.aged is not None:
            roster.kept[self.aged.row] = True

    def _line_up(self, kept: np.ndarray, start: np.ndarray, rest: np.ndarray) -> None:
        """Note who is next: of the rows of the kept that wait, and of all others'."""
        roster = self.roster
        if len(kept) > HEAD:
            first = np.argpartition(start, HEAD)[:HEAD]
            kept, start = kept[first], start[first]
        order = np.lexsort((roster.id[kept], start))
        kept = kept[order]
        self._next_kept = start[order].tolist(), roster.id[kept].tolist(), kept.tolist()
        if len(rest) > HEAD:
            rest = rest[np.argpartition(roster.arrival[rest], HEAD)[:HEAD]]
        self._next_rest = rest[np.lexsort((roster.id[rest], roster.arrival[rest]))].tolist()

    def next_kept(self) -> Iterator[tuple[float, float, Sequence]]:
        """Who of the kept that waited at the last look is next: when its work must begin, its id, itself; at most HEAD.

        A row that has been given to another since then yields that one.
        """
        sequences = self.roster.sequences
        for start, id, row in zip(*self._next_kept, strict=True):
            sequence = sequences[row]
            if sequence is not None:
                yield start, id, sequence

    def next_rest(self) -> Iterator[Sequence]:
        """Who of the others is next: the oldest, at most HEAD. As `next_kept`."""
        sequences = self.roster.sequences
        for row in self._next_rest:
            sequence = sequences[row]
            if sequence is not None:
                yield sequence

    def _with_foreseen(self, demand: Demand, now: float) -> Demand:
        """With what will ask for its part soon."""
        ahead = self.forecast.ahead(now, float(HORIZONS[-1]))
        if ahead is None or not len(demand.due):
            return demand
        output = np.minimum(ahead.most, self.mean_output)
        stream, end = ahead.at + ahead.ttft, ahead.at + ahead.deadline - output * self.step_s
        context = ahead.prompt + output / 2
        token_s = self._token_s(context)
        times = ahead.times
        more = Demand(
            np.minimum(stream, end),
            np.where(end < stream, self.step_s, ahead.pace),
            output,
            self.units.prefill_s(ahead.prompt) * times,
            token_s * times,
            np.zeros(len(token_s)),
            ahead.weight * times,
            np.where(np.isfinite(ahead.ttft), FIRST_TOKEN, 0.0),
            self._held(context),
            self._held(context) * self.step_s * times,
        )
        both = Demand._make([*(np.concatenate(pair) for pair in zip(demand[:-1], more[:-1], strict=True)), None])
        if demand.following is None:
            return both
        later = Following(np.zeros(len(token_s)), ahead.rest * token_s * times, ahead.at + ahead.deadline, ahead.rest_s)
        pairs = zip(demand.following, later, strict=True)
        return both._replace(following=Following(*(np.concatenate(pair) for pair in pairs)))

    def _left(self, rows: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Tokens still to come of each row, at least 1, within max_tokens. live: what everybody has produced."""
        roster, lengths = self.roster, self.lengths
        produced, kinds = roster.produced[rows], roster.kind[rows]
        left = np.empty(len(rows))
        resolved: dict[str | None, list[int]] = {lengths.kind(()): []}
        for kind in np.flatnonzero(np.bincount(kinds)).tolist():
            resolved.setdefault(lengths.kind(roster.kinds[kind]), []).append(kind)
        for number, (name, members) in enumerate(resolved.items()):
            mine = slice(None) if len(members) == len(roster.kinds) else np.isin(kinds, members)
            ages = produced[mine]
            if number:
                left[mine] = lengths.remaining(name, ages, live if name == "" else ages)
            else:  # of all kinds together, and a request without any token is one of them
                of_all = lengths.remaining(name, np.append(ages, 0.0), live)
                left[mine], self.mean_output = of_all[:-1], float(of_all[-1])
        expected = roster.expected[rows]
        left = np.where(expected > produced, expected - produced, left)
        return np.clip(left, 1.0, np.maximum(1.0, roster.most[rows] - produced))

    def _token_s(self, context: np.ndarray) -> np.ndarray:
        """Machine time of one decode: its own, and its part of what a step costs whoever is in it."""
        units = self.units
        if not len(context):
            return np.zeros(0)
        blocks = max(1.0, float(context.mean()) / self._kv.page_size)
        places = min(self._limits.num_slots, self._kv.num_blocks / blocks, float(len(context)))
        step_s = units.step_s + max(0.0, units.weights_s - self._matmul_s)
        return units.kv_s * context + units.decode_s + units.token_s + step_s / max(1.0, places)

    def _held(self, context: np.ndarray) -> np.ndarray:
        """Share of HBM, or of the places in a batch, that sequences of so many tokens hold."""
        return np.maximum(context / (self._kv.num_blocks * self._kv.page_size), 1.0 / self._limits.num_slots)

    def _order_victims(self, rows: np.ndarray, due: np.ndarray, pace: np.ndarray) -> None:
        order = np.argsort(-due, kind="stable")
        sequences = self.roster.sequences
        self.victims = due[order], [sequences[row] for row in rows[order].tolist()]
        self.tightest = float(pace.min()) if len(pace) else math.inf
