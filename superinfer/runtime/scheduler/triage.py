"""Which promises to keep when not all can be: the most worth of them. Pure NumPy; deterministic.

The machine's time is the resource. A request asks for some of it by each horizon: its prefill, if its first token is
due by then, and the decodes of the tokens that are. All that is asked for by a horizon must fit into it. Where it does
not, what is worth least for its cost is let go first: with equal worths the dearest, which is the rule of Moore and
Hodgson for as few late jobs as possible. The cost is all that is still to be done, since who stays is asked for again
at every later horizon; so what is nearly done is kept.

A first token in time is worth something by itself: a request's stream can be let go and its first token be kept.

A stream is never asked for more than its timeline is: what has been produced ahead of it is slack, and asks for nothing
until it has run out. Requests that are yet to come belong into the demand, as far as they can be foreseen: they will
ask for their first tokens, and what is kept now is in their way then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Seconds ahead at which supply and demand are compared: from a few steps to about as long as an answer takes.
HORIZONS = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
FIRST_TOKEN = 0.5  # what a first token in time is worth of a stream's promise


class Demand(NamedTuple):
    """What requests ask for; one entry of each array a request. Seconds, and tokens where it says so.

    due: until the next token is due (negative: late). pace: seconds from one token's due time to the next one's.
    left: tokens still to come. prefill_s, token_s: machine time of what is left of the prefill, and of one decode.
    link_s: time of the link before the next token can be computed. worth: of the promise.
    first: the share of it that the next token is worth by itself; 0 where one does not count alone.
    """

    due: np.ndarray
    pace: np.ndarray
    left: np.ndarray
    prefill_s: np.ndarray
    token_s: np.ndarray
    link_s: np.ndarray
    worth: np.ndarray
    first: np.ndarray


class Verdicts(NamedTuple):
    """prefills, streams: for each request, whether its prefill, and the rest, is kept; no stream without its prefill.

    prefill_load, decode_load, load: the most that the kept prefills, streams and both ask for of any horizon's time.
    """

    prefills: np.ndarray
    streams: np.ndarray
    prefill_load: float
    decode_load: float
    load: float


NOTHING = Verdicts(np.zeros(0, dtype=bool), np.zeros(0, dtype=bool), 0.0, 0.0, 0.0)


def triage(demand: Demand, supply: float = 1.0) -> Verdicts:
    """Keep what is worth most of what fits. `supply`: share of the machine's time that there is for it.

    O(n log n) for the order, then O(n) a horizon.
    """
    count = len(demand.due)
    if not count:
        return NOTHING
    order = np.argsort(_price(demand), kind="stable")  # the least worth its cost first; streams before prefills
    is_prefill, who = order >= count, order % count
    due, pace, left = demand.due[who], demand.pace[who], np.where(is_prefill, 0.0, demand.left[who])
    prefill_s = np.where(is_prefill, demand.prefill_s[who], 0.0)
    link_s = np.where(is_prefill, 0.0, demand.link_s[who])
    token_s = demand.token_s[who]
    kept = np.ones(2 * count, dtype=bool)
    works = []
    for horizon in HORIZONS:
        is_due = due <= horizon
        tokens = np.minimum(np.where(is_due, np.floor((horizon - due) / pace) + 1.0, 0.0), left)
        works.append(np.where(is_due, prefill_s, 0.0) + tokens * token_s)
        _let_go(kept, works[-1], supply * horizon)
        _let_go(kept, np.where(is_due, link_s, 0.0), horizon)
    flags = np.empty(2 * count, dtype=bool)
    flags[order] = kept
    streams, prefills = flags[:count] & flags[count:], flags[count:]
    kept = np.where(is_prefill, kept, streams[who])
    asked = np.stack(works)
    loads = asked @ np.stack([kept & is_prefill, kept & ~is_prefill], axis=1) / HORIZONS[:, None]
    prefill_load, decode_load = loads.max(axis=0).tolist()
    return Verdicts(prefills, streams, prefill_load, decode_load, float(loads.sum(axis=1).max()))


def _price(demand: Demand) -> np.ndarray:
    """Worth for cost of all streams, then of all prefills. A stream is never above its prefill, which it needs.

    Where the prefill alone is worth less for its cost than the stream is, they stand and fall together.
    """
    decode_s = np.maximum(demand.left * demand.token_s, 1e-9)
    prefill_s = np.maximum(demand.prefill_s, 1e-9)
    stream = demand.worth * (1.0 - demand.first) / decode_s
    prefill = demand.worth * demand.first / prefill_s
    both = demand.worth / (decode_s + prefill_s)
    apart = prefill >= stream
    return np.concatenate([np.where(apart, stream, both), np.where(apart, prefill, both)])


def _let_go(kept: np.ndarray, work: np.ndarray, room: float) -> None:
    """Clear flags in order until the kept ones' work fits; never of what asks for nothing.

    Then give back, last gone first, what fits after all: the last one let go may have been larger than needed.
    """
    mine = np.where(kept, work, 0.0)
    excess = float(mine.sum()) - room
    if excess <= 0.0:
        return
    gone = np.flatnonzero(mine > 0.0)
    taken = np.cumsum(mine[gone])
    last = min(int(np.searchsorted(taken, excess)), len(gone) - 1)  # the first with which enough is gone
    kept[gone[: last + 1]] = False
    spare = float(taken[last]) - excess
    for at in gone[: last + 1][::-1][1:8]:
        if mine[at] <= spare:
            kept[at] = True
            spare -= float(mine[at])
