"""The shortcuts that streams need to their HTTP connection: write without waiting, hear at once that the client went
away, and cut the line.

ASGI's `send` is a coroutine under every layer of the application. A stream of tokens would pay for all of them, and for
the task that waits, with each token. Where the connection takes more bytes at once, `Shortcut.push` hands them to it in
place; where it does not, `send` waits as usual. That a client is gone ASGI tells whoever waits for its next message,
which takes a task for each request; the connection knows it anyway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from starlette.types import Scope

EXTENSION = "superinfer.shortcut"


class Shortcut:
    """Of one request. pushed: bytes written so far, which `send` never saw.

    The connection and the request hold on to it; it does not to them, or all that a request was would stay until Python
    looks for circles, which in a server it does seldom.
    """

    def __init__(self, protocol: Any) -> None:
        self._protocol: Callable[[], Any] = weakref.ref(protocol)
        self._cycle: Callable[[], Any] = _nothing
        self._gone: Callable[[], object] | None = None
        self.pushed = 0

    def bind(self, cycle: Any) -> None:
        """uvicorn's state of the answer."""
        self._cycle = weakref.ref(cycle)

    @property
    def is_open(self) -> bool:
        """Whether `push` may be called now: the answer has begun, and its client keeps up."""
        cycle = self._cycle()
        return (
            cycle is not None
            and bool(cycle.chunked_encoding)
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
            and not cycle.transport.is_closing()
        )

    def push(self, body: bytes) -> None:
        """Write a part of the body, only while `is_open`."""
        self.pushed += len(body)
        self._cycle().transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def hold(self) -> None:
        """Keep what `send` writes until `let_go`: the head of an answer and its first part are then one write."""
        cycle = self._cycle()
        cycle.transport = _Held(cycle.transport)

    def let_go(self) -> None:
        """Write what was held. Safe to call without it."""
        cycle = self._cycle()
        if isinstance(cycle.transport, _Held):
            held, cycle.transport = cycle.transport, cycle.transport.transport
            held.flush()

    def watch(self, gone: Callable[[], object]) -> None:
        """Call `gone` once the connection is lost, until `unwatch`. The request's body must have been read."""
        self._cycle().flow.resume_reading()  # a connection that is not read from does not tell of its end
        protocol = self._protocol()
        if protocol is None or protocol.is_lost:
            gone()
            return
        self._gone = gone
        protocol.watching.add(self)

    def unwatch(self) -> None:
        """Safe to call twice."""
        self._gone = None
        if (protocol := self._protocol()) is not None:
            protocol.watching.discard(self)

    def lost(self) -> None:
        """The connection is lost."""
        if self._gone is not None:
            self._gone()

    def abort(self) -> None:
        """Cut the connection now: closing it would wait until the client has read what is on its way."""
        if (protocol := self._protocol()) is not None:
            protocol.transport.abort()


def _nothing() -> None:
    """In place of a reference, before there is one."""


class _Held:
    """In place of a transport: what uvicorn writes of one answer stays here."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.parts: list[bytes] = []
        self.write = self.parts.append
        self.is_closing = transport.is_closing

    def flush(self) -> None:
        if self.parts:
            self.transport.write(b"".join(self.parts))
            self.parts.clear()

    def close(self) -> None:
        self.flush()
        self.transport.close()


def shortcut_of(scope: Scope) -> Shortcut | None:
    """None where another server runs the application."""
    found: Shortcut | None = scope.get("extensions", {}).get(EXTENSION)
    return found
