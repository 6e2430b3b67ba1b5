"""A small OpenAI-compatible server on a thread whose every answer is scripted, for tests of clients of any server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[dict[str, Any], "Stream"], Awaitable[None]]


class Stream:
    """One answer under way."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def begin(self, status: int = 200) -> None:
        self._writer.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % status)

    async def raw(self, data: bytes) -> None:
        self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self._writer.drain()

    async def event(self, event: Any) -> None:
        await self.raw(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n")

    async def token(self, total: int | None = None, reason: str | None = None) -> None:
        """A chunk with text; `total`: tokens so far, as its usage says."""
        usage = {} if total is None else {"usage": {"completion_tokens": total, "prompt_tokens": 1}}
        await self.event({"choices": [{"index": 0, "text": "x", "finish_reason": reason}], **usage})

    async def end(self) -> None:
        await self.event(b"[DONE]")
        self._writer.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """The connection breaks."""
        self._writer.transport.abort()

    async def refuse(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
        await self._writer.drain()


async def steady(body: dict[str, Any], stream: Stream) -> None:
    """All tokens at once, each in a chunk, counted where that is asked for."""
    stream.begin()
    counts = body["stream_options"].get("continuous_usage_stats")
    for at in range(body["max_tokens"]):
        await stream.token(at + 1 if counts else None, "length" if at + 1 == body["max_tokens"] else None)
    await stream.end()


@dataclass
class ScriptedServer:
    """`answer` may be changed while it runs. seen: bodies of completions so far."""

    answer: Answer = steady
    owned_by: str = "vllm"
    seen: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> ScriptedServer:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def main() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await self._stop.wait()
            server.close()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(main(),), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                stream = Stream(writer)
                if b"/v1/models" in head:
                    card = {"id": "m", "owned_by": self.owned_by, "max_model_len": 4096}
                    await stream.refuse(200, {"data": [card]})
                elif b"/v1/completions" not in head:
                    await stream.refuse(404, {})
                else:
                    length = re.search(rb"content-length: (\d+)", head.lower())
                    assert length is not None
                    body = json.loads(await reader.readexactly(int(length[1])))
                    self.seen.append(body)
                    await self.answer(body, stream)
