"""/v1/responses: from deltas to output items, as events or as one answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from superinfer.runtime.protocol import TokenLogprob
from superinfer.runtime.server.chat_answer import call_id, scored_token
from superinfer.runtime.server.errors import as_api_error
from superinfer.runtime.server.parsing.pieces import AnswerReader, Kind, Piece
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.responses import ResponsesRequest
from superinfer.runtime.server.stream import event
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

Item = dict[str, Any]
Keep = Callable[[str, bytes, list[Item]], None]

_encode = msgspec.json.Encoder().encode
_TYPES: dict[Kind, tuple[str, str]] = {
    # kind of piece: type of its item, prefix of the item's id
    "content": ("message", "msg"),
    "reasoning": ("reasoning", "rs"),
    "call": ("function_call", "fc"),
}


class ResponsesWriter:
    """Writes one response: `events` as it streams, or `whole` at its end."""

    event_end = b""  # response.completed is the last event

    def __init__(
        self, request: ResponsesRequest, tokenizer: Tokenizer, tally: Tally, reader: AnswerReader, keep: Keep | None
    ) -> None:
        """`keep(id, body, output items)` stores it; None: it is not stored."""
        self.id = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._tokenizer, self._tally, self._reader, self._keep = tokenizer, tally, reader, keep
        self._created = int(time.time())
        self._output: list[Item] = []
        self._open: Kind | None = None
        self._sequence = 0
        self._started = False

    # ------------------------------------------------------------------ streaming

    def events(self, delta: TextDelta) -> Iterator[bytes]:
        """The events for one delta; after the last, the closing ones."""
        if not self._started:
            self._started = True
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._response("in_progress"))
        pieces = self._reader.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._reader.finish()
        logprobs = self._logprobs(delta.logprobs)
        for piece in pieces:
            yield from self._piece(piece, logprobs)
            logprobs = [] if piece.kind == "content" else logprobs
        if delta.finish_reason is None:
            return
        reason = self._tally.finish(0, delta.finish_reason, delta.report)
        yield from self._close("completed" if reason == "stop" else "incomplete")
        status, body = self._finished(reason)
        yield self._event(f"response.{status}", response=msgspec.Raw(body))

    def _piece(self, piece: Piece, logprobs: list[Any]) -> Iterator[bytes]:
        kind: Kind = "call" if piece.kind == "arguments" else piece.kind
        if piece.kind == "call" or self._open != kind:
            yield from self._close("completed")
            yield from self._begin(kind, piece)
        if piece.kind == "call":
            return
        item = self._output[-1]
        at: dict[str, Any] = {"item_id": item["id"], "output_index": len(self._output) - 1}
        if piece.kind == "arguments":
            item["arguments"] += piece.text
            yield self._event("response.function_call_arguments.delta", delta=piece.text, **at)
            return
        item["content"][0]["text"] += piece.text
        at["content_index"] = 0
        if piece.kind == "reasoning":
            yield self._event("response.reasoning_text.delta", delta=piece.text, **at)
            return
        item["content"][0]["logprobs"] += logprobs
        yield self._event("response.output_text.delta", delta=piece.text, logprobs=logprobs, **at)

    def _begin(self, kind: Kind, piece: Piece) -> Iterator[bytes]:
        item = self._item(kind, piece.text)
        self._open = kind
        self._output.append(item)
        bare = item | ({"content": []} if "content" in item else {})
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=bare)
        if "content" in item:
            yield self._part("response.content_part.added")

    def _close(self, status: str) -> Iterator[bytes]:
        """Ends the item that is open."""
        kind, self._open = self._open, None
        if kind is None:
            return
        item = self._output[-1]
        item["status"] = status
        at: dict[str, Any] = {"item_id": item["id"], "output_index": len(self._output) - 1}
        if kind == "call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **done, **at)
        else:
            part = item["content"][0]
            if kind == "content":
                logprobs = {"logprobs": part["logprobs"]}
                yield self._event("response.output_text.done", text=part["text"], content_index=0, **logprobs, **at)
            else:
                yield self._event("response.reasoning_text.done", text=part["text"], content_index=0, **at)
            yield self._part("response.content_part.done")
        yield self._event("response.output_item.done", output_index=at["output_index"], item=item)

    def _part(self, kind: str) -> bytes:
        item = self._output[-1]
        at = {"item_id": item["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._event(kind, part=item["content"][0], **at)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return event(data, kind.encode())

    def failure(self, error: BaseException) -> bytes:
        """The event `error`, and then the response as it failed."""
        body = as_api_error(error).body
        response = self._response("failed")
        # OpenAI's codes here are a short list; ours says more, and its clients take any string.
        response["error"] = {"code": body.code or "server_error", "message": body.message}
        return self._event("response.failed", response=response)

    # ------------------------------------------------------------------ whole

    def whole(self, results: list[TextResult]) -> bytes:
        """The answer of an unstreamed request."""
        (result,) = results
        assert result.finish_reason is not None
        logprobs = self._logprobs(result.logprobs)
        for piece in self._reader.push(result.text) + self._reader.finish():
            for _ in self._piece(piece, logprobs):
                pass  # the events' side is the items, which are wanted here
            logprobs = [] if piece.kind == "content" else logprobs
        reason = self._tally.finish(0, result.finish_reason, result.report)
        for _ in self._close("completed" if reason == "stop" else "incomplete"):
            pass
        return self._finished(reason)[1]

    def _finished(self, reason: str) -> tuple[str, bytes]:
        status = "completed" if reason == "stop" else "incomplete"
        response = self._response(status)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._tally.reasoned(self._reader.thought, self._tokenizer)
        usage = self._tally.usage()
        cached, thought = usage.prompt_tokens_details, usage.completion_tokens_details
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0 if cached is msgspec.UNSET else cached.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0 if thought is msgspec.UNSET else thought.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
        if (slo := self._tally.slo()) is not msgspec.UNSET:
            response["slo"] = slo
        body = _encode(response)
        if self._keep is not None:
            self._keep(self.id, body, self._output)
        return status, body

    def _item(self, kind: Kind, name: str) -> Item:
        type_, prefix = _TYPES[kind]
        item: Item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": type_, "status": "in_progress"}
        if kind == "call":
            return item | {"call_id": call_id(), "name": name, "arguments": ""}
        if kind == "reasoning":
            return item | {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return item | {"role": "assistant", "content": [part]}

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> list[Any]:
        return [scored_token(self._tokenizer, scored) for scored in logprobs or []]

    def _response(self, status: str) -> dict[str, Any]:
        asked = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": self._output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": self._tally.promise.tier or "default",
            "store": self._keep is not None,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }
