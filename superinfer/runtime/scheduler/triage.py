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

from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from superinfer.runtime.scheduler.slices import Slice, finish

# Seconds ahead at which supply and demand are compared: from a few steps to about as long as an answer takes.
HORIZONS = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
SOON_S = 1.0  # for so long it is seen what decodes ask for now
MOST = 4096  # requests, the most worth their cost: beyond them none would fit, and looking takes time
# Horizons computed at once: of more entries than FEW one by one would cost calls, all at once the work of those let go
# early; of fewer, calls are all it costs.
TOGETHER, FEW = 3, 1024
CLOSE = 1.0 - 1e-9  # below so much of a room, sums fit in whatever order they are taken
FIRST_TOKEN = 0.1  # what a first token in time is worth of a promise, which it does not keep alone


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
    expected: the share of all this that is thought to be asked for; the rest is there lest more comes. None: all.
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
    expected: np.ndarray | None = None


class Verdicts(NamedTuple):
    """prefills, streams: for each request, whether its prefill, and the rest, is kept; no stream without its prefill.

    prefill_load, decode_load, load: the most that the kept prefills, streams and both are expected to ask for of any
        horizon's time.
    decodes_soon: as decode_load, of the horizons up to SOON_S.
    cut: the highest price (`prefill_price`) of a prefill that is let go; 0 if none is.
    """

    prefills: np.ndarray
    streams: np.ndarray
    prefill_load: float
    decode_load: float
    load: float
    decodes_soon: float = 0.0
    cut: float = 0.0


NOTHING = Verdicts(np.zeros(0, dtype=bool), np.zeros(0, dtype=bool), 0.0, 0.0, 0.0)


class _Entries(NamedTuple):
    """Streams and prefills alike, an entry each: `left` tokens are due one after another, every one of `unit_s`.

    which: streams by their place in the demand, then prefills, without those of which nothing is left to compute.
    table: [len(ROWS), entries], and len(MORE) rows more where there are programs. works: [horizons, entries] each, the
    seconds of the machine that each entry asks for by the horizons so far, those computed at once together.
    """

    which: np.ndarray
    table: np.ndarray
    works: tuple[np.ndarray, ...] = ()

    def take(self, at: np.ndarray) -> _Entries:
        """The entries at these places."""
        works = tuple(some.take(at, axis=1) for some in self.works)
        return _Entries(self.which.take(at), self.table.take(at, axis=1), works)

    def until(self, horizons: np.ndarray) -> _Entries:
        """With the work by these horizons too."""
        due, per_s, left, unit_s = self.table[:LINK_S]
        tokens = horizons[:, None] - due
        tokens *= per_s
        np.floor(tokens, out=tokens)
        tokens += 1.0  # 0 or less where none is due by then
        np.minimum(tokens, left, out=tokens)
        np.maximum(tokens, 0.0, out=tokens)
        tokens *= unit_s
        if len(self.table) > len(ROWS):
            work_s, begins, lasts = self.table[WORK_S:PROGRAM]
            tokens += work_s * np.clip((horizons[:, None] - begins) / np.maximum(lasts, 1e-3), 0.0, 1.0)
        return _Entries(self.which, self.table, (*self.works, tokens))

    def link(self, horizon: float) -> np.ndarray:
        """[entries]: seconds of the link that each asks for by then."""
        return self.table[LINK_S] * (self.table[DUE] <= horizon)

    def together(self) -> np.ndarray | None:
        """[entries]: one number for all that stand and fall together, in the order of the first of each; None where
        each is by itself."""
        if len(self.table) == len(ROWS):
            return None
        _, first, members = np.unique(self.table[PROGRAM], return_index=True, return_inverse=True)
        numbers: np.ndarray = np.argsort(np.argsort(first))[members]
        return numbers


# The rows of `_Entries.table`. PER_S: tokens due in a second, after the first. HELD: of all memory, for as long as its
# work takes: seconds for each second of its own.
DUE, PER_S, LEFT, UNIT_S, LINK_S, HELD = ROWS = range(6)
# And of programs, of streams: what follows, as in `Following`. PROGRAM: a number of its own for who is in none.
WORK_S, BEGINS, LASTS, PROGRAM = MORE = range(6, 10)
LEAST_PER_S = 1e-12  # of what promises its next token only: above 0, so that a time to go is less than no token


def triage(demand: Demand, supply: float = 1.0) -> Verdicts:
    """Keep what is worth most of what fits. `supply`: share of the machine's time that there is for it.

    O(n) a horizon, n being what has not been let go by then, and O(n log n) for the order once somebody must go.
    """
    return finish(triage_in_slices(demand, supply))


def triage_in_slices(demand: Demand, supply: float) -> Generator[Slice, None, Verdicts]:
    """See `triage`."""
    count = len(demand.due)
    if not count:
        return NOTHING
    price: np.ndarray | None = None  # only where somebody may have to go
    if count > MOST:
        yield Slice("price", 35 + count / 25)
        price = _price(demand)
    yield Slice("entries", 35 + count / 60)
    entries, is_ordered = _entries(demand), False
    if price is not None and len(entries.which) > 2 * MOST:
        entries = entries.take(np.argpartition(price[entries.which], -2 * MOST)[-2 * MOST :])
    link_s = float(demand.link_s.sum())  # by horizons that are longer, it fits
    together = TOGETHER if len(entries.which) > FEW else len(HORIZONS)
    for begin in range(0, len(HORIZONS), together):
        horizons = HORIZONS[begin : begin + together]
        yield Slice("horizons", 40 + len(entries.which) * len(horizons) / 130)
        entries = entries.until(horizons)
        if not is_ordered:
            if _fit(entries, horizons, supply, link_s):
                continue
            yield Slice("order", 60 + len(entries.which) / 12)
            price = _price(demand) if price is None else price
            is_ordered, entries = True, entries.take(np.argsort(price[entries.which]))
            yield Slice("let go", 85 + len(entries.which) / 15)
        for at, horizon in enumerate(horizons.tolist()):
            entries = _let_go(entries, entries.works[-1][at], supply * horizon)
            if entries.works[-1][at] @ entries.table[HELD] > CLOSE * horizon:
                entries = _let_go(entries, entries.works[-1][at] * entries.table[HELD], horizon)
            if link_s > CLOSE * horizon:
                entries = _let_go(entries, entries.link(horizon), horizon)
    yield Slice("verdicts", 45 + len(entries.which) / 60)
    verdicts = _verdicts(entries, demand)
    gone = ~verdicts.prefills & (demand.prefill_s > 0.0)
    if not gone.any():
        return verdicts
    price = _price(demand) if price is None else price
    return verdicts._replace(cut=float(price[count:][gone].max()))


def _entries(demand: Demand) -> _Entries:
    """All of them, in no order but the demand's."""
    count, following = len(demand.due), demand.following
    begun = (demand.prefill_s > 0.0).nonzero()[0]
    which = np.concatenate([np.arange(count), begun + count])
    table = np.zeros((len(ROWS) + (len(MORE) if following is not None else 0), len(which)))
    stream, prefill = table[:, :count], table[:, count:]
    stream[DUE], prefill[DUE] = demand.due, demand.due[begun]
    np.maximum(1.0 / demand.pace, LEAST_PER_S, out=stream[PER_S])
    np.divide(demand.held_s, np.maximum(demand.token_s, 1e-9), out=stream[HELD])
    stream[LEFT], stream[UNIT_S], stream[LINK_S] = demand.left, demand.token_s, demand.link_s
    prefill[PER_S : LEFT + 1] = 1.0
    prefill[UNIT_S], prefill[HELD] = demand.prefill_s[begun], demand.held[begun]
    if following is not None:
        stream[WORK_S] = following.work_s
        for part, of in ((stream, slice(None)), (prefill, begun)):
            part[BEGINS], part[LASTS] = following.begins[of], following.lasts[of]
        program = following.program[which % count]
        table[PROGRAM] = np.where(program > 0.0, program, -1.0 - which)
    return _Entries(which, table)


def _price(demand: Demand) -> np.ndarray:
    """Worth for cost of all streams, then of all prefills. A stream is never above its prefill, which it needs.

    Where the prefill alone is worth less for its cost than the stream is, they stand and fall together. What follows
    in a program is a cost of the stream.
    """
    count = len(demand.due)
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
    price = np.concatenate([np.where(apart, stream, both), np.where(apart, prefill, both)])
    # Of equals, on any machine, the later in the demand goes first: who is foreseen before who is there; and a stream
    # before its prefill.
    place = 2.0 * np.arange(count)
    price *= 1.0 - 1e-12 * np.concatenate([place + 1.0, place])
    return price


def prefill_price(worth: float, first: float, decode_s: float, prefill_s: float) -> float:
    """Of one request's prefill, as `_price` has it. decode_s: of all its tokens."""
    prefill = worth * first / max(prefill_s, 1e-9)
    is_apart = prefill >= worth * (1.0 - first) / max(decode_s, 1e-9)
    return prefill if is_apart else worth / max(decode_s + prefill_s, 1e-9)


def _fit(entries: _Entries, horizons: np.ndarray, supply: float, link_s: float) -> bool:
    """Whether nobody has to go for what is asked for by these horizons, the last of `works`. link_s: all that is
    asked of the link."""
    works, room = entries.works[-1], CLOSE * horizons
    if (works.sum(axis=1) > supply * room).any() or (works @ entries.table[HELD] > room).any():
        return False
    return all(
        link_s <= CLOSE * horizon or float(entries.link(horizon).sum()) <= CLOSE * horizon
        for horizon in horizons.tolist()
    )


def _let_go(entries: _Entries, asked: np.ndarray, room: float) -> _Entries:
    """Let entries go, in order, until what the others ask for fits; never one that asks for nothing.

    Then give back, last gone first, what fits after all: the last one let go may have been larger than needed.
    """
    excess = float(asked.sum()) - room
    if excess <= 0.0:
        return entries
    together = entries.together()
    if together is not None:
        asked = np.bincount(together, asked)
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
    if together is not None:
        kept = kept[together]
    return entries.take(np.flatnonzero(kept))


def _verdicts(entries: _Entries, demand: Demand) -> Verdicts:
    """Of those left."""
    which, count, expected = entries.which, len(demand.due), demand.expected
    kept = np.zeros(2 * count, dtype=bool)
    kept[which] = True
    prefills = kept[count:]
    prefills |= demand.prefill_s <= 0.0
    streams = kept[:count] & prefills
    share = np.ones(2 * count) if expected is None else np.concatenate([expected, expected])
    share[:count] *= streams
    share = share[which]
    counted = np.empty((2, len(which)))  # prefills, and streams; each as far as it is thought to be asked for
    np.multiply(share, which >= count, out=counted[0])
    np.subtract(share, counted[0], out=counted[1])
    loads = np.concatenate([some @ counted.T for some in entries.works]) / HORIZONS[:, None]
    prefill_load, decode_load = loads.max(axis=0).tolist()
    soon = float(loads[HORIZONS <= SOON_S, 1].max())
    return Verdicts(prefills, streams, prefill_load, decode_load, float(loads.sum(axis=1).max()), soon)
