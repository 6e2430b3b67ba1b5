"""What goes over a connection to a superinfer server: requests out, server-sent events and JSON back.

The `openai` client takes milliseconds of CPU for a call, and some for each piece of a stream; a program with hundreds
of calls in the air is then slower than the engine. Connections are kept and bounded: a call that finds all of them
taken waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
from yarl import URL

from superinfer.errors import (
    DeadlineMissedError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    QueueFullError,
    SuperinferError,
    error_from_code,
)
from superinfer.lang.retrying import may_pass, told_wait_s, wait_s
from superinfer.runtime.choices import TokenScore
from superinfer.runtime.protocol import RequestReport

_KEPT_S = 4.0  # what stands before a server may close what is idle after 5 s; a request must not cross that

T = TypeVar("T")


class FunctionPart(msgspec.Struct):
    """The new part of a tool call."""

    name: str | None = None
    arguments: str | None = None


class CallPart(msgspec.Struct):
    """The same, and which call it is of."""

    index: int = 0
    function: FunctionPart | None = None


class Said(msgspec.Struct, frozen=True):
    """The new part of a message."""

    content: str | None = None
    tool_calls: list[CallPart] | None = None


_NOTHING = Said()


class Choice(msgspec.Struct):
    """The new part of a choice: `delta` of a chat's, `text` of another's."""

    index: int = 0
    delta: Said = _NOTHING
    text: str | None = None
    finish_reason: str | None = None


class Cached(msgspec.Struct):
    """Details of a prompt's tokens."""

    cached_tokens: int | None = None


class Used(msgspec.Struct):
    """Tokens, of all choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Cached | None = None


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Used | None = None
    slo: dict[str, Any] | None = None


class ScoredToken(msgspec.Struct):
    """A token of a choice; the first has no probability where nothing stands before it."""

    id: int
    text: str
    logprob: float | None

    def score(self) -> TokenScore:
        """As choice methods take it."""
        return self.logprob, self.id, self.text


class ScoredChoice(msgspec.Struct):
    """A choice behind the prompt, and alone."""

    tokens: list[ScoredToken]
    alone: list[ScoredToken] | None = None


class SelectAnswer(msgspec.Struct):
    """Of /v1/select."""

    choices: list[ScoredChoice]
    reports: list[RequestReport]


class _Error(msgspec.Struct):
    message: str = ""
    code: str | None = None


class _Failure(msgspec.Struct):
    error: _Error


_encode = msgspec.json.Encoder().encode
FROM_ARRIVAL = ("ttft_ms", "deadline_ms")  # of an `slo` field
_chunk = msgspec.json.Decoder(Chunk).decode


class ServerWire:
    """Connections to one superinfer server. Made and used on the language's loop."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float, max_retries: int, connections: int) -> None:
        """base_url: up to /v1. timeout: seconds without a byte of an answer. max_retries: of a request that did not
        get through or was refused for the moment. connections: at a time."""
        self._base, self._retries = base_url.rstrip("/"), max_retries
        proxy, proxy_auth = _proxy_of(self._base)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            proxy=proxy,
            proxy_auth=proxy_auth,
            read_bufsize=1 << 20,
        )

    async def chunks(self, path: str, body: dict[str, Any]) -> AsyncGenerator[list[Chunk], None]:
        """The events of a streamed answer; those that came together are given together. Close it to cancel."""
        async with self._posted(path, body) as response:
            rest, ended = b"", False
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                found = []
                for event in events:
                    if event.startswith(b"event: error"):
                        raise _error(0, event.partition(b"data: ")[2])
                    if event == b"data: [DONE]":
                        ended = True
                    elif event.startswith(b"data: "):
                        found.append(_chunk(event[6:]))
                if found:
                    yield found
            if not ended:
                raise EngineUnavailableError("the service broke off its answer")

    async def ask(self, path: str, body: dict[str, Any], answer: type[T]) -> T:
        """A whole answer."""
        async with self._posted(path, body) as response:
            return msgspec.json.decode(await response.read(), type=answer)

    @contextlib.asynccontextmanager
    async def _posted(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with await self._answered(path, body) as response:
                yield response
        except SuperinferError:
            raise
        except msgspec.DecodeError as error:
            raise SuperinferError(f"the service failed: it answered what cannot be read: {error}") from error
        except TimeoutError as error:
            raise DeadlineMissedError(f"the service did not answer in time: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnavailableError(
                f"the server at {self._base} does not answer: {str(error) or repr(error)}"
            ) from error

    async def _answered(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """The answer's beginning, after as many tries as are allowed, each promised what is left of the time. Raises
        SuperinferError for one that is none, and at once where what was promised would be lost by waiting for another
        try."""
        promised, began = body.get("slo"), time.monotonic()
        tries = 0
        while True:
            told_s: float | None = None
            if promised and tries:
                body = {**body, "slo": _left(promised, time.monotonic() - began)}
            try:
                response = await self._session.post(
                    self._base + path, data=_encode(body), headers={"content-type": "application/json"}
                )
            except aiohttp.ClientConnectionError:
                if tries >= self._retries:
                    raise
            else:
                if response.status == 200:
                    return response
                async with response:
                    said = await response.read()
                told_s = told_wait_s(response.headers.get("Retry-After", ""))
                error = _error(response.status, said)
                again = may_pass(response.status, told_s)
                if isinstance(error, OverloadedError):
                    error.retry_after_s = told_s
                    again = again and (told_s or 0.0) < _due_s(_left(promised or {}, time.monotonic() - began))
                if tries >= self._retries or not again:
                    raise error
            await asyncio.sleep(wait_s(tries, told_s))
            tries += 1

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def _proxy_of(base_url: str) -> tuple[URL | None, aiohttp.BasicAuth | None]:
    """The proxy that the environment names for a server, and what it asks for. Looked up once: `trust_env` has aiohttp
    do so for each request, on a thread, and read ~/.netrc on another."""
    server = URL(base_url)
    found = getproxies().get(server.scheme)
    if found is None or proxy_bypass(server.host or ""):
        return None, None
    proxy = URL(found)
    auth = aiohttp.BasicAuth(proxy.user, proxy.password or "") if proxy.user else None
    return proxy.with_user(None), auth


def _left(slo: dict[str, Any], spent_s: float) -> dict[str, Any]:
    """What of an `slo` field's times there still is: a server counts them from when it gets them."""
    return {**slo, **{name: max(1.0, slo[name] - spent_s * 1e3) for name in FROM_ARRIVAL if name in slo}}


def _due_s(slo: dict[str, Any]) -> float:
    return min(float(slo.get(name, math.inf)) for name in FROM_ARRIVAL) / 1e3


def _error(status: int, body: bytes) -> SuperinferError:
    """What the server said was wrong. status: of HTTP; 0 in a stream."""
    try:
        said = msgspec.json.decode(body, type=_Failure).error
    except msgspec.DecodeError:
        said = _Error(f"HTTP {status}: {body[:200]!r}")
    known = error_from_code(said.code, said.message) if said.code else None
    if known is not None and type(known) is not SuperinferError:
        return known
    if status == 429:
        return QueueFullError(said.message)
    if 400 <= status < 500:
        return InvalidRequestError(said.message)
    return SuperinferError(f"the service failed: {said.message}")
