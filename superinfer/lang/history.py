"""What earlier runs of programs took, learnt for each call site; kept in memory or in a file. See docs/slo.md."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from pathlib import Path

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.lang.callgraph import Call, CallGraph

MAX_SITES = 512  # of one program
MAX_PROGRAMS = 256
_LEAST_WEIGHT = 1 / 16  # of a new run in an average


class Site(msgspec.Struct, omit_defaults=True):
    """Averages over the runs that came to this place. Seconds.

    work: of the call, without its waiting for the engine. tail: from its end to the program's, likewise; tail_spread:
    mean deviation of it. lag: of the program itself before the call. extended: share of runs in which a later call went
    on from this one's text; gap: how much later. rest: cost of its part of what follows it, in output tokens. share: of
    it and that, in what the program still had to do when the call began. work_spread: mean deviation of work.
    """

    runs: int = 0
    tokens: float = 0.0
    work: float = 0.0
    tail: float = 0.0
    tail_spread: float = 0.0
    lag: float = 0.0
    extended: float = 0.0
    gap: float = 0.0
    share: float = 1.0
    rest: float = 0.0
    work_spread: float = 0.0

    def learn(
        self, tokens: int, work: float, tail: float, lag: float, gap: float | None, share: float, rest: float
    ) -> None:
        """One run more. gap: None where nothing went on from its text."""
        self.runs += 1
        rate = max(1 / self.runs, _LEAST_WEIGHT)
        if self.runs > 1:
            self.tail_spread += rate * (abs(tail - self.tail) - self.tail_spread)
            self.work_spread += rate * (abs(work - self.work) - self.work_spread)
        self.tokens += rate * (tokens - self.tokens)
        self.work += rate * (work - self.work)
        self.tail += rate * (tail - self.tail)
        self.lag += rate * (lag - self.lag)
        self.share += rate * (share - self.share)
        self.rest += rate * (rest - self.rest)
        if gap is not None:
            self.gap += (rate if self.extended else 1.0) * (gap - self.gap)
        self.extended += rate * ((gap is not None) - self.extended)


class Learnt(msgspec.Struct, omit_defaults=True):
    """Of one program. total: seconds of work of a run along its longest way. sites: in the order they were met.

    Of sessions of this name: turns, the share of them that another one followed, and how many seconds later.
    """

    runs: int = 0
    total: float = 0.0
    sites: dict[str, Site] = {}
    turns: int = 0
    followed: float = 0.0
    idle: float = 0.0


class _Book(msgspec.Struct, omit_defaults=True):
    version: int = 1
    programs: dict[str, Learnt] = {}
    token_s: float | None = None  # seconds of work per token, over all calls


class History:
    """What was learnt of programs, by their names. Safe to share among programs and threads.

    path: a JSON file to begin from, where it exists, and to write at `save`, and when nobody has this object any more,
    at the latest at the interpreter's end; what other processes have written there of programs that did not run here
    stays. Raises InvalidRequestError for a file that holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise InvalidRequestError(f"history={path!r:.80} must be a History or the path of a file")
        self.path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        self._book = _Book()
        self._changed = threading.Event()  # since it was last written
        self._ours: set[str] = set()  # programs of which something was learnt here
        if self.path is not None:
            if self.path.exists():
                try:
                    self._book = msgspec.json.decode(self.path.read_bytes(), type=_Book)
                except (OSError, msgspec.MsgspecError) as error:
                    raise InvalidRequestError(f"history {str(path)!r} cannot be read ({error}); delete it") from None
            weakref.finalize(self, _save_quietly, self.path, self._book, self._ours, self._lock, self._changed)

    @classmethod
    def of(cls, given: History | str | os.PathLike[str] | None) -> History:
        """The given one, or one of a path: for all who name that path the same, or each would write over what the
        others have learnt. None: a new one. Raises InvalidRequestError."""
        if isinstance(given, History):
            return given
        if not isinstance(given, (str, os.PathLike)):
            return cls(given)
        path = os.path.abspath(given)
        with _lock:
            found = _of_path.get(path)
            if found is None:
                found = _of_path[path] = cls(given)
            return found

    @property
    def token_s(self) -> float | None:
        """Seconds of work per output token over all calls; None before any."""
        return self._book.token_s

    def program(self, name: str) -> Learnt | None:
        """What is known of a program; None before its first run."""
        return self._book.programs.get(name)

    def site(self, program: str, site: str) -> Site | None:
        """What is known of a place; None before a run came there."""
        learnt = self._book.programs.get(program)
        return learnt.sites.get(site) if learnt is not None else None

    def learn(self, graph: CallGraph) -> None:
        """Take in a run that has ended. One that failed, or was cut short anywhere, teaches nothing."""
        if (
            not graph.calls
            or graph.ended is None
            or not all(call.usual and call.ended is not None for call in graph.calls)
        ):
            return
        work = [call.work for call in graph.calls]
        lag = [graph.lag(call) for call in graph.calls]
        end = max(0.0, graph.ended - max(call.ended or 0.0 for call in graph.calls))
        tails = graph.longest(work, lag, end)
        total = max(lag[c.index] + work[c.index] + tails[c.index] for c in graph.calls if not c.after)
        cost = [call.cost for call in graph.calls]
        gaps, rests = _gaps(graph), graph.rests(cost)
        shares = graph.shares(cost, rests)
        with self._lock:
            learnt = self._of(graph.program)
            if learnt is None:
                return
            learnt.runs += 1
            learnt.total += max(1 / learnt.runs, _LEAST_WEIGHT) * (total - learnt.total)
            for call in graph.calls:
                site = learnt.sites.get(call.site)
                if site is None:
                    if len(learnt.sites) >= MAX_SITES:
                        continue
                    site = learnt.sites[call.site] = Site()
                i = call.index
                site.learn(call.tokens, work[i], tails[i], lag[i], gaps.get(i), shares[i], rests[i])
            self._learn_speed(graph.calls)
            self._changed.set()

    def learn_idle(self, name: str, idle: float | None) -> None:
        """A session's turn was followed by another one `idle` seconds after its end; None: by none."""
        with self._lock:
            learnt = self._of(name)
            if learnt is None:
                return
            learnt.turns += 1
            rate = max(1 / learnt.turns, _LEAST_WEIGHT)
            if idle is not None:
                learnt.idle += (rate if learnt.followed else 1.0) * (idle - learnt.idle)
            learnt.followed += rate * ((idle is not None) - learnt.followed)
            self._changed.set()

    def _of(self, program: str) -> Learnt | None:
        learnt = self._book.programs.get(program)
        if learnt is None and len(self._book.programs) < MAX_PROGRAMS:
            learnt = self._book.programs[program] = Learnt()
        if learnt is not None:
            self._ours.add(program)
        return learnt

    def _learn_speed(self, calls: list[Call]) -> None:
        tokens, work = sum(c.tokens for c in calls), sum(c.work for c in calls if c.tokens)
        if tokens:
            known = self._book.token_s
            self._book.token_s = work / tokens if known is None else known + _LEAST_WEIGHT * (work / tokens - known)

    def save(self) -> None:
        """Write the file, whole or not at all. Raises InvalidRequestError without a path, OSError."""
        if self.path is None:
            raise InvalidRequestError("this history has no path; make it with History('file.json')")
        _write(self.path, self._book, self._ours, self._lock, self._changed)


_of_path: weakref.WeakValueDictionary[str, History] = weakref.WeakValueDictionary()
_lock = threading.Lock()  # of `_of_path`


def _after_fork() -> None:
    """Whoever held the lock when this process was forked is not in it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _write(path: Path, book: _Book, ours: set[str], lock: threading.Lock, changed: threading.Event) -> None:
    with lock:
        for name, learnt in _written(path).items():
            if name not in ours and (name in book.programs or len(book.programs) < MAX_PROGRAMS):
                book.programs[name] = learnt
        data = msgspec.json.encode(book)
        changed.clear()
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def _written(path: Path) -> dict[str, Learnt]:
    """What is in the file by now, perhaps of other processes."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=_Book).programs
    return {}


def _save_quietly(path: Path, book: _Book, ours: set[str], lock: threading.Lock, changed: threading.Event) -> None:
    if changed.is_set():
        with contextlib.suppress(OSError):  # nobody is left to tell
            _write(path, book, ours, lock, changed)


def _gaps(graph: CallGraph) -> dict[int, float]:
    """Of the calls whose text a later call went on from: how much later the first of these began, seconds."""
    gaps: dict[int, float] = {}
    for call in graph.calls:
        if call.extends is not None:
            gap = max(0.0, call.begun - (graph.calls[call.extends].ended or 0.0))
            gaps[call.extends] = min(gap, gaps.get(call.extends, gap))
    return gaps
