"""/v1/chat/completions: messages to a prompt, deltas to chunks or one answer."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from superinfer.errors import UnsupportedError
from superinfer.runtime.protocol import SamplingParams, TokenLogprob
from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.params import sampling_of
from superinfer.runtime.server.report import SloReport, Tally, Usage
from superinfer.runtime.server.schema import ChatRequest, FunctionCall, Message
from superinfer.runtime.server.tool_calls import ToolCallReader
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import ChatMessage, Tokenizer

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET


# ---------------------------------------------------------------------------- request


def sampling_of_chat(request: ChatRequest) -> SamplingParams:
    """Raises ApiError or InvalidRequestError."""
    short, long = request.max_tokens, request.max_completion_tokens
    if short is not None and long is not None and short != long:
        raise bad_request(
            f"max_completion_tokens={long} and max_tokens={short} differ; give one", param="max_completion_tokens"
        )
    if long is not None and long < 1:
        raise bad_request(f"max_completion_tokens={long} must be at least 1", param="max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request(f"top_logprobs={request.top_logprobs} needs logprobs=true", param="top_logprobs")
    if not 0 <= (request.top_logprobs or 0) <= 20:
        raise bad_request(f"top_logprobs={request.top_logprobs} must be between 0 and 20", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return sampling_of(request, max_tokens=short if long is None else long, logprobs=logprobs)


def tools_of(request: ChatRequest, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tools to render; none where tool_choice is "none". Raises ApiError, UnsupportedError."""
    choice, tools = request.tool_choice, request.tools or []
    if choice not in (None, "auto", "none"):
        raise UnsupportedError(f"tool_choice={choice!r:.80} is not supported by this server; use 'auto' or 'none'")
    for at, tool in enumerate(tools):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise bad_request(
                f"tools[{at}]={tool!r:.80} is not a function tool; "
                'give {"type": "function", "function": {"name": ..., "parameters": {...}}}',
                param=f"tools[{at}]",
            )
    if not tools or choice == "none":
        return []
    if not tokenizer.template_takes_tools:
        raise UnsupportedError("tools=[...] cannot be honoured: this model's chat template does not know tools")
    return tools


def prompt_of(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the rendered messages. Raises ApiError, InvalidRequestError."""
    if not request.messages:
        raise bad_request("messages=[] is empty; give at least one message", param="messages")
    messages = [_for_template(at, message) for at, message in enumerate(request.messages)]
    go_on = bool(request.continue_final_message)
    if go_on and messages[-1]["role"] != "assistant":
        raise bad_request("continue_final_message=true needs a last message of role 'assistant'", param="messages")
    text = tokenizer.render_chat(messages, tools=tools_of(request, tokenizer), continue_final_message=go_on)
    return tokenizer.encode(text, special=False)


def _for_template(at: int, message: Message) -> ChatMessage:
    where = f"messages[{at}]"
    if message.annotations:
        raise bad_request(f"{where}.annotations={message.annotations!r:.80} is not supported; remove it", param=where)
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise bad_request(f"{where}.content is missing; add it", param=f"{where}.content", code="missing_parameter")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"{where}.tool_calls belongs to the role 'assistant', not {message.role!r}", param=where)
    # OpenAI's newer name for the system role; templates only know the old one.
    out: ChatMessage = {"role": "system" if message.role == "developer" else message.role}
    out["content"] = _text_of(where, message.content)
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            out[key] = getattr(message, key)
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(where, call.function)},
            }
            for call in message.tool_calls
        ]
    return out


def _text_of(where: str, content: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for at, part in enumerate(content):
        if part.get("type") != "text":
            raise bad_request(
                f"{where}.content[{at}].type={part.get('type')!r:.80} is not supported: this server takes text only",
                param=f"{where}.content[{at}].type",
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise bad_request(
                f"{where}.content[{at}].text={part.get('text')!r:.80} is not a string",
                param=f"{where}.content[{at}].text",
                code="invalid_type",
            )
    return "\n".join(part["text"] for part in content)


def _arguments(where: str, function: FunctionCall) -> dict[str, Any]:
    """Templates want the object, not the string: they would quote a string once more."""
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"{where}.tool_calls: arguments={function.arguments!r:.80} of {function.name!r} is not a JSON object in a "
            "string",
            param=f"{where}.tool_calls",
        )
    return arguments


# ---------------------------------------------------------------------------- answer


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


class CallDelta(msgspec.Struct, frozen=True):
    """A tool call; in a stream it comes whole."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | Unset = UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """The message of a choice, or the new part of it."""

    role: str | Unset = UNSET
    content: str | Unset | None = UNSET
    tool_calls: list[CallDelta] | Unset = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice has a message, a chunk's choice a delta."""

    index: int
    message: AnswerMessage | Unset = UNSET
    delta: AnswerMessage | Unset = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer or a chunk, by `object`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | Unset | None = UNSET
    slo: SloReport | Unset = UNSET


class ChatWriter:
    """Writes one answer: `chunks` as it streams, or `whole` at its end."""

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer, tally: Tally, *, choices: int) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = request.model
        self._tokenizer = tokenizer
        self._tally = tally
        self._usage = bool(request.stream_options and request.stream_options.include_usage)
        with_tools = bool(request.tools) and request.tool_choice != "none"
        self._readers = [ToolCallReader() if with_tools else None for _ in range(choices)]
        self._started = [False] * choices

    def chunks(self, delta: TextDelta) -> Iterator[bytes]:
        """The chunks for one delta; after the last, the closing ones."""
        index, reader = delta.index, self._readers[delta.index]
        if not self._started[index]:
            self._started[index] = True
            yield self._chunk(ChatChoice(index=index, delta=AnswerMessage(role="assistant", content="")))
        logprobs = self._logprobs(delta.logprobs)
        for message in self._pieces(reader, delta):
            yield self._chunk(ChatChoice(index=index, delta=message, logprobs=logprobs))
            logprobs = None
        if delta.finish_reason is None:
            return
        reason = self._tally.finish(index, delta.finish_reason, delta.report)
        reason = "tool_calls" if reader is not None and reader.found and reason == "stop" else reason
        slo = self._tally.slo() if self._tally.complete else UNSET
        last = ChatChoice(index=index, delta=AnswerMessage(), logprobs=logprobs, finish_reason=reason)
        yield self._chunk(last, slo=slo)
        if self._tally.complete and self._usage:
            yield self._encode("chat.completion.chunk", [], self._tally.usage(), slo)

    def _pieces(self, reader: ToolCallReader | None, delta: TextDelta) -> Iterator[AnswerMessage]:
        """At least one message where there are logprobs to go with it."""
        pieces: list[str | FunctionCall] = [delta.text] if reader is None else list(reader.push(delta.text))
        if reader is not None and delta.finish_reason is not None:
            pieces.append(reader.flush())
        messages = []
        calls = 0 if reader is None else reader.found - sum(isinstance(piece, FunctionCall) for piece in pieces)
        for piece in pieces:
            if isinstance(piece, FunctionCall):
                messages.append(AnswerMessage(tool_calls=[CallDelta(_call_id(), piece, index=calls)]))
                calls += 1
            elif piece:
                messages.append(AnswerMessage(content=piece))
        if not messages and delta.logprobs and delta.finish_reason is None:
            messages.append(AnswerMessage(content=""))
        yield from messages

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of an unstreamed request."""
        choices = []
        for result in results:
            assert result.finish_reason is not None
            reason = self._tally.finish(result.index, result.finish_reason, result.report)
            message, called = self._message(result)
            choices.append(
                ChatChoice(
                    index=result.index,
                    message=message,
                    logprobs=self._logprobs(result.logprobs),
                    finish_reason="tool_calls" if called and reason == "stop" else reason,
                )
            )
        return self._encode("chat.completion", choices, self._tally.usage(), self._tally.slo())

    def _message(self, result: TextResult) -> tuple[AnswerMessage, bool]:
        reader = self._readers[result.index]
        if reader is None:
            return AnswerMessage(role="assistant", content=result.text), False
        pieces = [*reader.push(result.text), reader.flush()]
        calls = [CallDelta(_call_id(), piece) for piece in pieces if isinstance(piece, FunctionCall)]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        if not calls:
            return AnswerMessage(role="assistant", content=text), False
        return AnswerMessage(role="assistant", content=text if text.strip() else None, tool_calls=calls), True

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs(
            [
                ScoredToken(*self._token(t.token_id, t.logprob), [TokenInfo(*self._token(*pair)) for pair in t.top])
                for t in logprobs
            ]
        )

    def _token(self, token_id: int, logprob: float) -> tuple[str, float, list[int] | None]:
        text = self._tokenizer.decode([token_id], skip_special=False)
        return text, logprob, None if "�" in text else list(text.encode())

    def _chunk(self, choice: ChatChoice, slo: SloReport | Unset = UNSET) -> bytes:
        return self._encode("chat.completion.chunk", [choice], None if self._usage else UNSET, slo)

    def _encode(
        self, kind: str, choices: list[ChatChoice], usage: Usage | Unset | None, slo: SloReport | Unset
    ) -> bytes:
        return msgspec.json.encode(
            ChatAnswer(
                id=self._id,
                object=kind,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=usage,
                slo=slo,
            )
        )


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
