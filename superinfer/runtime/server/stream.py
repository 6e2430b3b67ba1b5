"""Runs the requests behind one HTTP answer, notices a client that went away, and writes server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from superinfer.runtime.server.errors import as_api_error
from superinfer.runtime.text import TextClient, TextDelta, TextRequest, TextResult

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The HTTP client closed its connection: nobody is left to answer."""


async def deltas_of(text: TextClient, requests: Sequence[TextRequest]) -> AsyncGenerator[TextDelta, None]:
    """Deltas of all requests as they come, choices numbered through. The first error ends them all; so does closing."""
    arrived: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue()

    async def pump(first: int, request: TextRequest) -> None:
        try:
            async with contextlib.aclosing(text.stream(request)) as deltas:
                async for delta in deltas:
                    arrived.put_nowait(dataclasses.replace(delta, index=first + delta.index))
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(i * request.sampling.n, request)) for i, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case TextDelta() as delta:
                    yield delta
                case error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(deltas: AsyncGenerator[TextDelta, None], choices: int) -> list[TextResult]:
    """All choices, finished."""
    results = [TextResult(index) for index in range(choices)]
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            results[delta.index].add(delta)
    return results


async def while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientGone raised once the client disconnects.

    The request's body must have been read: what the client sends next can then only be its farewell.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(http.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(
    first: TextDelta, rest: AsyncGenerator[TextDelta, None], chunks: Callable[[TextDelta], Iterable[bytes]]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of an answer whose first delta is here. An error from now on is an event of its own, and
    then no [DONE] follows."""
    async with contextlib.aclosing(rest):
        try:
            for chunk in chunks(first):
                yield _event(chunk)
            async for delta in rest:
                for chunk in chunks(delta):
                    yield _event(chunk)
        except Exception as error:
            yield b"event: error\n" + _event(as_api_error(error).encode())
        else:
            yield DONE


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """Closes its source however the sending ended, so that a client's disconnect cancels the request at once."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        # no proxy may keep tokens back
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()
