"""How everybody stands: from promises and costs, who is kept and who is furthest ahead. NumPy; no torch.

docs/rotasched.md says why. Nothing here changes who runs: that is the policy's (`rota.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepLoad, UnitCosts
from superinfer.runtime.scheduler.forecast import Forecast
from superinfer.runtime.scheduler.lengths import LengthPredictor
from superinfer.runtime.scheduler.roster import Roster
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.triage import FIRST_TOKEN, HORIZONS, NOTHING, Demand, Verdicts, triage

LEFTOVER_SHARE = 0.05  # of the machine's time, for leftovers however much is promised to others: nobody starves
SMOOTHING = 0.1  # weight of the newest step


class Look(NamedTuple):
    """One look at all live sequences. rows: theirs in the roster; kept: by row of the whole roster."""

    rows: np.ndarray
    kept: np.ndarray


class Standing:
    """What a policy of promises knows of its sequences, as of the last look; the roster is kept up to date beside.

    units: what work costs now. verdicts: of the last triage. step_s: of a step, smoothed. promised: kept sequences, and
    kept_s the machine time that all of them still ask for. tightest: pace of the kept residents that promise most.
    mean_output: tokens that a request without any is expected to have.
    victims: kept residents, those furthest ahead first: when their next token is due, and who they are.
    """

    def __init__(self, kv: KVCache, limits: SchedulerLimits, cost: StepCost) -> None:
        self._kv, self._limits, self._cost = kv, limits, cost
        self.roster = Roster()
        self.lengths = LengthPredictor()
        self.forecast = Forecast()
        self.units = cost.units()
        self.verdicts: Verdicts = NOTHING
        self.victims: tuple[np.ndarray, list[Sequence | None]] = (np.zeros(0), [])
        self.tightest = math.inf
        self.promised = 0
        self.mean_output = 1.0
        self.kept_s = 0.0
        self.step_s = 0.02
        self._matmul_s = 0.0

    def observe(self, load: StepLoad, elapsed: float) -> None:
        """A step of this load took so many seconds."""
        if load.tokens and elapsed > 0.0:
            self.step_s += SMOOTHING * (elapsed - self.step_s)
            self._matmul_s += SMOOTHING * (load.tokens * self.units.token_s - self._matmul_s)

    def look(self, residents: list[Sequence], block_s: float, now: float) -> Look:
        """See what is lost, what is kept, and how much of the machine that asks for.

        residents: who runs. block_s: seconds of the link for a block.
        """
        self.units = units = self._cost.units()
        roster = self.roster
        running = np.array([s.row for s in residents], dtype=int)
        roster.update(residents, running)
        live = np.flatnonzero(roster.live)
        left = self._left(live)
        roster.left[live] = left
        name = self.lengths.kind(())
        self.mean_output = float(self.lengths.remaining(name, np.zeros(1), roster.produced[live])[0])
        due, pace = roster.due(live, left, self.step_s)
        due -= now
        resident = np.zeros(len(roster.live), dtype=bool)
        resident[running] = True
        link_s = np.where(resident[live], 0.0, roster.load[live] * block_s)
        prefill_s = units.prefill_s(roster.prefill[live])
        roster.late[live] |= (due < prefill_s + link_s) & ~(resident[live] & (prefill_s == 0.0))
        is_promised = np.isfinite(due) & ~roster.late[live]
        mine = live[is_promised]
        produced = roster.produced[live]
        token_s = self._token_s(units, roster.context[live] + left / 2, is_promised)
        first = np.where((produced == 0) & np.isfinite(roster.base[live]), FIRST_TOKEN, 0.0)
        demand = Demand(due, pace, left, prefill_s, token_s, link_s, roster.weight[live], first)
        demand = self._with_foreseen(Demand(*(field[is_promised] for field in demand)), now)
        self.verdicts = verdicts = triage(demand, 1.0 - LEFTOVER_SHARE)
        kept = np.zeros(len(roster.live), dtype=bool)
        kept[mine] = np.where(produced[is_promised] > 0, verdicts.streams[: len(mine)], verdicts.prefills[: len(mine)])
        roster.whole[live] = False
        roster.whole[mine] = verdicts.streams[: len(mine)]
        self.promised = int(kept.sum())
        self.kept_s = float((prefill_s + left * token_s)[kept[live]].sum())
        self._order_victims(live, due + now, kept & resident, pace)
        return Look(live, kept)

    def _with_foreseen(self, demand: Demand, now: float) -> Demand:
        """With what will ask for its part soon."""
        ahead = self.forecast.ahead(now, float(HORIZONS[-1]))
        if ahead is None or not len(demand.due):
            return demand
        output = np.minimum(ahead.most, self.mean_output)
        stream, end = ahead.at + ahead.ttft, ahead.at + ahead.deadline - output * self.step_s
        token_s = self._token_s(self.units, ahead.prompt + output / 2, np.ones(len(ahead.at), dtype=bool))
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
        )
        return Demand(*(np.concatenate(pair) for pair in zip(demand, more, strict=True)))

    def _left(self, rows: np.ndarray) -> np.ndarray:
        """Tokens still to come of each row, at least 1, at most what max_tokens leaves."""
        roster = self.roster
        produced, kinds = roster.produced[rows], roster.kind[rows]
        left = np.empty(len(rows))
        resolved: dict[str | None, list[int]] = {}
        for kind in np.unique(kinds).tolist():
            resolved.setdefault(self.lengths.kind(roster.kinds[kind]), []).append(kind)
        for name, members in resolved.items():
            mine = np.isin(kinds, members) if len(resolved) > 1 else slice(None)
            left[mine] = self.lengths.remaining(name, produced[mine], produced if name == "" else produced[mine])
        expected = roster.expected[rows]
        left = np.where(expected > produced, expected - produced, left)
        return np.clip(left, 1.0, np.maximum(1.0, roster.most[rows] - produced))

    def _token_s(self, units: UnitCosts, context: np.ndarray, is_promised: np.ndarray) -> np.ndarray:
        """Machine time of one decode: its own, and its part of what a step costs whoever is in it."""
        if not is_promised.any():
            return np.zeros(len(context))
        blocks = max(1.0, float(context[is_promised].mean()) / self._kv.page_size)
        places = min(self._limits.num_slots, self._kv.num_blocks / blocks, float(is_promised.sum()))
        step_s = units.step_s + max(0.0, units.weights_s - self._matmul_s)
        return units.kv_s * context + units.decode_s + units.token_s + step_s / max(1.0, places)

    def _order_victims(self, rows: np.ndarray, due: np.ndarray, candidates: np.ndarray, pace: np.ndarray) -> None:
        sequences = self.roster.sequences
        chosen = candidates[rows]
        mine, mine_due, mine_pace = rows[chosen], due[chosen], pace[chosen]
        order = np.argsort(-mine_due, kind="stable")
        self.victims = mine_due[order], [sequences[row] for row in mine[order].tolist()]
        self.tightest = float(mine_pace.min()) if len(mine_pace) else math.inf
