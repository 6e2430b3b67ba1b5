"""In front of every route: who may come in, how many, and how much each may send. Plain ASGI: it adds no task."""

from __future__ import annotations

import contextlib
import hmac
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from typing import TextIO

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from superinfer.runtime.server.connection import shortcut_of
from superinfer.runtime.server.errors import ApiError
from superinfer.runtime.server.service import key_of
from superinfer.runtime.server.settings import ServerSettings

# What needs no key: probes, and what browsers load before a person can give one. None of it tells of requests.
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/openapi.json")) | {
    f"/{file.name}" for file in (files("superinfer.runtime.server") / "page").iterdir()
}
# Answered however many requests there are: that is when they are needed.
FREE_PATHS = OPEN_PATHS | {"/metrics", "/v1/live"}

Finished = Callable[[Scope, int, float], None]


class TooLarge(ApiError):
    """The request body is over the limit."""

    def __init__(self, limit: int) -> None:
        shown = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
        super().__init__(413, f"the request body is over {shown}; send less at once", code="request_too_large")


class _Body:
    """Counts a request's body as it comes: its length may not have been told."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self._gate, self._receive = gate, receive
        self.taken = 0

    async def receive(self) -> Message:
        """ASGI's, for the application."""
        message = await self._receive()
        if body := message.get("body"):
            self._gate.take(len(body), self.taken)
            self.taken += len(body)
        return message


class Gate:
    """ASGI middleware: API keys, the number of requests at a time, the size of their bodies, of each and of
    all, the access log."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, *, finished: Finished | None = None, log: TextIO | None = None
    ) -> None:
        """`finished(scope, status, seconds)` is called after each request. `log`: of accesses; stderr."""
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._max_body, self._max_total = settings.max_body_bytes, settings.max_total_body_bytes
        self._max_concurrent = settings.max_concurrent
        self._running = 0
        self._held = 0  # bytes of the bodies of requests being answered
        self._finished = finished
        self._log = (log or sys.stderr) if settings.access_log else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 0, 0

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif scope["method"] != "HEAD":  # which is told of the body and not given it
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._let_in(scope, receive, watched)
        finally:
            took = time.perf_counter() - began
            if self._finished is not None:
                self._finished(scope, status or 499, took)
            if self._log is not None:
                shortcut = shortcut_of(scope)
                self._say(scope, status or 499, took, sent + (shortcut.pushed if shortcut is not None else 0))

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        refused = self._refusal(path, headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        counted = path not in FREE_PATHS
        self._running += counted
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._running -= counted
            self._held -= body.taken

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._keys and path not in OPEN_PATHS:
            key = key_of(headers).encode()
            # Compared in constant time, so that nobody can find a key letter by letter.
            if not any([hmac.compare_digest(key, known) for known in self._keys]):
                said = "the API key is not one of this server's" if key else "no API key was sent"
                message = f"{said}; send `Authorization: Bearer KEY`"
                challenge = {"www-authenticate": "Bearer"}
                return ApiError(401, message, code="invalid_api_key", headers=challenge)
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            message = f"content-encoding={encoding!r:.80} is not supported: send the body as it is, not compressed"
            return ApiError(415, message, param="content-encoding", code="unsupported_encoding")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            return TooLarge(self._max_body)
        if self._running >= self._max_concurrent and path not in FREE_PATHS:
            message = f"the server answers {self._running} requests already; try again later or raise --max-concurrent"
            return ApiError(
                429, message, code="too_many_requests", type="rate_limit_error", headers={"retry-after": "1"}
            )
        return None

    def take(self, size: int, taken: int) -> None:
        """A body that has `taken` bytes brings `size` more. Raises ApiError where that is too much."""
        if taken + size > self._max_body:
            raise TooLarge(self._max_body)
        if self._held + size > self._max_total:
            message = f"the server holds {self._held} bytes of requests already; try again later"
            raise ApiError(
                429, message, code="too_many_requests", type="rate_limit_error", headers={"retry-after": "1"}
            )
        self._held += size

    def _say(self, scope: Scope, status: int, took: float, sent: int) -> None:
        client = scope.get("client") or ("", 0)
        line = {
            "time": round(time.time(), 3),
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(took * 1e3, 3),
            "bytes": sent,
        } | scope.get("superinfer.log", {})
        assert self._log is not None
        # A log whose reader is gone, or whose disk is full, is no reason to cut connections under their answers; and
        # there is nowhere to say it.
        with contextlib.suppress(OSError):
            self._log.write(msgspec.json.encode(line).decode() + "\n")
            self._log.flush()
