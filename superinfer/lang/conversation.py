"""What lives on between the turns of a session; what a turn takes from it and leaves to it. See docs/sessions.md."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.lang.backend import Backend
from superinfer.lang.history import History
from superinfer.lang.planner import Pauses
from superinfer.lang.promise import check_deadline, check_pause, check_slo
from superinfer.lang.prompt import RenderChat, Transcript
from superinfer.lang.variable import Variable
from superinfer.runtime.slo import SLO

_ROLES = ("system", "user", "assistant", "tool")


class Conversation:
    """The state of a session. One turn at a time; safe to use from any thread.

    name: under which the time between turns is learnt in `history`. slo, deadline: of each turn. tool_s, idle_s:
    expected seconds between two calls of a turn, and between two turns; used until they have been learnt.
    """

    def __init__(
        self,
        *,
        name: str,
        history: History,
        backend: Backend | None,
        slo: SLO | None,
        deadline: float | None,
        slo_class: str,
        tool_s: float | None,
        idle_s: float | None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.name = name
        self.history = history
        self.backend = backend
        self.slo = check_slo(slo)
        self.deadline = check_deadline(deadline)
        self.slo_class = slo_class
        self.tool_s = check_pause("tool_s", tool_s)
        self.idle_s = check_pause("idle_s", idle_s)
        self.turns = 0
        self._transcript = Transcript(_no_template)
        self._variables: dict[str, tuple[Any, Any]] = {}  # value and meta info
        self._lock = threading.Lock()
        self._running = False
        self._closed = False
        self._ended_at: float | None = None
        self._group: str | None = None

    def say(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
        """Begin with tools and messages. Raises InvalidRequestError for what is no message of text."""
        self._transcript.tools = tuple(tools)
        for at, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            content = message.get("content") if isinstance(message, dict) else None
            if role not in _ROLES or not isinstance(content, str):
                raise InvalidRequestError(
                    f"message {at} is {message!r:.80}; give {{'role': one of {', '.join(_ROLES)}, 'content': text}}"
                )
            self._transcript.begin(role)
            self._transcript.add(content)
            self._transcript.end(role)

    def take_from(self, other: Conversation) -> None:
        """Begin with all that `other` has said and made so far."""
        with other._lock:
            self._transcript, self._variables = other._transcript.copy(), dict(other._variables)

    # ------------------------------------------------------------------ a turn

    def begin(self) -> None:
        """A turn begins. Raises InvalidRequestError while another one runs, and after `close`."""
        with self._lock:
            if self._closed:
                raise InvalidRequestError("the session is closed; make a new one with messages=session.messages()")
            if self._running:
                raise InvalidRequestError(
                    "a turn of this session is still running: one comes after the other; wait for it, or use fork()"
                )
            self._running = True
            ended = self._ended_at
        if ended is not None:
            self.history.learn_idle(self.name, time.monotonic() - ended)

    def transcript(self, render: RenderChat) -> Transcript:
        """What a turn begins with."""
        with self._lock:
            return self._transcript.copy(render)

    def variables(self) -> dict[str, Variable]:
        """What turns before have made, for the next one to read."""
        with self._lock:
            return {name: Variable.of(value, meta) for name, (value, meta) in self._variables.items()}

    def end(self, transcript: Transcript | None, variables: dict[str, Variable]) -> None:
        """The turn has ended, with this transcript; None: it failed, and nothing has happened."""
        with self._lock:
            self._running = False
            if transcript is None:
                return
            self._transcript = transcript.copy(_no_template)
            made = {name: v for name, v in variables.items() if v.done and v.outcome.error is None}
            self._variables = {name: (v.outcome.result(), v.meta) for name, v in made.items()}
            self.turns += 1
            self._ended_at = time.monotonic()

    def finish(self) -> None:
        """No more turns. Safe to call twice."""
        with self._lock:
            was_used = not self._closed and self._ended_at is not None
            self._closed = True
        if was_used:
            self.history.learn_idle(self.name, None)

    # ------------------------------------------------------------------ what the engine is told

    def pauses(self) -> Pauses:
        """How long its text waits to be extended: as learnt, else as given."""
        known = self.history.program(self.name)
        idle = self.idle_s
        if known is not None and known.turns:
            idle = known.idle if known.followed >= 0.5 else None
        return Pauses(self.tool_s, idle)

    def group(self) -> str:
        """Of its very first call: equal for sessions that begin alike; "" if it begins with nothing, and later on."""
        with self._lock:
            parts = self._transcript.messages()
            if self.turns or not (parts or self._transcript.tools):
                return ""
            if self._group is None:
                beginning = msgspec.json.encode([parts, self._transcript.tools])
                self._group = f"session {hashlib.blake2b(beginning, digest_size=12).hexdigest()}"
            return self._group

    def __repr__(self) -> str:
        state = "closed" if self._closed else "in a turn" if self._running else "idle"
        return f"<{type(self).__name__} {self.name!r}, {self.turns} turns, {state}>"


def _no_template(messages: Sequence[dict[str, Any]], **options: Any) -> str:
    raise AssertionError("a session's transcript is shown by the backend of a turn")
