"""Which promises to keep when not all can be: as many as possible, by weight. Pure NumPy; deterministic.

The machine's time is the resource. A request asks for some of it by each horizon: its prefill if its first token is due
by then, and the decodes of the tokens that are. All that is asked for by a horizon must fit into it. Where it does not,
those that cost most for their weight are let go: the rule of Moore and Hodgson for as few late jobs as possible, with a
job's cost being all that it still needs, since who stays is asked for again at every later horizon.

A stream is never asked for more than its timeline is: what has been produced ahead of it is slack, and asks for nothing
until it has run out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Seconds ahead at which supply and demand are compared: from a few steps to longer than most answers take.
HORIZONS = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


class Demand(NamedTuple):
    """What requests ask for; one entry of each array a request. Seconds, and tokens where it says so.

    due: until the next token is due (negative: late). pace: seconds from one token's due time to the next one's.
    left: tokens still to come. prefill_s, token_s: machine time of what is left of the prefill, and of one decode.
    link_s: time of the link before the next token can be computed. weight: what keeping the promise is worth.
    """

    due: np.ndarray
    pace: np.ndarray
    left: np.ndarray
    prefill_s: np.ndarray
    token_s: np.ndarray
    link_s: np.ndarray
    weight: np.ndarray


class Verdicts(NamedTuple):
    """kept: a flag for each request. prefill_load, decode_load, load: the most that the kept ones' prefills, their
    decodes and both together ask for of any horizon's time."""

    kept: np.ndarray
    prefill_load: float
    decode_load: float
    load: float


def triage(demand: Demand, supply: float = 1.0) -> Verdicts:
    """Keep as many as fit. `supply`: share of the machine's time that they can have.

    O(n log n) for the order, then O(n) a horizon.
    """
    count = len(demand.due)
    if not count:
        return Verdicts(np.zeros(0, dtype=bool), 0.0, 0.0, 0.0)
    cost = (demand.prefill_s + demand.left * demand.token_s) / demand.weight
    order = np.argsort(-cost, kind="stable")  # the dearest first
    asked = Demand(*(field[order] for field in demand))
    kept = np.ones(count, dtype=bool)
    prefill_load = decode_load = load = 0.0
    prefills, decodes = [], []
    for horizon in HORIZONS:
        is_due = asked.due <= horizon
        prefill = np.where(is_due, asked.prefill_s, 0.0)
        tokens = np.where(is_due, np.floor((horizon - asked.due) / asked.pace) + 1.0, 0.0)
        decode = np.minimum(tokens, asked.left) * asked.token_s
        _let_go(kept, prefill + decode, supply * horizon)
        _let_go(kept, np.where(is_due, asked.link_s, 0.0), horizon)
        prefills.append(prefill)
        decodes.append(decode)
    for horizon, prefill, decode in zip(HORIZONS, prefills, decodes, strict=True):
        p, d = float(prefill[kept].sum()) / horizon, float(decode[kept].sum()) / horizon
        prefill_load, decode_load, load = max(prefill_load, p), max(decode_load, d), max(load, p + d)
    result = np.empty(count, dtype=bool)
    result[order] = kept
    return Verdicts(result, prefill_load, decode_load, load)


def _let_go(kept: np.ndarray, work: np.ndarray, room: float) -> None:
    """Clear flags, dearest first, until the kept ones' work fits; none of a request that asks for nothing.

    Then give back, cheapest first, those that fit after all: the last one let go may have been larger than needed.
    """
    mine = np.where(kept, work, 0.0)
    excess = float(mine.sum()) - room
    if excess <= 0.0:
        return
    gone = np.flatnonzero(mine > 0.0)
    taken = np.cumsum(mine[gone])
    last = int(np.searchsorted(taken, excess))  # the first with which enough is gone
    gone = gone[: last + 1]
    kept[gone] = False
    spare = float(taken[min(last, len(taken) - 1)]) - excess
    for at in gone[::-1][:8]:
        if mine[at] <= spare:
            kept[at] = True
            spare -= float(mine[at])
