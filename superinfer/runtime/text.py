"""Text in, text out, over the one door: tokenization, incremental detokenization and stop strings around a client.

The language, the HTTP server and the command line all generate through `TextClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from superinfer.errors import DeadlineMissedError, InvalidRequestError
from superinfer.runtime.client import AsyncEngineClient, deadline_text, new_request_id
from superinfer.runtime.detokenization import Detokenizer
from superinfer.runtime.protocol import (
    FinishReason,
    Generate,
    Hints,
    ModelInfo,
    RequestReport,
    SamplingParams,
    Score,
    SequenceDelta,
    TokenLogprob,
)
from superinfer.runtime.slo import SLO
from superinfer.runtime.stopping import Stopper, check_stop, stop_pattern
from superinfer.runtime.stopping import split_at_stop as split_at_stop
from superinfer.runtime.tokenization import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One prompt, as text (special tokens are parsed, none added: see Tokenizer.encode) or as token ids.

    stop: strings that end the text, MAX_STOP_CHARACTERS together; the match itself is left out of it. stop_regex:
    regular expressions that do.
    add_special: let the tokenizer add its BOS and the like; False for a rendered chat template.
    skip_special: leave special tokens out of the returned text.
    slo_class, hints, after, interval_s: see protocol.Generate. With stop strings there is no interval.
    """

    prompt: str | Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    slo: SLO | None = None
    slo_class: str = ""
    cache_salt: str = ""
    program: str = ""
    hints: Hints | None = None
    add_special: bool = True
    skip_special: bool = True
    after: str = ""
    interval_s: float = 0.0

    def __post_init__(self) -> None:
        check_stop(self.stop)
        for pattern in self.stop_regex:
            stop_pattern(pattern)


class TextDelta(msgspec.Struct, frozen=True):
    """New text of continuation `index`. The last delta has finish_reason and report.

    stop: the stop string that ended it, or what matched a stop_regex (finish_reason is then "stop").
    """

    index: int
    text: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    report: RequestReport | None = None


@dataclass(slots=True)
class TextResult:
    """One finished continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    report: RequestReport | None = None

    def add(self, delta: TextDelta) -> None:
        """Append a delta of the same index."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop, self.report = delta.finish_reason, delta.stop, delta.report


class TextClient:
    """An engine connection with the model's tokenizer. Owns the connection. Use it on one event loop."""

    def __init__(self, client: AsyncEngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer

    @classmethod
    async def connect(cls, address: str, *, name: str = "", timeout: float = 10.0) -> TextClient:
        """Connect, and load the model's tokenizer. Raises like AsyncEngineClient.connect, and ModelLoadError."""
        client = await AsyncEngineClient.connect(address, name=name, timeout=timeout)
        try:
            return cls(client, Tokenizer(client.info.path))
        except BaseException:
            await client.close()
            raise

    @property
    def info(self) -> ModelInfo:
        return self.client.info

    def tokenize(self, request: TextRequest) -> list[int]:
        """The prompt's token ids. Raises InvalidRequestError for an empty prompt."""
        prompt = request.prompt
        ids = self.tokenizer.encode(prompt, special=request.add_special) if isinstance(prompt, str) else list(prompt)
        if not ids and not request.after:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        return ids

    def wire(self, request: TextRequest) -> Generate:
        """The message that asks an engine for it. Raises InvalidRequestError for an empty prompt."""
        return Generate(
            request_id=new_request_id(),
            prompt=self.tokenize(request),
            sampling=request.sampling,
            slo=request.slo,
            slo_class=request.slo_class,
            cache_salt=request.cache_salt,
            program=request.program,
            hints=request.hints,
            after=request.after,
            interval_s=0.0 if request.stop or request.stop_regex else request.interval_s,
        )

    def begin(self, request: TextRequest) -> Begun:
        """Send a request whose answer is read later, or never. Raises EngineDeadError, InvalidRequestError."""
        return Begun(self, request)

    def readers(self, request: TextRequest, wire: Generate) -> list[SequenceReader]:
        """One for each continuation of the request. wire: its message."""
        # A space that a grammar asks for is no beginning to be left out.
        begun = bool(wire.after) or wire.sampling.grammar is not None or self.tokenizer.is_text(wire.prompt)
        return [
            SequenceReader(
                self.tokenizer.detokenizer(skip_special=request.skip_special, begun=begun),
                Stopper(request.stop, request.stop_regex),
            )
            for _ in range(request.sampling.n)
        ]

    async def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """Text deltas of all continuations as they come. Closing the iterator early cancels. Raises like `generate`."""
        wire = self.wire(request)
        read = self._read(wire, self.client.generate(wire), self.readers(request, wire))
        async with contextlib.aclosing(read) as deltas:
            async for delta in deltas:
                yield delta

    async def _read(
        self, wire: Generate, deltas: AsyncGenerator[SequenceDelta, None], readers: Sequence[SequenceReader]
    ) -> AsyncGenerator[TextDelta, None]:
        """The text of a request's deltas; what is stopped by its text is cancelled."""
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                reader = readers[delta.index]
                was_stopped = reader.stopped_by is not None
                # Searches for expressions leave the loop to others.
                out = await asyncio.to_thread(reader.read, delta) if reader.searches else reader.read(delta)
                if reader.stopped_by is not None and not was_stopped and delta.finish_reason is None:
                    self.client.cancel(wire.request_id, delta.index)  # its last delta will bring the report
                if out is not None:
                    yield out

    async def complete(self, request: TextRequest) -> list[TextResult]:
        """All continuations, finished, by index. Raises like `stream`."""
        results = [TextResult(index) for index in range(request.sampling.n)]
        async with contextlib.aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                results[delta.index].add(delta)
        return results

    async def score(
        self,
        prompt: Sequence[int],
        start: int,
        *,
        top: int = 0,
        slo: SLO | None = None,
        slo_class: str = "",
        cache_salt: str = "",
        program: str = "",
        hints: Hints | None = None,
    ) -> tuple[list[TokenLogprob], RequestReport]:
        """Log probability of each of `prompt[start:]` given all before it; `start` >= 1. top: and of so many of the
        most likely tokens there, at most 20."""
        return await self.client.score(
            Score(
                request_id=new_request_id(),
                prompt=list(prompt),
                start=start,
                top=top,
                slo=slo,
                slo_class=slo_class,
                cache_salt=cache_salt,
                program=program,
                hints=hints,
            )
        )

    async def close(self, reason: str = "the client was closed") -> None:
        """Close the connection; the engine lives on. Waiting calls raise RequestCancelledError(reason)."""
        await self.client.close(reason)

    async def __aenter__(self) -> TextClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class Begun:
    """A request that has been sent, and whose deltas are kept until they are read. `close` it if they never are."""

    def __init__(self, text: TextClient, request: TextRequest) -> None:
        """Send it. Raises EngineDeadError, InvalidRequestError."""
        self._text = text
        self._wire = text.wire(request)
        self._readers = text.readers(request, self._wire)
        self._open = request.sampling.n
        self._arrived: asyncio.Queue[SequenceDelta | Exception] = asyncio.Queue()
        text.client.open_soon(self._wire, self._arrived.put_nowait)

    @property
    def request_id(self) -> str:
        return self._wire.request_id

    @property
    def prompt(self) -> list[int]:
        """The token ids that were sent."""
        return self._wire.prompt

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """As `TextClient.stream`; once."""
        async with contextlib.aclosing(self._text._read(self._wire, self._received(), self._readers)) as deltas:
            async for delta in deltas:
                yield delta

    async def _received(self) -> AsyncGenerator[SequenceDelta, None]:
        slo = self._wire.slo
        try:
            while self._open:
                delta = await self._arrived.get()
                if isinstance(delta, Exception):
                    self._open = 0
                    raise delta
                if delta.finish_reason is not None:
                    self._open -= 1
                    if delta.finish_reason == "deadline" and slo is not None and slo.on_miss == "raise":
                        raise DeadlineMissedError(deadline_text(self._wire, delta))
                yield delta
        finally:
            self.close()

    def close(self) -> None:
        """Forget it; it is cancelled unless it has finished. Safe to call twice."""
        self._text.client.release(self.request_id, finished=self._open == 0)


class SequenceReader:
    """Turns one sequence's token deltas into text deltas, holding back what may become a stop string.

    stopped_by: the stop string that was found. Its continuation is then to be cancelled, and the last delta brings the
        report. The token that completed it is the last that is told and that the report counts: how many more the
        engine makes until it hears of it, and how tokens come together in deltas, changes nothing.
    """

    def __init__(self, detokenizer: Detokenizer, stopper: Stopper) -> None:
        self._detokenizer = detokenizer
        self._stopper = stopper
        self._count = 0  # tokens told
        self.stopped_by: str | None = None

    @property
    def searches(self) -> bool:
        """Whether `read` may take long: see Stopper.searches."""
        return self._stopper.searches

    def read(self, delta: SequenceDelta) -> TextDelta | None:
        """None where there is nothing to pass on."""
        finished = delta.finish_reason is not None
        if self.stopped_by is not None:
            if not finished:
                return None
            return TextDelta(delta.index, "", [], None, "stop", self.stopped_by, self._counted(delta.report))
        token_ids, logprobs = delta.token_ids, delta.logprobs
        if self._stopper.is_needed:
            text, told = self._until_stop(token_ids)
            if told < len(token_ids):
                token_ids, logprobs = token_ids[:told], logprobs[:told] if logprobs is not None else None
        else:
            text = self._detokenizer.push(token_ids)
        self._count += len(token_ids)
        if finished and self.stopped_by is None:
            rest, self.stopped_by = self._stopper.push(self._detokenizer.flush())
            text += rest
            if self.stopped_by is None:
                text += self._stopper.rest()
        reason = delta.finish_reason if self.stopped_by is None or not finished else "stop"
        if not text and not token_ids and not finished:
            return None
        return TextDelta(
            delta.index,
            text,
            token_ids,
            logprobs,
            reason,
            self.stopped_by if finished else None,
            delta.report if self.stopped_by is None else self._counted(delta.report),
        )

    def _until_stop(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """(certain text of these tokens up to a stop, how many of them that takes)."""
        text = ""
        for told, token_id in enumerate(token_ids, 1):
            certain, self.stopped_by = self._stopper.push(self._detokenizer.push((token_id,)))
            text += certain
            if self.stopped_by is not None:
                return text, told
        return text, len(token_ids)

    def _counted(self, report: RequestReport | None) -> RequestReport | None:
        return msgspec.structs.replace(report, output_tokens=self._count) if report is not None else None
