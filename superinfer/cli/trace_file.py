"""An engine's trace read back: steps, copies, and the life of each request. docs/tracing.md says what is in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from superinfer.errors import InvalidRequestError
from superinfer.runtime.tracing import ENGINE, REQUESTS

WAITING, PREFILL, DECODE = "waiting", "prefill", "decode"
MOVING_OUT, IN_HOST, MOVING_IN = "moving out", "in host memory", "moving in"
_PLACE = {
    "queue": WAITING,
    "preempted": WAITING,
    "prefill": PREFILL,
    "decode": DECODE,
    "rotated out": IN_HOST,
    "copy wait": MOVING_IN,
}


class Span(NamedTuple):
    """What lasted from `begin` to `end`, seconds since the engine began to build itself."""

    name: str
    begin: float
    end: float
    args: dict[str, Any]


@dataclass
class Life:
    """One request. stages: as the scheduler has them, in order; moves: its copies out and in."""

    id: int
    stages: list[Span] = field(default_factory=list)
    moves: list[Span] = field(default_factory=list)

    def places(self) -> list[Span]:
        """Where it was, in order, none over another: its stages, and in them the times in which its KV was moving."""
        found = []
        for stage in self.stages:
            place = _PLACE.get(stage.name, stage.name)
            moving = MOVING_OUT if place == IN_HOST else MOVING_IN
            at = stage.begin
            for move in self.moves if place != WAITING else ():
                begin, end = max(at, move.begin), min(stage.end, move.end)
                if move.name == moving and begin < end:
                    found += [Span(place, at, begin, {}), Span(moving, begin, end, {})]
                    at = end
            found.append(Span(place, at, stage.end, {}))
        return [span for span in found if span.end > span.begin]


@dataclass
class EngineTrace:
    """tracks: by thread of the engine (`superinfer.runtime.tracing.STEPS` and so on). lives: by request."""

    tracks: dict[int, list[Span]] = field(default_factory=dict)
    lives: dict[int, Life] = field(default_factory=dict)


def read_trace(path: Path) -> EngineTrace:
    """Also of an engine that was killed. Raises InvalidRequestError where there is no engine's trace."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidRequestError(f"the trace {str(path)!r} cannot be read: {why}") from None
    events = _events(text)
    names = {e["args"]["name"] for e in events if e.get("name") == "process_name"} if events else set()
    if not events or "engine" not in names:
        raise InvalidRequestError(f"{str(path)!r} is no trace of an engine: make one with --trace FILE")
    trace = EngineTrace()
    begun: dict[tuple[str, int], float] = {}
    for event in events:
        if event["ph"] == "X" and event["pid"] == ENGINE:
            at = event["ts"] / 1e6
            span = Span(event["name"], at, at + event["dur"] / 1e6, event.get("args", {}))
            trace.tracks.setdefault(event["tid"], []).append(span)
        elif event["ph"] in ("b", "e") and event["pid"] == REQUESTS and not event["name"].startswith("request "):
            key = event["name"], event["id"]
            if event["ph"] == "b":
                begun[key] = event["ts"] / 1e6
            elif key in begun:
                life = trace.lives.setdefault(event["id"], Life(event["id"]))
                span = Span(event["name"], begun.pop(key), event["ts"] / 1e6, {})
                (life.stages if event["cat"] == "request" else life.moves).append(span)
    return trace


def _events(text: str) -> list[dict[str, Any]]:
    """[] where it is no list of events. What a killed engine wrote last may be half a line."""
    try:
        events = json.loads(text)
    except json.JSONDecodeError:
        try:
            events = json.loads(text[: text.rfind("\n") + 1].rstrip().rstrip(",") + "]")
        except json.JSONDecodeError:
            return []
    return events if isinstance(events, list) and all(isinstance(e, dict) and "ph" in e for e in events) else []
