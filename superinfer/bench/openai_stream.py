"""One streamed completion from any OpenAI-compatible server: tokens counted and timed as their bytes arrive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from superinfer.errors import EngineUnavailableError, InvalidRequestError
from superinfer.runtime.slo import SLO, TokenTimeline

DESCRIBE_TIMEOUT_S = 30.0


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Whole(msgspec.Struct):
    """What is read of an answer in one piece."""

    choices: list[_Choice]
    usage: _Usage


class EngineSlo(msgspec.Struct):
    """What a superinfer server says became of the SLO; see server.report.SloReport."""

    e2e_ms: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    rotated_ms: float = 0.0
    copy_wait_ms: float = 0.0
    preempted_ms: float = 0.0
    lateness_ms: float | None = None
    met: bool | None = None
    why: str = ""


class _Chunk(msgspec.Struct):
    """What is read of an event. Servers add fields of their own; these are skipped."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    slo: EngineSlo | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode


@dataclass(slots=True)
class Sample:
    """One request and what came of it. due: when it arrives, seconds after the run's start; the others are after `due`.

    sent: when it was handed to the connection. timeline: its tokens. gaps: between arrivals, each of one token or more.
    finished: its end, good or bad. counted: whether its chunks said how many tokens there were.
    error: the kind of failure, "" for none; detail: its words.
    """

    due: float
    prompt_tokens: int
    wanted: int
    slo: SLO | None
    timeline: TokenTimeline
    gaps: list[float] = field(default_factory=list)
    sent: float | None = None
    finished: float | None = None
    finish_reason: str | None = None
    tokens: int = 0
    counted: bool = False
    error: str = ""
    detail: str = ""
    engine: EngineSlo | None = None


@dataclass(frozen=True)
class Server:
    """What is known of a server. is_superinfer: whether it takes and reports an `slo`.

    counts: whether its chunks say how many tokens there are so far; else each chunk is counted as one token.
    """

    url: str
    model: str
    owned_by: str
    version: str
    max_model_len: int | None
    counts: bool = False

    @property
    def is_superinfer(self) -> bool:
        return self.owned_by == "superinfer"


class OpenAIStreams:
    """Streams completions from one server. Use it as an async context, on one event loop."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> OpenAIStreams:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, enable_cleanup_closed=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
            headers={**self._headers, "Content-Type": "application/json"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def describe(self, model: str) -> Server:
        """Ask what is served. model: which of several; "": the first.

        Raises EngineUnavailableError (no answer) and InvalidRequestError (no such model, or no OpenAI server).
        """
        try:
            cards = (await self._get("/v1/models"))["data"]
            card = cards[0] if not model else next(card for card in cards if card["id"] == model)
            name = card["id"]
        except (KeyError, IndexError, TypeError, ValueError):
            raise InvalidRequestError(f"what answers at {self.base} is not an OpenAI server: no /v1/models") from None
        except StopIteration:
            known = ", ".join(card["id"] for card in cards)
            raise InvalidRequestError(f"model {model!r} is not served at {self.base}; it has {known}") from None
        version = ""
        with contextlib.suppress(ValueError, InvalidRequestError):  # most servers do not say
            version = str((await self._get("/version")).get("version", ""))
        return Server(self.base, name, str(card.get("owned_by", "")), version, card.get("max_model_len"))

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            async with self._session.get(
                self.base + path, timeout=aiohttp.ClientTimeout(total=DESCRIBE_TIMEOUT_S)
            ) as response:
                if response.status != 200:
                    raise InvalidRequestError(f"{self.base}{path} answers with HTTP {response.status}")
                found: dict[str, Any] = msgspec.json.decode(await response.read())
                return found
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            said = str(error) or type(error).__name__
            raise EngineUnavailableError(f"no server answers at {self.base} ({said})") from None

    async def stream(self, body: bytes, sample: Sample, start: float, clock: Callable[[], float]) -> None:
        """Send one completion and record what comes until it is over. What goes wrong is recorded, not raised.

        An answer in one piece, where the body asked for no stream, counts as tokens that all came at its end.

        start: of the run, on `clock`, seconds.
        """
        arrival = start + sample.due
        sample.sent = clock() - arrival
        try:
            async with self._session.post(f"{self.base}/v1/completions", data=body) as response:
                if response.status != 200:
                    text = (await response.read()).decode(errors="replace")
                    sample.error, sample.detail = f"HTTP {response.status}", text[:500]
                elif response.content_type == "application/json":
                    _take_whole(_decode_whole(await response.read()), sample, clock() - arrival)
                else:
                    await self._read(response, sample, arrival, clock)
        except asyncio.CancelledError:
            sample.error = sample.error or "not finished in time"
            raise
        except aiohttp.ClientConnectorError as error:
            sample.error, sample.detail = "no connection", str(error)
        except (aiohttp.ClientError, OSError) as error:
            sample.error, sample.detail = "connection lost", f"{type(error).__name__}: {error}"
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            sample.error, sample.detail = "unreadable answer", str(error)
        finally:
            sample.finished = clock() - arrival

    async def _read(
        self, response: aiohttp.ClientResponse, sample: Sample, arrival: float, clock: Callable[[], float]
    ) -> None:
        rest, done = b"", False
        async for data in response.content.iter_any():
            now = clock() - arrival
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue  # comments, blank lines, `event:`; an error's own data says that it is one
                event = line[5:].strip()
                if event == b"[DONE]":
                    done = True
                else:
                    _take(_decode(event), sample, now)
        if sample.tokens > sample.timeline.count:  # counted by the last chunk alone
            sample.timeline.tokens(sample.tokens - sample.timeline.count, sample.timeline.last or now)
        if not sample.error and not done and sample.finish_reason is None:
            sample.error, sample.detail = "stream cut short", f"after {sample.tokens} tokens, without an end"


def _take_whole(answer: _Whole, sample: Sample, now: float) -> None:
    """An answer in one piece: all its tokens at its end."""
    sample.finish_reason = answer.choices[0].finish_reason
    sample.tokens, sample.counted = answer.usage.completion_tokens, True
    sample.timeline.tokens(sample.tokens, now)


def _take(chunk: _Chunk, sample: Sample, now: float) -> None:
    """One event of a stream."""
    if chunk.error is not None:
        sample.error, sample.detail = "error event", str(chunk.error)[:500]
    if chunk.slo is not None:
        sample.engine = chunk.slo
    new = 0
    if chunk.choices:
        choice = chunk.choices[0]
        sample.finish_reason = choice.finish_reason or sample.finish_reason
        # A last chunk may hold nothing but the reason; without a count, each chunk with text is a token.
        new = chunk.usage.completion_tokens - sample.tokens if chunk.usage is not None else int(bool(choice.text))
        sample.counted |= chunk.usage is not None
        if new > 0:
            timeline = sample.timeline
            if timeline.first is not None:
                sample.gaps.append(now - timeline.last)
            timeline.tokens(new, now)
            sample.tokens += new
    elif chunk.usage is not None:
        sample.tokens = max(sample.tokens, chunk.usage.completion_tokens)
