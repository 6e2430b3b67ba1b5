"""How HTTP/1.1 is spoken on one connection: uvicorn's protocol, with the shortcut that streams take, and with limits on
what a client may do to it; see docs/serving.md, *Under load*.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from http import HTTPStatus
from typing import Any, Literal

from superinfer.runtime.server.connection import EXTENSION, Shortcut
from superinfer.runtime.server.errors import STOPPING, ApiError, bad_request
from superinfer.runtime.server.unread import UnreadWatch

# Of a request line and its headers, bytes. The parser joins a header from its pieces: one of 200 MiB takes it a minute,
# in which no stream goes on.
MAX_HEAD = 65_536
# Seconds within which each piece of a body must come when the server is ending: as long as a busy network may take.
STOPPING_PATIENCE_S = 2.0

# In place of uvicorn's, which has a line for all that is no HTTP: whoever reaches the port could fill the disk.
log = logging.getLogger(__name__)
log.setLevel(logging.ERROR)


def http_protocol(patience_s: float) -> Any:
    """For uvicorn's `http`: its own on httptools with the shortcut; "auto" where httptools is not installed.

    patience_s: seconds within which the head of a request must have come, and then each piece of its body; and within
    which a client must read some of what waits for it.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class Protocol(HttpToolsProtocol):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.logger = log
            self.is_lost = False
            self.watching: set[Shortcut] = set()  # more than one where a client sends without waiting for answers
            self._awaited: Literal["head", "body", ""] = "head"
            self._head = 0  # bytes of it so far
            self._came = b""
            self._since = 0.0  # when the head began, or the body's last piece came
            self._patience: Any = None
            self._patience_s = patience_s
            self._stopping = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._unread = UnreadWatch(transport, self.loop, patience_s, tls=self.scheme == "https")
            self._be_patient()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unset_keepalive_if_required()  # a timer that holds on to this, which goes on where it was reset
            self._lose_patience()
            self._unread.stop()
            self.is_lost = True
            for shortcut in list(self.watching):
                shortcut.lost()

        def pause_writing(self) -> None:
            """The client does not keep up. A stream waits for it; a whole answer is written, and is held here."""
            super().pause_writing()
            self._unread.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.scheme != "https":  # where this says nothing of what the client takes
                self._unread.stop()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.scheme == "https":
                self._unread.start()

        def shutdown(self) -> None:
            """The server ends. A request that is still to come is waited for while it comes, but not for long."""
            super().shutdown()
            self._stopping, self._patience_s = True, min(patience_s, STOPPING_PATIENCE_S)
            if self._patience is not None:
                self._lose_patience()
                self._check()
            if self.scheme == "https":
                self._unread.start()

        def data_received(self, data: bytes) -> None:
            self._came = data
            super().data_received(data)
            self._came = b""
            if not self._awaited:  # all of the request is here, as it mostly is at once
                self._lose_patience()
                return
            if self._awaited == "head":
                self._head += len(data)
                if self._head > MAX_HEAD:
                    self.send_400_response("")
                    return
            else:
                self._since = self.loop.time()
            if self._patience is None:
                self._be_patient()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._awaited, self._head = "head", 0
            self._shortcut = Shortcut(self)
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[EXTENSION] = self._shortcut

        def on_headers_complete(self) -> None:
            if self._head + len(self._came) > MAX_HEAD:  # what came now may hold more than the head
                size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
                if size > MAX_HEAD:
                    self._head = size
                    raise ValueError("the head is too large")  # out of the parser, to send_400_response
            if self._is_refused_upgrade():
                return  # without a task: see _unsupported_upgrade_warning
            self._awaited, self._since = "body", self.loop.time()
            super().on_headers_complete()
            self._shortcut.bind(self.cycle)

        def on_message_complete(self) -> None:
            if self._is_refused_upgrade():
                return
            self._awaited = ""
            super().on_message_complete()

        def _is_refused_upgrade(self) -> bool:
            return bool(self.parser.should_upgrade()) and not self._should_upgrade()

        def _unsupported_upgrade_warning(self) -> None:
            """Answers an offer of another protocol (Java's client offers h2c) as if it had not been made, as HTTP wants
            it. The parser takes all that follows the head for that protocol, so it gets the head again without it."""
            upgrade = sys.exc_info()[1]
            assert upgrade is not None
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":  # the one method that is itself an upgrade
                self._refuse(ApiError(405, "this server is no proxy", code="no_such_route"))
                return
            rest = self._came[upgrade.args[0] :]
            lines = [method + b" " + self.url + b" HTTP/" + version]
            lines += [name + b": " + _plain(name, value) for name, value in self.headers if name not in _OFFERS]
            self.parser = type(self.parser)(self)
            with contextlib.suppress(AttributeError):  # before httptools 0.6.3; as uvicorn sets it
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._head = 0
            super().data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP request, or one with too large a head."""
            if self._head > MAX_HEAD:
                message = f"the request line and headers are over {MAX_HEAD >> 10} KiB; send less"
                self._refuse(ApiError(431, message, code="headers_too_large"))
            else:
                self._refuse(bad_request("this is not a valid HTTP/1.1 request", code="invalid_http"))

        def _refuse(self, error: ApiError) -> None:
            """Answers without the application, and closes."""
            if self.transport.is_closing():
                return
            if not self._answers_another() and (self._awaited == "head" or not self.cycle.response_started):
                body = error.encode()
                lines = [
                    f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
                    "content-type: application/json",
                    f"content-length: {len(body)}",
                    "connection: close",
                ]
                self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.transport.close()

        def _answers_another(self) -> bool:
            """Whether an answer goes on, or is to come, before that to the request which is awaited."""
            if self._awaited == "head":
                return self.cycle is not None and not self.cycle.response_complete
            return bool(self.pipeline)

        def _be_patient(self) -> None:
            self._since = self.loop.time()
            self._patience = self.loop.call_later(self._patience_s, self._check)

        def _lose_patience(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _check(self) -> None:
            left = self._since + self._patience_s - self.loop.time()
            if self._answers_another():  # which is not to be cut: the client did not wait for it
                left = self._patience_s
            if left > 0:
                self._patience = self.loop.call_later(left, self._check)
                return
            self._patience = None
            if self._awaited == "head" and not self._head:  # a connection kept open in advance, and never used
                self.transport.close()
                return
            if self._stopping:
                self._refuse(ApiError(503, STOPPING, code="cancelled", type="server_error"))
                return
            message = f"the {self._awaited} of the request did not come within {patience_s:g} s"
            self._refuse(ApiError(408, message, code="request_timeout"))

    return Protocol


_OFFERS = (b"upgrade", b"http2-settings")


def _plain(name: bytes, value: bytes) -> bytes:
    """A header's value without what it says of an upgrade."""
    if name != b"connection":
        return value
    return b", ".join(part for part in (p.strip() for p in value.split(b",")) if part.lower() not in _OFFERS)
