"""The calls of one run and what each came after: recorded while the program runs or is traced."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from superinfer.lang.report import CallReport
from superinfer.runtime.protocol import RequestReport

PREFILL_COST = (
    0.2  # machine time of a prompt token, of that of an output token in a full batch; only proportions matter
)
OCCURRENCES = 32  # of one name in one state, and of forks of one state, that are told apart

_INDEX = re.compile(r"\[\d+\]\Z")
_FORK = re.compile(r"fork(\d+)\Z")


@dataclass(slots=True)
class Call:
    """One call. Times in seconds since the run began.

    site: its place in the program. after: the calls that it came after, by index. extends: the call from whose text it
    goes on. max_tokens: most that it may write. deadline: promised to this call alone.
    lag: after the last of `after` (or the run's beginning), spent by the program itself. work: `ended - begun` without
    waiting for the engine. cost: machine time in output tokens; a prompt token that was computed has PREFILL_COST.
    """

    index: int
    site: str
    name: str
    path: tuple[str, ...]
    after: tuple[int, ...]
    extends: int | None = None
    max_tokens: int = 1
    deadline: float | None = None
    begun: float = 0.0
    ended: float | None = None
    work: float = 0.0
    tokens: int = 0
    cost: float = 0.0
    usual: bool = True

    def end(self, now: float, row: CallReport, engine: RequestReport | None) -> None:
        """It ended `now`, as its row and the engine say. usual: the next one may be expected to go the same way."""
        waited = engine.queue_s + engine.preempted_s + engine.rotated_s if engine is not None else 0.0
        self.ended, self.work = now, max(0.0, row.e2e_s - waited)
        self.tokens = row.output_tokens
        computed = engine.prompt_tokens - engine.cached_tokens if engine is not None else 0
        self.cost = self.tokens + PREFILL_COST * computed
        self.usual = row.finish_reason in ("stop", "length", "scored")


@dataclass
class CallGraph:
    """Calls in the order in which they began. `complete`: False where a trace stopped early; `stopped` says why.

    seen: calls whose outcome the program's Python knows by now, but for those that came before another of them.
    """

    program: str
    calls: list[Call] = field(default_factory=list)
    seen: frozenset[int] = frozenset()
    ended: float | None = None
    stopped: str = ""

    @property
    def complete(self) -> bool:
        return not self.stopped

    def saw(self, *indexes: int) -> None:
        """The program has read what these calls made."""
        seen = self.seen
        for index in indexes:
            if index not in seen:
                seen = seen.difference(self.calls[index].after) | {index}
        self.seen = seen

    def followers(self) -> list[list[int]]:
        """Of each call, those that came after it."""
        found: list[list[int]] = [[] for _ in self.calls]
        for call in self.calls:
            for before in call.after:
                found[before].append(call.index)
        return found

    def lag(self, call: Call) -> float:
        """What the program did between all that the call came after and the call, seconds."""
        last = max((self.calls[before].ended or 0.0 for before in call.after), default=0.0)
        return max(0.0, call.begun - last)

    def longest(self, own: Sequence[float], lag: Sequence[float], end: float = 0.0) -> list[float]:
        """Of each call, the longest way from its end to the program's, which comes `end` after the last call."""
        tails = [end] * len(self.calls)
        for call in reversed(self.calls):  # whatever came after a call began later, so has a higher index
            through = lag[call.index] + own[call.index] + tails[call.index]
            for before in call.after:
                tails[before] = max(tails[before], through)
        return tails

    def shares(self, cost: Sequence[float], rests: Sequence[float]) -> list[float]:
        """Of each call of a run that has ended: its part, with `rests`, of what was still to be done when it began.

        0 to 1. Those of all calls that could be under way at one time add up to 1.
        """
        ended = sorted((call.ended or 0.0, call.index) for call in self.calls)
        done = [0.0, *accumulate(cost[index] for _, index in ended)]
        undone = [done[-1] - done[bisect_right(ended, (call.begun, -1))] for call in self.calls]
        mine = [own + rest for own, rest in zip(cost, rests, strict=True)]
        return [own / max(own, whole) if own > 0 else 1.0 for own, whole in zip(mine, undone, strict=True)]

    def rests(self, cost: Sequence[float]) -> list[float]:
        """Of each call, what the calls after it cost; of what came after several calls, each has an equal part."""
        rests = [0.0] * len(self.calls)
        for call in reversed(self.calls):  # whatever came after a call began later, so has a higher index
            for before in call.after:
                rests[before] += (cost[call.index] + rests[call.index]) / len(call.after)
        return rests

    def traced_shares(self, cost: Sequence[float]) -> list[float]:
        """The same of a trace, where nothing has a time: all that a call does not come after is still to be done."""
        before: list[int] = []  # bit sets of indexes
        shares, whole = [], sum(cost)
        for call in self.calls:
            mine = 0
            for index in call.after:
                mine |= before[index] | 1 << index
            before.append(mine)
            rest = whole - sum(cost[i] for i in range(call.index) if mine >> i & 1)
            shares.append(cost[call.index] / rest)
        return shares

    def __str__(self) -> str:
        lines = [
            f"{self.program}: {len(self.calls)} calls"
            + (f"; the trace stops where {self.stopped}" * bool(self.stopped))
        ]
        for call in self.calls:
            after = ", ".join(str(before) for before in call.after) or "the beginning"
            lines.append(
                f"  {call.index}  {'/'.join((*call.path, call.name))}  (≤ {call.max_tokens} tokens) after {after}"
            )
        return "\n".join(lines)

    def print_graph_dfs(self) -> None:
        """Print it, as SGLang's tracer does."""
        print(self)


def site_of(path: Iterable[str], name: str, occurrence: int) -> str:
    """The key of a call's place: forks without their index, loops by number up to OCCURRENCES."""
    labels = [_fork_label(_INDEX.sub("", label)) for label in path]
    number = f"#{min(occurrence, OCCURRENCES)}" if occurrence > 1 else ""
    return "/".join((*labels, name)) + number


def _fork_label(label: str) -> str:
    numbered = _FORK.match(label)
    return f"fork{min(int(numbered[1]), OCCURRENCES)}" if numbered else label
