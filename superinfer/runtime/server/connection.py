"""One HTTP connection: uvicorn's, with two shortcuts that streams need: write without waiting, and cut the line.

ASGI's `send` is a coroutine under every layer of the application. A stream of tokens would pay for all of them, and for
the task that waits, with each token. Where the connection takes more bytes at once, `Shortcut.push` hands them to it in
place; where it does not, `send` waits as usual.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

EXTENSION = "superinfer.shortcut"


class Shortcut:
    """Of one request. pushed: bytes written so far, which `send` never saw."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._cycle: Any = None
        self.pushed = 0

    def bind(self, cycle: Any) -> None:
        """uvicorn's state of the answer."""
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """Whether `push` may be called now: the answer has begun, and its client keeps up."""
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
            and not cycle.transport.is_closing()
        )

    def push(self, body: bytes) -> None:
        """Write a part of the body, only while `is_open`."""
        self.pushed += len(body)
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def abort(self) -> None:
        """Cut the connection now: closing it would wait until the client has read what is on its way."""
        self._protocol.transport.abort()


def shortcut_of(scope: Scope) -> Shortcut | None:
    """None where another server runs the application."""
    found: Shortcut | None = scope.get("extensions", {}).get(EXTENSION)
    return found


def http_protocol() -> Any:
    """For uvicorn's `http`: its own on httptools with the shortcut; "auto" where httptools is not installed."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class Protocol(HttpToolsProtocol):
        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._shortcut = Shortcut(self)
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[EXTENSION] = self._shortcut

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._shortcut.bind(self.cycle)

    return Protocol
