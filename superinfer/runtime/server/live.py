"""The page at `/`, and GET /v1/live behind it: what the engine is doing now, as server-sent events.

However many look, the engine is asked once for all of them, at most every INTERVAL_S, and not at all while nobody does.
A viewer that reads slowly skips what it missed: nothing is kept for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from importlib.resources import files
from typing import NamedTuple

import msgspec
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from superinfer.errors import EngineDeadError, EngineUnavailableError
from superinfer.runtime.protocol import LiveReport, StatsReport
from superinfer.runtime.server.errors import ApiError, as_api_error
from superinfer.runtime.text import TextClient

INTERVAL_S = 0.25
ANSWER_TIMEOUT_S = 2.0
MAX_VIEWERS = 64
STOPPING = "the server is stopping"
MAX_REQUESTS = 400  # in one event, 60 kB: more than that many cards are not drawn

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
LIVE = "/v1/live"  # where the events are
HEADERS = {
    "cache-control": "no-cache",
    # Nothing is loaded from elsewhere, and no text that a model wrote can become code.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One event. at_s: this server's clock, to make rates of differences."""

    model: str
    policy: str
    device: str
    page_size: int
    at_s: float
    stats: StatsReport
    live: LiveReport


class Event(NamedTuple):
    """What all viewers are sent; after the `last` one they are let go."""

    data: bytes
    last: bool = False


class LiveFeed:
    """One engine's state, looked up for all viewers at once. Belongs to the event loop of `text`."""

    def __init__(self, text: TextClient, model: str) -> None:
        """`model`: what clients call it."""
        self._text = text
        self._model = model
        self.viewers = 0
        self._poller: asyncio.Task[None] | None = None
        self._next: asyncio.Future[Event] | None = None
        self._closed = False

    def close(self) -> None:
        """The server stops: every viewer is told so and let go, as is whoever comes later."""
        self._closed = True
        self._publish(_gone(EngineUnavailableError(STOPPING)))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """For one viewer, who is counted in `viewers`; they end when the engine dies or the server stops."""
        event = _gone(EngineUnavailableError(STOPPING)) if self._closed else Event(b"")
        while not event.last:
            if self._next is None:
                self._next = asyncio.get_running_loop().create_future()
            if self._poller is None or self._poller.done():
                self._poller = asyncio.create_task(self._poll())
            event = await asyncio.shield(self._next)
            yield event.data

    async def _poll(self) -> None:
        while self.viewers and not self._closed:
            started = time.monotonic()
            event = await self._look()
            self._publish(event)
            if event.last:
                return
            await asyncio.sleep(started + INTERVAL_S - time.monotonic())

    def _publish(self, event: Event) -> None:
        waited, self._next = self._next, None
        if waited is not None:
            waited.set_result(event)

    async def _look(self) -> Event:
        client, info = self._text.client, self._text.info
        try:
            stats, live = await asyncio.gather(
                client.stats(ANSWER_TIMEOUT_S), client.live(MAX_REQUESTS, ANSWER_TIMEOUT_S)
            )
        except Exception as error:  # whoever looks must hear of it
            return _gone(error)
        snapshot = Snapshot(
            model=self._model,
            policy=info.policy,
            device=info.device,
            page_size=info.page_size,
            at_s=time.monotonic(),
            stats=stats,
            live=live,
        )
        return Event(b"data: " + msgspec.json.encode(snapshot) + b"\n\n")


def _gone(error: Exception) -> Event:
    """The end of a stream whose engine does not answer. The page tries again."""
    kind = b"dead" if isinstance(error, EngineDeadError) else b"unavailable"
    return Event(b"event: " + kind + b"\ndata: " + as_api_error(error).encode() + b"\n\n", last=True)


class Viewer(StreamingResponse):
    """The feed's events; a 429 where one looks too many. However sending ends, the viewer is counted out at once."""

    def __init__(self, feed: LiveFeed) -> None:
        self._feed, self._events = feed, feed.events()
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        if self._feed.viewers >= MAX_VIEWERS:
            message = f"{MAX_VIEWERS} viewers look already, as many as may; close one or try again later"
            headers = {"retry-after": "1"}
            full = ApiError(429, message, code="too_many_viewers", type="rate_limit_error", headers=headers)
            await full.response()(scope, receive, send)
            return
        self._feed.viewers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.viewers -= 1
            await self._events.aclose()


def add_page(app: FastAPI, text: TextClient, model: str) -> LiveFeed:
    """Add the page and its events to an application; the feed is also `app.state.live`. `model`: what clients call it.

    Only /v1/live says anything of the engine: the page itself needs no key.
    """
    feed = app.state.live = LiveFeed(text, model)
    for file in (files("superinfer.runtime.server") / "page").iterdir():
        media_type = MEDIA_TYPES[file.name.rpartition(".")[2]] + "; charset=utf-8"
        _add_file(app, "" if file.name == "index.html" else file.name, file.read_bytes(), media_type)

    @app.get(LIVE)
    async def live() -> Response:
        return Viewer(feed)

    return feed


def _add_file(app: FastAPI, name: str, content: bytes, media_type: str) -> None:
    @app.get(f"/{name}")
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)
