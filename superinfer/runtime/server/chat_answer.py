"""/v1/chat/completions: from deltas to chunks or one answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.server.params import id_of
from superinfer.runtime.server.parsing.pieces import AnswerReader, Piece
from superinfer.runtime.server.report import SloReport, StreamedUsage, Tally, Usage
from superinfer.runtime.server.schema import ChatRequest, FunctionCall
from superinfer.runtime.server.stream import error_event, event
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET

_encode = msgspec.json.Encoder().encode


class TokenInfo(msgspec.Struct, frozen=True):
    """bytes: null where the token is only part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(TokenInfo, frozen=True):
    """A chosen token and its rivals."""

    top_logprobs: list[TokenInfo]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Parallel to the generated tokens."""

    content: list[ScoredToken]
    refusal: None = None


class FunctionDelta(msgspec.Struct, frozen=True):
    """The new part of a call: its name comes first, then its arguments, piece by piece."""

    name: str | Unset = UNSET
    arguments: str = ""


class CallDelta(msgspec.Struct, frozen=True):
    """A tool call, or the new part of it: the first one has `id` and `type`."""

    function: FunctionDelta
    id: str | Unset = UNSET
    type: str | Unset = UNSET
    index: int | Unset = UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """The message of a choice, or the new part of it. `reasoning_content`: what a model thought before its answer."""

    role: str | Unset = UNSET
    content: str | Unset | None = UNSET
    reasoning_content: str | Unset = UNSET
    tool_calls: list[CallDelta] | Unset = UNSET
    refusal: Unset | None = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice has a message, a chunk's choice a delta. token_ids: of all of it, or of this chunk's tokens."""

    index: int
    message: AnswerMessage | Unset = UNSET
    delta: AnswerMessage | Unset = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | Unset = UNSET


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer or a chunk, by `object`. prompt_token_ids: in a stream only with each choice's first chunk."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: str | Unset = UNSET
    system_fingerprint: str | Unset | None = UNSET
    usage: Usage | Unset | None = UNSET
    slo: SloReport | Unset = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


class ChatWriter:
    """Writes one answer: `events` as it streams, or `whole` at its end."""

    event_end = event(b"[DONE]")
    failure = staticmethod(error_event)

    def __init__(
        self,
        request: ChatRequest,
        tokenizer: Tokenizer,
        tally: Tally,
        readers: list[AnswerReader],
        *,
        prompt: list[int],
    ) -> None:
        """`readers`: one for each choice. prompt: its token ids."""
        self._id = f"chatcmpl-{id_of(request)}"
        self._as_ids, self._with_stop = (
            bool(request.return_tokens_as_token_ids),
            bool(request.include_stop_str_in_output),
        )
        self._created = int(time.time())
        self._model = request.model
        self._tokenizer = tokenizer
        self._tally = tally
        self._usage = StreamedUsage(request.stream_options, len(prompt))
        self._shown: list[int] | Unset = prompt if request.return_token_ids else UNSET
        self._readers = readers
        self._started = [False] * len(readers)
        self._frames = [self._frame(index) for index in range(len(readers))] if request.stream else []

    def events(self, delta: TextDelta) -> Iterator[bytes]:
        """The chunks for one delta; after the last, the closing ones."""
        index, reader = delta.index, self._readers[delta.index]
        if not self._started[index]:
            self._started[index] = True
            begun = ChatChoice(index=index, delta=AnswerMessage(role="assistant", content=""))
            yield self._chunk(begun, prompt_token_ids=self._shown)
        calls = reader.calls
        self._usage.count(len(delta.token_ids))
        pieces = reader.push(delta.text + self._stop(delta))
        if delta.finish_reason is not None:
            pieces += reader.finish()
        logprobs = self._logprobs(delta.logprobs)
        ids = delta.token_ids if self._shown is not UNSET else UNSET  # these and the logprobs go with one chunk
        for piece in pieces:
            calls += piece.kind == "call"
            if logprobs is None and ids is UNSET and piece.kind == "content" and not self._usage.in_each:
                before, after = self._frames[index]
                yield before + _encode(piece.text) + after  # most of all chunks
            else:
                part = _delta(piece, calls - 1)
                yield self._chunk(ChatChoice(index=index, delta=part, logprobs=logprobs, token_ids=ids))
            logprobs, ids = None, UNSET
        if delta.finish_reason is None:
            if logprobs is not None or ids or (self._usage.in_each and not pieces):
                part = AnswerMessage(content="")
                yield self._chunk(ChatChoice(index=index, delta=part, logprobs=logprobs, token_ids=ids))
            return
        reason = self._reason(delta, reader)
        slo = self._tally.slo() if self._tally.complete else UNSET
        last = ChatChoice(index=index, delta=AnswerMessage(), logprobs=logprobs, finish_reason=reason, token_ids=ids)
        yield self._chunk(last, slo=slo)
        if self._tally.complete and self._usage.at_end:
            yield event(self._answer("chat.completion.chunk", [], self._tally.usage(), slo))

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """A chunk of plain content around its text."""
        mark = "\x00"
        whole = self._chunk(ChatChoice(index=index, delta=AnswerMessage(content=mark)))
        before, after = whole.split(_encode(mark))
        return before, after

    def _reason(self, end: TextDelta | TextResult, reader: AnswerReader) -> str:
        assert end.finish_reason is not None
        reason = self._tally.finish(end.index, end.finish_reason, end.report)
        self._tally.reasoned(reader.thought, self._tokenizer)
        return "tool_calls" if reader.calls and reason == "stop" else reason

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of an unstreamed request."""
        choices = []
        for result in results:
            reader = self._readers[result.index]
            message = message_of(reader.push(result.text + self._stop(result)) + reader.finish())
            reason = self._reason(result, reader)
            logprobs = self._logprobs(result.logprobs)
            ids = result.token_ids if self._shown is not UNSET else UNSET
            choices.append(
                ChatChoice(index=result.index, message=message, logprobs=logprobs, finish_reason=reason, token_ids=ids)
            )
        return self._answer("chat.completion", choices, self._tally.usage(), self._tally.slo(), self._shown)

    def _stop(self, end: TextDelta | TextResult) -> str:
        """The stop string that ended a text, where it is wanted."""
        return end.stop or "" if self._with_stop else ""

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs([scored_token(self._tokenizer, t, as_ids=self._as_ids) for t in logprobs])

    def _chunk(
        self, choice: ChatChoice, slo: SloReport | Unset = UNSET, prompt_token_ids: list[int] | Unset = UNSET
    ) -> bytes:
        return event(self._answer("chat.completion.chunk", [choice], self._usage.so_far(), slo, prompt_token_ids))

    def _answer(
        self,
        kind: str,
        choices: list[ChatChoice],
        usage: Usage | Unset | None,
        slo: SloReport | Unset,
        prompt_token_ids: list[int] | Unset = UNSET,
    ) -> bytes:
        return _encode(
            ChatAnswer(
                id=self._id,
                object=kind,
                created=self._created,
                model=self._model,
                choices=choices,
                service_tier=self._tally.promise.tier or UNSET,
                usage=usage,
                slo=slo,
                prompt_token_ids=prompt_token_ids,
            )
        )


def _delta(piece: Piece, call: int) -> AnswerMessage:
    match piece.kind:
        case "content":
            return AnswerMessage(content=piece.text)
        case "reasoning":
            return AnswerMessage(reasoning_content=piece.text)
        case "call":
            return AnswerMessage(tool_calls=[CallDelta(FunctionDelta(piece.text), call_id(), "function", call)])
        case _:
            return AnswerMessage(tool_calls=[CallDelta(FunctionDelta(arguments=piece.text), index=call)])


def message_of(pieces: list[Piece]) -> AnswerMessage:
    """The message that the pieces of one answer make."""
    text, reasoning, calls = gather(pieces)
    content = text if text.strip() or not (calls or reasoning) else None
    found: Any = [CallDelta(FunctionDelta(call.name, call.arguments), call_id(), "function") for call in calls]
    return AnswerMessage("assistant", content, reasoning or UNSET, found or UNSET, None)


def gather(pieces: list[Piece]) -> tuple[str, str, list[FunctionCall]]:
    """Content, reasoning and calls."""
    text = "".join(piece.text for piece in pieces if piece.kind == "content")
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    calls: list[FunctionCall] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append(FunctionCall(piece.text, ""))
        elif piece.kind == "arguments":
            calls[-1] = FunctionCall(calls[-1].name, calls[-1].arguments + piece.text)
    return text, reasoning, calls


def scored_token(tokenizer: Tokenizer, scored: TokenLogprob, *, as_ids: bool = False) -> ScoredToken:
    """A token with its rivals, as OpenAI shows them. as_ids: the name of each is `token_id:N`."""
    rivals = [TokenInfo(*_token(tokenizer, *pair, as_ids)) for pair in scored.top]
    return ScoredToken(*_token(tokenizer, scored.token_id, scored.logprob, as_ids), rivals)


def _token(tokenizer: Tokenizer, token_id: int, logprob: float, as_id: bool) -> tuple[str, float, list[int] | None]:
    text = tokenizer.piece(token_id)
    return f"token_id:{token_id}" if as_id else text, logprob, None if "\ufffd" in text else list(text.encode())


def call_id() -> str:
    """A fresh id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"
