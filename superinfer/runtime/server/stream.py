"""Sends answers: whole ones and server-sent events; and notices a client that goes away or does not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from superinfer.runtime.server.connection import Shortcut, shortcut_of
from superinfer.runtime.server.errors import as_api_error
from superinfer.runtime.server.relay import ClientGone, Feed
from superinfer.runtime.text import TextDelta, TextResult

T = TypeVar("T")

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # no proxy may keep tokens back
]


class Writer(Protocol):
    """Turns an answer's deltas into bytes. `event_end` closes a stream that ended well."""

    event_end: bytes

    def events(self, delta: TextDelta) -> Iterable[bytes]:
        """Server-sent events of one delta; after the last one, the closing ones too."""

    def failure(self, error: BaseException) -> bytes:
        """The event of an error after the first token."""

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of a request that was not streamed."""


def event(data: bytes, kind: bytes = b"") -> bytes:
    """One server-sent event."""
    return b"event: " + kind + b"\ndata: " + data + b"\n\n" if kind else b"data: " + data + b"\n\n"


def error_event(error: BaseException) -> bytes:
    """How most streams end that fail: no [DONE] follows."""
    return event(as_api_error(error).encode(), b"error")


@contextlib.contextmanager
def watched(scope: Scope, receive: Receive, gone: Callable[[], object]) -> Iterator[None]:
    """Calls `gone` once the client disconnects.

    The request's body must have been read: what the client sends next can then only be its farewell.
    """
    shortcut = shortcut_of(scope)
    if shortcut is not None:
        shortcut.watch(gone)
        try:
            yield
        finally:
            shortcut.unwatch()
        return

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled with ClientGone raised once the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    with watched(http.scope, http.receive, leave):
        try:
            return await task
        except asyncio.CancelledError:
            if gone:
                raise ClientGone from None
            raise


async def collect(feed: Feed, choices: int) -> list[TextResult]:
    """All choices, finished."""
    results = [TextResult(index) for index in range(choices)]
    while deltas := await feed.get():
        for delta in deltas:
            results[delta.index].add(delta)
    return results


class EventStream(Response):
    """Server-sent events of a feed whose first deltas are here. Several that are ready go out as one write.

    It owns the feed. `write_timeout`: seconds that a client may take to read anything, before it counts as gone.
    """

    def __init__(
        self, feed: Feed, first: list[TextDelta], writer: Writer, *, write_timeout: float, opening: bytes = b""
    ) -> None:
        super().__init__(status_code=200)
        self.raw_headers = list(EVENT_HEADERS)
        self._feed, self._first, self._writer = feed, first, writer
        self._write_timeout, self._opening = write_timeout, opening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        task = asyncio.current_task()
        assert task is not None
        stalled = _Stall(self._write_timeout, task.cancel)
        shortcut = shortcut_of(scope)
        try:
            with self._feed, watched(scope, receive, self._feed.leave):
                if shortcut is not None:
                    shortcut.hold()
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    end = await self._pump(send, stalled, shortcut)
                except ClientGone:
                    return
                except Exception as error:
                    end = self._writer.failure(error)
                finally:
                    if shortcut is not None:
                        shortcut.let_go()
                stalled.since = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": end})
        except asyncio.CancelledError:
            if not stalled.fired:
                raise
            if shortcut is not None:
                shortcut.abort()
                await asyncio.sleep(0)  # the server hears of it
        finally:
            stalled.stop()

    async def _pump(self, send: Send, stalled: _Stall, shortcut: Shortcut | None) -> bytes:
        deltas, body, now = self._first, self._opening, asyncio.get_running_loop().time
        if shortcut is not None:
            self._feed.straight = _Straight(self._writer, shortcut)
        while deltas:
            body += b"".join([chunk for delta in deltas for chunk in self._writer.events(delta)])
            if self._feed.is_over:
                break
            if body:
                stalled.since = now()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                stalled.since = None
            if shortcut is not None:
                shortcut.let_go()
            body = b""
            deltas = await self._feed.get()
        return body + self._writer.event_end


class _Straight:
    """Writes deltas as they come, where the client keeps up: no task has to wake for them."""

    def __init__(self, writer: Writer, shortcut: Shortcut) -> None:
        self._events, self._shortcut = writer.events, shortcut

    @property
    def is_open(self) -> bool:
        """Whether the client keeps up."""
        return self._shortcut.is_open

    def write(self, deltas: list[TextDelta]) -> None:
        """Sends them."""
        # Most of the time one delta makes one event.
        events = list(self._events(deltas[0])) if len(deltas) == 1 else [e for d in deltas for e in self._events(d)]
        if events:
            self._shortcut.push(events[0] if len(events) == 1 else b"".join(events))


class _Stall:
    """Calls `act` once a write has taken `timeout` seconds. One timer for a whole stream, not one for each write."""

    def __init__(self, timeout: float, act: Callable[[], object]) -> None:
        self.since: float | None = None
        self.fired = False
        self._timeout, self._act = timeout, act
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout / 2, self._check)

    def _check(self) -> None:
        if self.since is not None and self._loop.time() - self.since > self._timeout:
            self.fired = True
            self._act()
        else:
            self._timer = self._loop.call_later(self._timeout / 2, self._check)

    def stop(self) -> None:
        """No more checks."""
        self._timer.cancel()
