"""What was promised to each call of a program, what happened, and why it was late."""

from __future__ import annotations

import time
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

import msgspec

from superinfer.runtime.protocol import RequestReport
from superinfer.runtime.slo import SLO, STAGES, TokenTimeline, why_late_at_client


class CallReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call, seen from the program. Seconds; None where it does not apply.

    path: fork and variable scopes around the call, outermost first.
    slo: as promised to the call; its deadline is at most what the program had left then.
    planned_s: the deadline that was sent instead, so that what must follow has its time; None: the promised one was.
    started_s: after the program began.
    queue_s, prefill_s, rotated_s, copy_wait_s, preempted_s, decode_s: the engine's own account (see RequestReport).
    client_s: the rest of e2e_s, spent outside the engine; 0 where the engine counts more than that, for it counts a
        request from when it may have come at the earliest.
    met: None where nothing was promised. why: what cost most when late (slo.why_late_at_client), "budget" where nothing
        was left to begin with, "error" where the call failed, "overload" where the engine took it without its promise.
    degraded: the engine did that, for it could not be kept when the call came; in time or not.
    error: type and text of what ended the call, "" for none.
    """

    call: str
    path: tuple[str, ...] = ()
    slo: SLO | None = None
    started_s: float = 0.0
    planned_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float = 0.0
    max_tbt_s: float | None = None
    output_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    rotated_s: float | None = None
    copy_wait_s: float | None = None
    preempted_s: float | None = None
    decode_s: float | None = None
    client_s: float | None = None
    met: bool | None = None
    why: str = ""
    degraded: bool = False
    finish_reason: str | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """The program as a whole: its deadline and how long it took, or has taken so far."""

    name: str
    deadline_s: float | None
    elapsed_s: float
    finished: bool

    @property
    def met(self) -> bool | None:
        """None where there is no deadline."""
        return None if self.deadline_s is None else self.elapsed_s <= self.deadline_s


@dataclass(frozen=True)
class SLOReport:
    """A program's calls in the order they ended. `str()` is a table."""

    program: ProgramReport
    rows: tuple[CallReport, ...]

    @property
    def met(self) -> bool | None:
        """Whether every promise was kept, the program's own included. None where nothing was promised."""
        verdicts = [v for v in (self.program.met, *(row.met for row in self.rows)) if v is not None]
        return all(verdicts) if verdicts else None

    def __str__(self) -> str:
        head = ("call", "promised", "ttft", "max tbt", "e2e", *(name for name, _ in _STAGES), "met", "why late")
        lines = [_cells(row) for row in self.rows]
        program = self.program
        promised = "" if program.deadline_s is None else f"deadline {seconds(program.deadline_s)}"
        late = "" if program.met is not False else f"by {seconds(program.elapsed_s - (program.deadline_s or 0.0))}"
        nothing = ("",) * len(_STAGES)
        elapsed = seconds(program.elapsed_s)
        lines.append((f"= {program.name}", promised, "", "", elapsed, *nothing, _yes(program.met), late))
        return table(head, lines, words={0, 1, len(head) - 1})


# Columns of the table, and the rows' figures in them.
_STAGES = (
    ("queue", "queue_s"),
    ("prefill", "prefill_s"),
    ("rotated", "rotated_s"),
    ("copy wait", "copy_wait_s"),
    ("preempted", "preempted_s"),
    ("decode", "decode_s"),
    ("client", "client_s"),
)


def _cells(row: CallReport) -> tuple[str, ...]:
    return (
        "/".join((*row.path, row.call)),
        _promised(row.slo, row.planned_s),
        *(seconds(value) for value in (row.ttft_s, row.max_tbt_s, row.e2e_s)),
        *(seconds(getattr(row, field)) for _, field in _STAGES),
        _yes(row.met),
        f"{row.why} {row.error.partition(':')[0]}".strip(),
    )


def _promised(slo: SLO | None, planned: float | None) -> str:
    if slo is None:
        return ""
    named = (("ttft", slo.ttft), ("tbt", slo.tbt), ("deadline", slo.deadline), ("planned", planned))
    return ", ".join(f"{name} {seconds(value)}" for name, value in named if value is not None)


def seconds(value: float | None) -> str:
    """For people: ms below a second; "" for None."""
    if value is None:
        return ""
    return f"{value * 1000:.0f} ms" if abs(value) < 0.9995 else f"{value:.2f} s"


def _yes(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "NO"


def table(head: Iterable[str], lines: Iterable[Iterable[str]], *, words: Set[int]) -> str:
    """Aligned columns: those in `words` to the left, figures to the right."""
    rows = [tuple(head), *(tuple(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@dataclass
class CallWatch:
    """Watches one call from its start; `report` judges it with the function that judges everything."""

    call: str
    path: tuple[str, ...]
    slo: SLO | None
    planned: float | None = None
    started: float = field(default_factory=time.monotonic)
    timelines: dict[int, TokenTimeline] = field(default_factory=dict)
    engine: RequestReport | None = None
    ended: dict[int, float] = field(default_factory=dict)

    def now(self) -> float:
        return time.monotonic() - self.started

    def tokens(self, index: int, count: int) -> None:
        """`count` tokens of continuation `index` arrived together, now."""
        self.timelines.setdefault(index, TokenTimeline(self.slo)).tokens(count, self.now())

    def finished(self, index: int, engine: RequestReport | None) -> None:
        """Continuation `index` ended, now. Of several the slowest speaks for the call."""
        self.timelines.setdefault(index, TokenTimeline(self.slo))
        self.ended[index] = self.now()
        if engine is not None and (self.engine is None or engine.e2e_s > self.engine.e2e_s):
            self.engine = engine

    def report(
        self,
        finish_reason: str | None = None,
        error: BaseException | None = None,
        why: str = "",
        began: float | None = None,
    ) -> CallReport:
        """The row of this call, as ended now. began: when its program did, on this watch's clock."""
        e2e, engine, lines = self.now(), self.engine, self.timelines
        # Cut off at its deadline: late, though the engine counts a request from when it may have come at the earliest,
        # and what it has cut off may be here a little before that.
        met = self._met(e2e, failed=error is not None or finish_reason == "deadline")
        if met is False and not why:
            why = "error" if error is not None else self._why(e2e)
        firsts = [line.first for line in lines.values() if line.first is not None]
        gaps = [line.max_tbt for line in lines.values() if line.count > 1]
        return CallReport(
            call=self.call,
            path=self.path,
            slo=self.slo,
            started_s=self.started - began if began is not None else 0.0,
            planned_s=self.planned,
            ttft_s=max(firsts, default=None),
            e2e_s=e2e,
            max_tbt_s=max(gaps, default=None),
            output_tokens=self._output_tokens(),
            **{field: getattr(engine, field) for _, field in _STAGES[:-1] if engine is not None},
            client_s=max(0.0, e2e - engine.e2e_s) if engine else None,
            met=met,
            why=why if met is False else "",
            degraded=engine is not None and engine.degraded,
            finish_reason=finish_reason,
            error=f"{type(error).__name__}: {error}" if error is not None else "",
        )

    def _output_tokens(self) -> int:
        """A service's pieces of text may hold several tokens each: it says at the end how many there were."""
        seen = sum(line.count for line in self.timelines.values())
        told = self.engine.output_tokens * len(self.ended) if self.engine is not None else 0
        return max(seen, told)

    def _why(self, e2e: float) -> str:
        """What made it late, of a call that did not fail."""
        verdicts = [line.verdict(self.ended.get(index, e2e)) for index, line in self._lines().items()]
        lateness = max(verdict.lateness for verdict in verdicts)
        if self.engine is None:
            return "client"
        return why_late_at_client(lateness, *self._late_at_engine(self.engine))

    def _late_at_engine(self, engine: RequestReport) -> tuple[float | None, str]:
        """How late the engine was, and why: by what was promised, where it was sent a plan in its stead."""
        deadline = self.slo.deadline if self.slo is not None else None
        if self.planned is None or deadline is None:
            return engine.lateness_s, engine.why
        late = engine.e2e_s - deadline
        if late > 0 and engine.degraded:
            return late, "overload"
        if late > 0:
            spent = {stage: getattr(engine, field) for stage, (_, field) in zip(STAGES[:-1], _STAGES[:-1], strict=True)}
            return late, max(spent, key=lambda stage: spent[stage])
        if engine.ttft_met is False or engine.tbt_met is False:
            return engine.lateness_s, engine.why
        return late, ""

    def _met(self, e2e: float, failed: bool) -> bool | None:
        if self.slo is None or not self.slo.promises_anything:
            return None
        if failed:
            return False
        return all(line.verdict(self.ended.get(index, e2e)).met for index, line in self._lines().items())

    def _lines(self) -> dict[int, TokenTimeline]:
        return self.timelines or {0: TokenTimeline(self.slo)}


class Ledger:
    """The rows of one program run, its forks' included."""

    def __init__(self, name: str, deadline: float | None) -> None:
        self.name = name
        self.deadline = deadline
        self.started = time.monotonic()
        self.ended: float | None = None
        self.rows: list[CallReport] = []

    def report(self) -> SLOReport:
        """All calls that have ended by now."""
        end = self.ended if self.ended is not None else time.monotonic()
        program = ProgramReport(
            name=self.name,
            deadline_s=self.deadline,
            elapsed_s=end - self.started,
            finished=self.ended is not None,
        )
        return SLOReport(program, tuple(self.rows))
