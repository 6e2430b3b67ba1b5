"""Tools for agents: from Python functions to the JSON schemas a chat template shows, and from answers to calls."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from superinfer.errors import InvalidRequestError, OutputError
from superinfer.lang.unknown import DataDependent, Unknown

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """The model asks for `name(**arguments)`."""

    name: str
    arguments: dict[str, Any]


def tool_schema(tool: Callable[..., Any] | dict[str, Any]) -> dict[str, Any]:
    """The OpenAI schema of a Python function: its name, docstring and annotated parameters; a dict is passed on.

    Raises InvalidRequestError for what is neither, and for a parameter whose annotation has no JSON type.
    """
    if isinstance(tool, dict):
        return tool
    if not callable(tool):
        raise InvalidRequestError(f"tool {tool!r:.80} is neither a function nor a JSON schema")
    name = getattr(tool, "__name__", type(tool).__name__)
    hints = typing.get_type_hints(tool)
    properties, required = {}, []
    for parameter in inspect.signature(tool).parameters.values():
        kind = hints.get(parameter.name, str)
        schema = _schema_of(kind)
        if schema is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidRequestError(
                f"parameter {parameter.name!r} of tool {name} has no JSON type; annotate it as str, int, float, bool, "
                "list, dict, a Literal, or one of these or None"
            )
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    function = {
        "name": name,
        "description": inspect.getdoc(tool) or "",
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return {"type": "function", "function": function}


def _schema_of(kind: Any) -> dict[str, Any] | None:
    """JSON schema of an annotation; None: it has none."""
    if kind is Any:
        return {}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        kinds = {type(value) for value in arguments}
        named = {"type": _JSON_TYPES[kinds.pop()]} if len(kinds) == 1 and kinds <= _JSON_TYPES.keys() else {}
        return {**named, "enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        options = [{"type": "null"} if one is type(None) else _schema_of(one) for one in arguments]
        return None if None in options else {"anyOf": options}
    json_type = _JSON_TYPES.get(origin or kind)
    if json_type is None:
        return None
    if origin is list:
        items = _schema_of(arguments[0])
        return None if items is None else {"type": json_type, "items": items}
    return {"type": json_type}


def tool_calls(text: str) -> list[ToolCall]:
    """The calls in an answer, each `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; [] for a plain answer.

    Raises OutputError for a call that is not of this form.
    """
    return split_tool_calls(text)[1]


def split_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """What an answer says beside its tool calls, and the calls. Raises like `tool_calls`."""
    if isinstance(text, Unknown):
        raise DataDependent(f"it looks for tool calls in {text}")
    found = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise OutputError(f"the model wrote a tool call that cannot be read: {body!r:.200}") from None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise OutputError(f"the model wrote a tool call that cannot be read: {body!r:.200}")
        found.append(ToolCall(name, arguments))
    return _CALL.sub("", text).strip(), found
