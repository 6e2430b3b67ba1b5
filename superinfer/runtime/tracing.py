"""A trace of steps, copies and requests for ui.perfetto.dev, as Chrome trace events. Pure Python; time is an argument.

The engine and the simulator tell a `TraceRecorder` the same things at the same places, each on its own clock. Events
are written as they come and no more than `max_events` of them: a trace that was cut off, or whose writer was killed,
can still be opened. See docs/tracing.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.runtime.kv.tiers import TierTable
from superinfer.runtime.scheduler.base import SchedulerCounts
from superinfer.runtime.scheduler.cost import StepLoad
from superinfer.runtime.scheduler.plan import StepPlan, StepResult
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.stages import ROTATED

log = logging.getLogger("superinfer.trace")

MAX_EVENTS = 300_000  # about 45 MB
ENGINE, REQUESTS = 1, 2  # processes of the trace
STEPS, SCHEDULER, COPIES_IN, COPIES_OUT, MIRRORING = 1, 2, 3, 4, 5  # threads of ENGINE

_NAMES = {
    STEPS: "steps",
    SCHEDULER: "scheduler",
    COPIES_IN: "copies in (DRAM to HBM)",
    COPIES_OUT: "copies out (HBM to DRAM)",
    MIRRORING: "mirroring (HBM to DRAM, ahead of need)",
}


class _Step(NamedTuple):
    """A step under way. begun: when it was handed to the executor. load: as the cost model has it."""

    begun: float
    load: StepLoad
    waits: int


class _Move(NamedTuple):
    """A request on its way from one tier to the other: under way until no copy of `left` is."""

    request: int
    name: str
    begun: float
    left: set[int]


class TraceRecorder:
    """Times are seconds on one clock of the caller's, which begins at `origin`. Where the disk takes no more, a warning
    says so and the trace ends there: whom it follows goes on."""

    def __init__(self, path: str | Path, origin: float, *, max_events: int = MAX_EVENTS) -> None:
        """Raises InvalidRequestError where the file cannot be written."""
        try:
            self._file = open(path, "wb")  # noqa: SIM115 - it stays open as long as the recorder
        except OSError as error:
            raise InvalidRequestError(f"the trace {str(path)!r} cannot be written: {error.strerror}") from None
        self._origin = origin
        self._left = max_events
        self._encode = msgspec.json.Encoder().encode
        self._steps: dict[int, _Step] = {}
        self._copies: dict[int, tuple[bool, float]] = {}  # under way: out?, when started
        self._rotated: set[int] = set()  # of these, the copies out that rotations planned; the others are mirrors
        self._moves: list[_Move] = []
        self._last_copy = 0
        self._free_at = dict.fromkeys((STEPS, COPIES_IN, COPIES_OUT, MIRRORING), origin)
        self._followed: set[int] = set()
        self._put(b"[\n")
        for pid, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
            self._write({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        for tid, name in _NAMES.items():
            self._write({"ph": "M", "pid": ENGINE, "tid": tid, "name": "thread_name", "args": {"name": name}})
            order = {"sort_index": tid}
            self._write({"ph": "M", "pid": ENGINE, "tid": tid, "name": "thread_sort_index", "args": order})

    # ------------------------------------------------------------------ what happens

    def follow(self, sequence: Sequence) -> None:
        """From now on, draw the stages of a sequence, which has just arrived."""
        if self._left <= 0:
            return
        slo = msgspec.to_builtins(sequence.slo) if sequence.slo is not None else {}
        told = {"prompt_tokens": sequence.num_prompt, "max_tokens": sequence.max_tokens, "slo": slo}
        self._followed.add(sequence.id)
        self._async("b", f"request {sequence.id}", sequence.id, sequence.arrival, told)
        sequence.stages.watch = partial(self._stage, sequence)

    def planned(self, plan: StepPlan | None, begin: float, end: float) -> None:
        """The scheduler planned from `begin` to `end`, and then handed the step to the executor."""
        if plan is None or self._left <= 0:
            return
        self._slice(SCHEDULER, "plan", begin, end, {"step": plan.step})
        self._steps[plan.step] = _Step(end, StepLoad.of(plan), len(plan.waits))
        for copy in plan.copies:
            self._copies[copy.id] = (copy.out, end)
            self._last_copy = copy.id

    def submitted(self, step: int, begin: float, end: float) -> None:
        """The host gave a planned step to the device from `begin` to `end`."""
        if step in self._steps:
            self._slice(SCHEDULER, "submit", begin, end, {"step": step})

    def finished(self, result: StepResult, now: float, committed: float) -> None:
        """A step's result came at `now` and was taken in until `committed`."""
        step = self._steps.pop(result.step, None)
        if step is None or self._left <= 0:
            return
        load, prefill_tokens = step.load, step.load.tokens - step.load.decodes
        kind = "mixed" if load.decodes and prefill_tokens else "decode" if load.decodes else "prefill"
        told = {
            "step": result.step,
            "tokens": load.tokens,
            "decodes": load.decodes,
            "prefill_tokens": prefill_tokens,
            "kv_read": load.kv_read,
            "pairs": load.pairs,
            "executor_ms": result.elapsed * 1e3,
            "waited_for_copies": step.waits,
            "stall_ms": result.link.stall_s * 1e3,
        }
        self._in_turn(STEPS, kind if load.tokens else "copies only", step.begun, now, told)
        self._copies_over(result, now)
        self._slice(SCHEDULER, "commit", now, committed, {"step": result.step})

    def lost(self, step: int, now: float) -> None:
        """A step failed."""
        known = self._steps.pop(step, None)
        if known is not None:
            self._in_turn(STEPS, "failed", known.begun, now, {"step": step, "tokens": known.load.tokens})

    def gauges(self, counts: SchedulerCounts, now: float) -> None:
        """Draw the counts as lines over time."""
        self._counter("sequences", now, {"running": counts.running, "waiting": counts.waiting})
        self._counter("HBM blocks free", now, {"free": counts.blocks_free})
        if counts.tiers is not None:
            self._counter("DRAM blocks", now, {"free": counts.tiers.dram_free, "rotated out": counts.tiers.dram_pinned})

    def close(self, now: float) -> None:
        """End what is open and close the file. Safe to call twice."""
        if self._file.closed:
            return
        self._end_requests(now)
        self._put(b'{"ph":"M","pid":1,"name":"process_sort_index","args":{"sort_index":0}}\n]\n')
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    # ------------------------------------------------------------------ how it is drawn

    def _copies_over(self, result: StepResult, now: float) -> None:
        """One slice for each track: from when the first of these copies could begin, to the report that they are over.
        A direction's copies go one after another, so a slice begins where the last one ended; what the link was busy
        out is shared among rotations and mirrors by their blocks."""
        failed = set(result.failed_copies)
        known = {id: self._copies.pop(id) for id in (*result.copied, *failed) if id in self._copies}
        over, out = set(known), {id for id, (is_out, _) in known.items() if is_out}
        rotated = out & self._rotated
        self._rotated -= rotated
        for tid, ids, in_all, busy in (
            (COPIES_IN, over - out, len(over - out), result.link.in_s),
            (COPIES_OUT, rotated, len(out), result.link.out_s),
            (MIRRORING, out - rotated, len(out), result.link.out_s),
        ):
            if not ids:
                continue
            begun = min(known[id][1] for id in ids)
            told = {"blocks": len(ids), "failed": len(failed & ids), "ids": _range(ids)}
            self._in_turn(tid, "copy", begun, now, {**told, "link_busy_ms": busy * 1e3 * len(ids) / in_all})
        self._moves_over(over, now)

    def _moves_over(self, over: set[int], now: float) -> None:
        for move in self._moves:
            move.left.difference_update(over)
            if not move.left:
                self._span(move.name, move.request, move.begun, now, cat=move.name)
        self._moves = [move for move in self._moves if move.left]

    def _stage(self, sequence: Sequence, stage: str, begin: float, end: float) -> None:
        id = sequence.id
        if id not in self._followed:
            return
        if not stage:
            self._followed.discard(id)
            told = {"output_tokens": sequence.num_output, "finish_reason": sequence.finish_reason}
            self._async("e", f"request {id}", id, end, told)
        elif end > begin:
            self._span(stage, id, begin, end)
        if stage and isinstance(sequence.table, TierTable):
            self._note_move(id, sequence.table, stage, end)

    def _note_move(self, id: int, table: TierTable, ended: str, now: float) -> None:
        """A stage has ended: the sequence may have been rotated out, or have come back."""
        if table.parked:
            self._rotated.update(table.leaving)
            name, copies = "moving out", table.leaving
        elif ended == ROTATED:
            name, copies = "moving in", table.awaits
        else:
            return
        # Those of the plan being made are not known yet; others that are not known are over.
        left = {copy for copy in copies if copy in self._copies or copy > self._last_copy}
        if left:
            self._moves.append(_Move(id, name, now, left))

    def _async(self, kind: str, name: str, id: int, at: float, args: dict[str, Any] | None = None) -> None:
        self._write(self._event(kind, name, id, at) | ({"args": args} if args else {}), at=at)

    def _span(self, name: str, id: int, begin: float, end: float, cat: str = "request") -> None:
        """Its begin and its end: neither or both, however many events are left."""
        self._write(self._event("b", name, id, begin, cat), self._event("e", name, id, end, cat), at=end)

    def _event(self, kind: str, name: str, id: int, at: float, cat: str = "request") -> dict[str, Any]:
        return {"ph": kind, "cat": cat, "name": name, "id": id, "pid": REQUESTS, "tid": 0, "ts": self._us(at)}

    def _in_turn(self, tid: int, name: str, begin: float, end: float, args: dict[str, Any]) -> None:
        """A slice on a track that has one at a time: it begins when the one before it ended."""
        begin = max(begin, self._free_at[tid])
        self._free_at[tid] = end
        self._slice(tid, name, begin, end, args)

    def _slice(self, tid: int, name: str, begin: float, end: float, args: dict[str, Any]) -> None:
        event = {"ph": "X", "pid": ENGINE, "tid": tid, "name": name, "ts": self._us(begin), "args": args}
        self._write({**event, "dur": round(max(0.0, end - begin) * 1e6, 3)}, at=end)

    def _counter(self, name: str, at: float, values: dict[str, int]) -> None:
        self._write({"ph": "C", "pid": ENGINE, "name": name, "ts": self._us(at), "args": values}, at=at)

    def _us(self, at: float) -> float:
        return round((at - self._origin) * 1e6, 3)

    def _write(self, *events: dict[str, Any], at: float = 0.0) -> None:
        if self._left <= 0 or self._file.closed:
            return
        self._left -= len(events)
        for event in events:
            self._put(self._encode(event) + b",\n")
        if self._left <= 0:
            full = {"ph": "i", "s": "g", "pid": ENGINE, "tid": STEPS, "name": "the trace is full", "ts": self._us(at)}
            self._put(self._encode(full) + b",\n")
            self._end_requests(at)
            self._forget()

    def _put(self, text: bytes) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(text)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("the trace %r ends here, it cannot be written any more: %s", str(self._file.name), error.strerror)
        self._left = 0
        self._forget()
        with contextlib.suppress(OSError):  # of what it still held
            self._file.close()

    def _end_requests(self, now: float) -> None:
        """Those that still run end here for the trace, beyond its limit: a slice without an end cannot be drawn."""
        for id in sorted(self._followed):
            self._put(self._encode(self._event("e", f"request {id}", id, now)) + b",\n")
        self._followed.clear()

    def _forget(self) -> None:
        """What was under way: nothing more is drawn."""
        for known in (self._steps, self._copies, self._rotated, self._moves, self._followed):
            known.clear()


def _range(ids: Iterable[int]) -> str:
    """Ids of copies, as first … last."""
    found = sorted(ids)
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} … {found[-1]}"
