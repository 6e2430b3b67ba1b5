"""The OpenAPI document, made from the structs that requests are parsed by and answers are written with."""

from __future__ import annotations

from typing import Any

import msgspec

from superinfer.runtime.server.chat_answer import ChatAnswer
from superinfer.runtime.server.completion import CompletionAnswer
from superinfer.runtime.server.errors import ErrorAnswer
from superinfer.runtime.server.responses import ResponsesRequest
from superinfer.runtime.server.schema import ChatRequest, CompletionRequest
from superinfer.runtime.server.select import SelectAnswer, SelectRequest
from superinfer.runtime.server.tokens import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

_REF = "#/components/schemas/{name}"
# path, method, what it does, request, answer; a request of None has no body, an answer of None is any JSON
_ROUTES: tuple[tuple[str, str, str, type | None, type | None], ...] = (
    ("/v1/chat/completions", "post", "Answer a chat.", ChatRequest, ChatAnswer),
    ("/v1/completions", "post", "Continue prompts.", CompletionRequest, CompletionAnswer),
    ("/v1/select", "post", "Score choices behind a prompt.", SelectRequest, SelectAnswer),
    ("/v1/responses", "post", "Answer items; continue an earlier response.", ResponsesRequest, None),
    ("/v1/responses/{response_id}", "get", "A stored response.", None, None),
    ("/v1/responses/{response_id}", "delete", "Forget a stored response.", None, None),
    ("/v1/responses/{response_id}/input_items", "get", "What a stored response was asked.", None, None),
    ("/v1/models", "get", "The one model.", None, None),
    ("/v1/models/{model}", "get", "The model, by its name.", None, None),
    ("/tokenize", "post", "Token ids of a prompt or of messages.", TokenizeRequest, TokenizeAnswer),
    ("/detokenize", "post", "Text of token ids.", DetokenizeRequest, DetokenizeAnswer),
    ("/health", "get", "Whether the engine answers.", None, None),
    ("/ready", "get", "Whether requests can be answered.", None, None),
    ("/version", "get", "The server's version.", None, None),
)
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def openapi(*, version: str, with_keys: bool) -> dict[str, Any]:
    """The document, as JSON values. `with_keys`: requests need an API key."""
    structs = [struct for route in _ROUTES for struct in route[3:] if struct is not None]
    _, components = msgspec.json.schema_components([*structs, ErrorAnswer], ref_template=_REF)
    paths: dict[str, Any] = {}
    for path, method, summary, request, answer in _ROUTES:
        paths.setdefault(path, {})[method] = _operation(path, summary, request, answer)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "superinfer", "version": version, "description": "Language models, served to a deadline."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(path: str, summary: str, request: type | None, answer: type | None) -> dict[str, Any]:
    whole: dict[str, Any] = {"application/json": {"schema": _schema(answer)}}
    if path in _STREAMED:
        whole["text/event-stream"] = {"schema": {"type": "string"}}
    wrong = {"application/json": {"schema": _schema(ErrorAnswer)}}
    error = {"description": "An error in OpenAI's shape.", "content": wrong}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": whole}, "default": error},
    }
    if request is not None:
        content = {"application/json": {"schema": _schema(request)}}
        operation["requestBody"] = {"required": True, "content": content}
    if "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _schema(struct: type | None) -> dict[str, Any]:
    return {"$ref": _REF.format(name=struct.__name__)} if struct is not None else {"type": "object"}
