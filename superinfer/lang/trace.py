"""A program's calls over time, for ui.perfetto.dev: from the same rows as `slo_report()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.lang.report import CallReport, SLOReport


class ProgramTrace:
    """Calls that had ended when it was made. One track for the program and one for each fork and scope.

    events: Chrome trace events; times in microseconds after the program began.
    """

    def __init__(self, report: SLOReport) -> None:
        self.events = _events(report)

    def save(self, path: str | Path) -> Path:
        """Write a file that ui.perfetto.dev opens. Raises InvalidRequestError where it cannot be written."""
        try:
            Path(path).write_bytes(msgspec.json.encode({"traceEvents": self.events}))
        except OSError as error:
            raise InvalidRequestError(f"the trace {str(path)!r} cannot be written: {error.strerror}") from None
        return Path(path)


def _events(report: SLOReport) -> list[dict[str, Any]]:
    program = report.program
    tracks: dict[tuple[str, ...], int] = {}
    calls: list[dict[str, Any]] = []
    for row in report.rows:
        tid = tracks.setdefault(row.path, len(tracks) + 1)
        calls.append(_slice(tid, row.call, row.started_s, row.e2e_s, _told(row)))
        if row.ttft_s is not None:
            first = {"ph": "i", "s": "t", "pid": 1, "tid": tid, "name": "first token"}
            calls.append({**first, "ts": _us(row.started_s + row.ttft_s)})
    promised = {"deadline_s": program.deadline_s, "met": program.met, "finished": program.finished}
    names = [_name("process_name", 0, f"program {program.name}"), _name("thread_name", 0, "program")]
    names += [_name("thread_name", tid, "/".join(path) or "calls") for path, tid in tracks.items()]
    return [*names, _slice(0, program.name, 0.0, program.elapsed_s, promised), *calls]


def _told(row: CallReport) -> dict[str, Any]:
    """All of the row that has a value."""
    fields = msgspec.to_builtins(row)
    return {
        name: value for name, value in fields.items() if value not in (None, "", ()) and name not in ("call", "path")
    }


def _slice(tid: int, name: str, begin_s: float, took_s: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": _us(begin_s), "dur": _us(took_s), "args": args}


def _name(kind: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": tid, "name": kind, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
