"""Which promises to keep when not all can be: the most worth of them. Pure NumPy; deterministic.

The machine's time is the resource, and with it the memory, and the places in a batch, that computing holds. A request
asks for some of it by each horizon: its prefill, if its first token is due by then, and the decodes of the tokens that
are. All that is asked for by a horizon must fit into it. Where it does not, what is worth least for its cost is let go
first: with equal worths the dearest, which is the rule of Moore and Hodgson for as few late jobs as possible. The cost
is all that is still to be done, since who stays is asked for again at every later horizon; so what is nearly done is
kept.

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
MOST = 4096  # requests, the most worth their cost: beyond them none would fit, and looking takes time
TOGETHER = 3  # horizons computed at once: one by one costs calls, all at once the work of those let go early
FIRST_TOKEN = 0.5  # what a first token in time is worth of a stream's promise


class Following(NamedTuple):
    """What follows each request in its program; one entry of each array a request.

    program: its number; those of one stand and fall together. 0: on its own. work_s: machine time of what follows,
    which is asked for evenly from `begins` on for `lasts`, seconds.
    """

    program: np.ndarray
    work_s: np.ndarray
    begins: np.ndarray
    lasts: np.ndarray


class Demand(NamedTuple):
    """What requests ask for; one entry of each array a request. Seconds, and tokens where it says so.

    due: until the next token is due (negative: late). pace: seconds from one token's due time to the next one's.
    left: tokens still to come. prefill_s, token_s: machine time of what is left of the prefill, and of one decode.
    link_s: time of the link before the next token can be computed. worth: of the promise.
    first: the share of it that the next token is worth by itself; 0 where one does not count alone.
    held: the share of the memory, or of the places in a batch, that it holds while it computes. held_s: that share for
        as long as one decode holds it: a whole step, as all residents get one token a step.
    following: of programs' calls; None where there are none.
    """

    due: np.ndarray
    pace: np.ndarray
    left: np.ndarray
    prefill_s: np.ndarray
    token_s: np.ndarray
    link_s: np.ndarray
    worth: np.ndarray
    first: np.ndarray
    held: np.ndarray
    held_s: np.ndarray
    following: Following | None = None


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


class _Entries(NamedTuple):
    """Streams and prefills alike, an entry each: `left` tokens are due one after another, every one of `unit_s`.

    together: entries with one number stand and fall together; it ascends with their worth. None: each by itself.
    following: what follows the streams.
    """

    which: np.ndarray
    due: np.ndarray
    per_s: np.ndarray  # tokens due in a second, after the first
    left: np.ndarray
    unit_s: np.ndarray
    link_s: np.ndarray
    held: np.ndarray  # of all memory, for as long as its work takes: seconds for each second of its own
    together: np.ndarray | None = None
    following: Following | None = None

    def work(self, horizons: np.ndarray) -> np.ndarray:
        """[horizons, entries]: seconds of the machine that each asks for by each of them."""
        tokens = np.maximum(horizons[:, None] - self.due, -1.0)  # some are never due
        is_due = tokens >= 0.0
        tokens *= self.per_s
        np.floor(tokens, out=tokens)
        tokens += 1.0
        np.minimum(tokens, self.left, out=tokens)
        tokens *= self.unit_s
        tokens *= is_due
        if self.following is not None:
            _, work_s, begins, lasts = self.following
            tokens += work_s * np.clip((horizons[:, None] - begins) / np.maximum(lasts, 1e-3), 0.0, 1.0)
        return tokens

    def only(self, kept: np.ndarray) -> _Entries:
        """Those where `kept` says so."""
        together, following = self.together, self.following
        if together is not None and following is not None:
            together, following = together[kept], Following(*(column[kept] for column in following))
        return _Entries._make([*(column[kept] for column in self[:7]), together, following])


def triage(demand: Demand, supply: float = 1.0) -> Verdicts:
    """Keep what is worth most of what fits. `supply`: share of the machine's time that there is for it.

    O(n log n) for the order, then O(n) a horizon, n being what has not been let go by then.
    """
    count = len(demand.due)
    if not count:
        return NOTHING
    entries = _in_order(demand)
    works = np.zeros((0, len(entries.which)))
    has_link = bool(demand.link_s.any())
    for at, horizon in enumerate(HORIZONS.tolist()):
        if at % TOGETHER == 0:
            works = np.concatenate([works, entries.work(HORIZONS[at : at + TOGETHER])])
        entries, works = _let_go(entries, works, works[at], supply * horizon)
        entries, works = _let_go(entries, works, works[at] * entries.held, horizon)
        if has_link:
            entries, works = _let_go(entries, works, entries.link_s * (entries.due <= horizon), horizon)
    flags = np.zeros(2 * count, dtype=bool)
    flags[entries.which] = True
    streams, prefills = flags[:count] & flags[count:], flags[count:]
    is_prefill = entries.which >= count
    is_stream = ~is_prefill & streams[entries.which % count]
    loads = works @ np.stack([is_prefill, is_stream], axis=1).astype(float) / HORIZONS[:, None]
    prefill_load, decode_load = loads.max(axis=0).tolist()
    return Verdicts(prefills, streams, prefill_load, decode_load, float(loads.sum(axis=1).max()))


def _in_order(demand: Demand) -> _Entries:
    """The entries, the least worth its cost first. `which`: streams by their place in the demand, then prefills."""
    count = len(demand.due)
    price = _price(demand)
    price *= 1.0 + 1e-12 * np.arange(2 * count)  # the order of equals is theirs in the demand, on any machine
    which = np.arange(2 * count)
    if count > MOST:
        which = np.argpartition(price, -2 * MOST)[-2 * MOST :]
    which = which[np.argsort(price[which])]
    who, is_prefill = which % count, which >= count
    entries = _Entries(
        which,
        demand.due[who],
        np.where(is_prefill, 0.0, 1.0 / demand.pace[who]),
        np.where(is_prefill, 1.0, demand.left[who]),
        np.where(is_prefill, demand.prefill_s[who], demand.token_s[who]),
        np.where(is_prefill, 0.0, demand.link_s[who]),
        np.where(is_prefill, demand.held[who], demand.held_s[who] / np.maximum(demand.token_s[who], 1e-9)),
    )
    if demand.following is None:
        return entries
    following = Following(*(column[who] for column in demand.following))
    following = following._replace(work_s=np.where(is_prefill, 0.0, following.work_s))
    numbers = np.where(following.program > 0, following.program, -1.0 - which)
    _, first, members = np.unique(numbers, return_index=True, return_inverse=True)
    return entries._replace(together=np.argsort(np.argsort(first))[members], following=following)


def _price(demand: Demand) -> np.ndarray:
    """Worth for cost of all streams, then of all prefills. A stream is never above its prefill, which it needs.

    Where the prefill alone is worth less for its cost than the stream is, they stand and fall together. What follows
    in a program is a cost of the stream.
    """
    following = demand.following
    decode_s = np.maximum(demand.left * demand.token_s, 1e-9)
    if following is not None:
        decode_s = decode_s + following.work_s
    prefill_s = np.maximum(demand.prefill_s, 1e-9)
    stream = demand.worth * (1.0 - demand.first) / decode_s
    prefill = demand.worth * demand.first / prefill_s
    both = demand.worth / (decode_s + prefill_s)
    apart = prefill >= stream
    if following is not None:  # those of a program have one price
        _, members = np.unique(following.program, return_inverse=True)
        whole = (np.bincount(members, demand.worth) / np.bincount(members, decode_s + prefill_s))[members]
        is_alone = following.program == 0
        stream, prefill, both = (np.where(is_alone, own, whole) for own in (stream, prefill, both))
    return np.concatenate([np.where(apart, stream, both), np.where(apart, prefill, both)])


def _let_go(entries: _Entries, works: np.ndarray, asked: np.ndarray, room: float) -> tuple[_Entries, np.ndarray]:
    """Let entries go, in order, until what the others ask for fits; never one that asks for nothing. `works` go along.

    Then give back, last gone first, what fits after all: the last one let go may have been larger than needed.
    """
    excess = float(asked.sum()) - room
    if excess <= 0.0:
        return entries, works
    if entries.together is not None:
        asked = np.bincount(entries.together, asked)
    gone = np.flatnonzero(asked > 0.0)
    taken = np.cumsum(asked[gone])
    last = min(int(np.searchsorted(taken, excess)), len(gone) - 1)  # the first with which enough is gone
    kept = np.ones(len(asked), dtype=bool)
    kept[gone[: last + 1]] = False
    spare = float(taken[last]) - excess
    for at in gone[: last + 1][::-1][1:8].tolist():
        if asked[at] <= spare:
            kept[at] = True
            spare -= float(asked[at])
    if entries.together is not None:
        kept = kept[entries.together]
    return entries.only(kept), works[:, kept]
