"""/v1/responses: from a request, and the stored one it continues, to a chat request."""

from __future__ import annotations

import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from superinfer.runtime.server.errors import ApiError, bad_request
from superinfer.runtime.server.schema import ChatRequest, Common, FunctionCall, Message, ToolCall

WITH_LOGPROBS = "message.output_text.logprobs"
# What `include` may name. The reasoning is shown as it is, not encrypted.
INCLUDABLE = (WITH_LOGPROBS, "reasoning.encrypted_content")
ITEM_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
MAX_PAGE = 100
ENTRY_BYTES = 512  # of a stored response, beside its JSON: its id, its place among the others, and heads of objects


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """effort: as reasoning_effort of a chat. A summary is never made: the reasoning itself is shown."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """format: `{"type": "text"}`, `json_object`, or `json_schema` with its name and schema."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat_of(request: ResponsesRequest, history: list[dict[str, Any]]) -> ChatRequest:
    """The chat that `history` (items of earlier responses) and the request's own items make. Raises ApiError."""
    if (request.n or 1) != 1 or request.max_tokens is not None:
        name, remedy = ("n", "ask n times") if request.max_tokens is None else ("max_tokens", "use max_output_tokens")
        raise bad_request(f"{name}={getattr(request, name)} is no parameter of responses; {remedy}", param=name)
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        message = f"max_output_tokens={request.max_output_tokens} must be at least 1"
        raise bad_request(message, param="max_output_tokens")
    included = request.include or []
    for name in included:
        if name not in INCLUDABLE:
            message = f"include={name!r:.80} is not supported by this server; use {' or '.join(INCLUDABLE)}"
            raise bad_request(message, param="include", code="unsupported_parameter")
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    for at, item in enumerate([*history, *items_of(request)]):
        _add_item(messages, item, f"input[{at - len(history)}]")
    shared = {name: getattr(request, name) for name in Common.__struct_fields__ if name not in ("max_tokens", "n")}
    return ChatRequest(
        **shared,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        logprobs=True if request.top_logprobs is not None or WITH_LOGPROBS in included else None,
        top_logprobs=request.top_logprobs,
        tools=[_tool(at, tool) for at, tool in enumerate(request.tools or [])] or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request.text.format if request.text else None),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        chat_template_kwargs=request.chat_template_kwargs,
    )


# What is said of a chat, as this API calls it.
_OWN_NAMES = {"messages": "input", "reasoning_effort": "reasoning.effort", "response_format": "text.format"}


def in_own_names(error: ApiError) -> ApiError:
    """An error of the chat that a request was turned into, with the names of the request's own fields."""
    name = error.body.param or ""
    if name not in _OWN_NAMES:
        return error
    own = _OWN_NAMES[name]
    message = error.body.message
    if message.startswith(name):
        message = own + message[len(name) :]
    return ApiError(error.status, message, param=own, code=error.body.code, type=error.body.type, headers=error.headers)


def items_of(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The request's input as items."""
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": request.input}]
    return request.input


def as_stored(item: dict[str, Any]) -> dict[str, Any]:
    """An item of the input as OpenAI gives it back: with an id, and its text in parts."""
    given = {name: value for name, value in item.items() if value is not None}
    kind = given.get("type", "message")
    item = {"id": f"{ITEM_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "completed"} | given
    if kind == "message" and isinstance(item["content"], str):
        text = {"text": item["content"]}
        mine = item["role"] == "assistant"
        part = {"type": "output_text", **text, "annotations": []} if mine else {"type": "input_text", **text}
        item["content"] = [part]
    return item


def page_of(items: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """OpenAI's list of some of `items`: `order` (desc or asc), `limit` (1 to 100) and `after` (an id) of a query.

    Raises ApiError.
    """
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise bad_request(f"order={order!r:.80} is not known; use asc or desc", param="order")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= MAX_PAGE:
        raise bad_request(f"limit={limit!r:.80} must be between 1 and {MAX_PAGE}", param="limit")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise bad_request(f"after={after!r:.80} is none of this response's items", param="after")
    if order == "desc":
        items = items[::-1]
        ids = ids[::-1]
    first = 0 if after is None else ids.index(after) + 1
    data = items[first : first + int(limit)]
    return {
        "object": "list",
        "data": data,
        "has_more": first + len(data) < len(items),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _add_item(messages: list[Message], item: dict[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    try:
        if kind == "message":
            messages.append(Message(role=_role(item, where), content=_text(item.get("content"), where)))
        elif kind == "function_call":
            call = ToolCall(FunctionCall(str(item["name"]), str(item["arguments"])), str(item["call_id"]))
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":  # calls of one turn are one message in a chat
                calls = [*(last.tool_calls or []), call]
                messages[-1] = msgspec.structs.replace(last, tool_calls=calls)
            else:
                messages.append(Message(role="assistant", content="", tool_calls=[call]))
        elif kind == "function_call_output":
            content = _text(item["output"], where)
            messages.append(Message(role="tool", content=content, tool_call_id=str(item["call_id"])))
        elif kind != "reasoning":  # templates that show earlier reasoning show only the last turn's
            raise bad_request(
                f"{where}.type={kind!r:.80} is not supported; use message, function_call, function_call_output or "
                "reasoning",
                param=f"{where}.type",
                code="unsupported_content",
            )
    except KeyError as error:
        name = f"{where}.{error.args[0]}"
        raise bad_request(f"{name} is missing; add it", param=name, code="missing_parameter") from None


def _role(item: dict[str, Any], where: str) -> Any:
    role = item["role"]
    if role not in ("system", "developer", "user", "assistant"):
        raise bad_request(f"{where}.role={role!r:.80} is not known", param=f"{where}.role", code="invalid_type")
    return role


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where}.content={content!r:.80} is no text", param=f"{where}.content", code="invalid_type")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise bad_request(
                f"{where}.content: a part of type {kind!r:.80} is not supported: this server takes text only",
                param=f"{where}.content",
                code="unsupported_content",
            )
        parts.append(str(part.get("text", part.get("refusal", ""))))
    return "\n".join(parts)


def _tool(at: int, tool: dict[str, Any]) -> dict[str, Any]:
    """Responses name a function beside its type, chats inside."""
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise bad_request(
            f'tools[{at}]={tool!r:.80} is not a function tool; give {{"type": "function", "name": ...}}',
            param=f"tools[{at}]",
        )
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}


class Stored(msgspec.Struct, frozen=True):
    """One kept response. body: its JSON. past: that of all items up to its own output, where `given` say which of them
    it was asked with. As JSON they take the room that is counted, which they would not as objects."""

    body: bytes
    past: bytes
    given: slice

    @property
    def items(self) -> list[dict[str, Any]]:
        """All items up to its own output."""
        found: list[dict[str, Any]] = msgspec.json.decode(self.past)
        return found

    @property
    def input(self) -> list[dict[str, Any]]:
        """The items it was asked with."""
        return self.items[self.given]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + len(self.past) + ENTRY_BYTES


class ResponseStore:
    """Responses by id, in at most `max_bytes`; the oldest go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def put(
        self,
        response_id: str,
        body: bytes,
        history: list[dict[str, Any]],
        given: list[dict[str, Any]],
        output: list[dict[str, Any]],
    ) -> None:
        """Keep it; one that alone is over the limit is not kept. history: the items before those that were given."""
        past = msgspec.json.encode([*history, *given, *output])
        stored = Stored(body, past, slice(len(history), len(history) + len(given)))
        if stored.size > self._max_bytes:
            return
        self._stored[response_id] = stored
        self._bytes += stored.size
        while self._bytes > self._max_bytes:
            self._bytes -= self._stored.popitem(last=False)[1].size

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Raises ApiError for one that is not kept."""
        found = self._stored.get(response_id)
        if found is None:
            message = f"response {response_id!r:.80} is not stored here: it never was, or newer ones took its place"
            code = "previous_response_not_found" if param else "response_not_found"
            raise ApiError(400 if param else 404, message, param=param, code=code)
        return found

    def remove(self, response_id: str) -> None:
        """Forget it. Raises ApiError for one that is not kept."""
        self._bytes -= self.get(response_id).size
        del self._stored[response_id]
