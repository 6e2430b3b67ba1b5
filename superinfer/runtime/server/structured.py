"""What constrains an output: response_format, structured_outputs, and a tool_choice that demands a call."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from superinfer.runtime.protocol import Grammar
from superinfer.runtime.server.errors import ApiError, bad_request
from superinfer.runtime.server.parsing.families import Formats
from superinfer.runtime.server.parsing.written import Tool, either, list_schema, schema_of
from superinfer.runtime.server.schema import ChatRequest, Common, Written


class ToolPlan(NamedTuple):
    """tools: those to render. names: of the tools that the answer may call. named: it must call this one, and the
    constrained text is its arguments. listed: it must call some, and the constrained text is a list of calls."""

    tools: list[dict[str, Any]]
    names: frozenset[str] = frozenset()
    named: str = ""
    listed: bool = False
    one_call: bool = False


def tool_plan(request: ChatRequest) -> ToolPlan:
    """What tools, tool_choice and parallel_tool_calls ask for. Raises ApiError."""
    tools, choice = request.tools or [], request.tool_choice
    for at, tool in enumerate(tools):
        _check_tool(at, tool)
    names = frozenset(tool["function"]["name"] for tool in tools)
    one = request.parallel_tool_calls is False
    if choice == "none" or (not tools and choice in (None, "auto")):
        return ToolPlan([])
    if choice in (None, "auto"):
        return ToolPlan(tools, names, one_call=one)
    if not tools:
        raise bad_request(f"tool_choice={choice!r:.80} needs tools; give at least one", param="tool_choice")
    if choice == "required":
        return ToolPlan(tools, names, listed=True, one_call=one)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(request, choice, tools)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request(
            f"tool_choice={choice!r:.80} is not known; use 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in names:
        raise bad_request(
            f"tool_choice={name!r:.80} is not one of the tools; use one of {', '.join(sorted(names))}",
            param="tool_choice",
        )
    return ToolPlan(tools, names, named=name, one_call=True)


def _allowed(request: ChatRequest, choice: dict[str, Any], tools: list[dict[str, Any]]) -> ToolPlan:
    """OpenAI's subset of the tools that may be called; all of them are shown."""
    inner = choice.get("allowed_tools")
    given = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or inner.get("mode") not in ("auto", "required") or not isinstance(given, list):
        raise bad_request(
            f"tool_choice={choice!r:.80} needs a mode 'auto' or 'required', and tools", param="tool_choice"
        )
    wanted = {str(t.get("function", {}).get("name")) for t in given if isinstance(t, dict)}
    tools = [tool for tool in tools if tool["function"]["name"] in wanted]
    if not tools:
        raise bad_request("tool_choice allows none of the tools; name at least one", param="tool_choice")
    names = frozenset(tool["function"]["name"] for tool in tools)
    return ToolPlan(tools, names, listed=inner["mode"] == "required", one_call=request.parallel_tool_calls is False)


def _check_tool(at: int, tool: dict[str, Any]) -> None:
    function = tool.get("function")
    if (
        tool.get("type") != "function"
        or not isinstance(function, dict)
        or not (isinstance(function.get("name"), str) and function["name"])
    ):
        raise bad_request(
            f"tools[{at}]={tool!r:.80} is not a function tool; "
            'give {"type": "function", "function": {"name": ..., "parameters": {...}}}',
            param=f"tools[{at}]",
        )
    if not isinstance(function.get("parameters", {}), dict | None):
        raise bad_request(f"tools[{at}].function.parameters is not a JSON schema", param=f"tools[{at}]")


def grammar_of_chat(request: ChatRequest, plan: ToolPlan, formats: Formats) -> Grammar | None:
    """The constraint on the answer. formats: how the model writes calls. Raises ApiError where two exclude each other,
    UnsupportedError for a tool that no answer can be constrained to call."""
    format = own_grammar(request)
    tools = [Tool(tool["function"]["name"], _parameters(tool)) for tool in plan.tools]
    if plan.named:
        return _schema(next(tool.arguments for tool in tools if tool.name == plan.named))
    if plan.listed:
        return _schema(list_schema(tools, plan.one_call))
    if format is None or not tools:
        return format
    # OpenAI's meaning: the format is that of an answer in words; a call is not one.
    written = either(_as_tag(format), formats.calls(tools, one=plan.one_call))
    return Grammar(kind="structural_tag", source=json.dumps(written))


def own_grammar(request: Written) -> Grammar | None:
    """Of a request's response_format or structured_outputs. Raises ApiError where it has both."""
    own = [grammar_of_format(request.response_format), grammar_of(request)]
    if own[0] is not None and own[1] is not None:
        raise bad_request("response_format and structured_outputs exclude each other", param="structured_outputs")
    return own[0] or own[1]


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def _as_tag(grammar: Grammar) -> dict[str, Any]:
    """A grammar as a format of a structural tag. Raises ApiError."""
    match grammar.kind:
        case "regex":
            return {"type": "regex", "pattern": grammar.source}
        case "ebnf":
            return {"type": "grammar", "grammar": grammar.source}
        case "structural_tag":
            return dict(json.loads(grammar.source))
        case "json_object":
            return schema_of({"type": "object", "additionalProperties": True})
    try:
        return schema_of(json.loads(grammar.source))
    except ValueError as error:
        message = f"structured_outputs.json={grammar.source!r:.80} is not JSON: {error}"
        raise bad_request(message, param="structured_outputs") from None


def grammar_of_format(given: dict[str, Any] | None) -> Grammar | None:
    """Of a response_format. Raises ApiError."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar(kind="json_object")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return _schema(schema)
        case {"type": "json_schema", "json_schema": dict()}:
            raise _bad_format("response_format.json_schema.schema is missing; add it")
        case {"type": "json_schema"}:
            raise _bad_format("response_format.json_schema is missing; add it")
        case {"type": "structural_tag"}:
            return _tag_of(given, "response_format")
    raise _bad_format(
        f"response_format={given!r:.80} is not known; use the type text, json_object, json_schema or structural_tag"
    )


def _bad_format(message: str) -> ApiError:
    return bad_request(message, param="response_format")


def grammar_of(request: Common) -> Grammar | None:
    """Of structured_outputs. Raises ApiError."""
    given = request.structured_outputs
    if given is None:
        return None
    found: list[Grammar] = []
    if given.json is not None:
        found.append(_schema(given.json))
    if given.json_object:
        found.append(Grammar(kind="json_object"))
    if given.regex:
        found.append(Grammar(kind="regex", source=given.regex))
    if given.choice:
        found.append(Grammar(kind="regex", source="|".join(f"({re.escape(choice)})" for choice in given.choice)))
    if given.grammar:
        found.append(Grammar(kind="ebnf", source=given.grammar))
    if given.structural_tag is not None:
        found.append(_tag_of(given.structural_tag, "structured_outputs.structural_tag"))
    if len(found) != 1:
        message = (
            f"structured_outputs holds {len(found)} constraints; give one of json, regex, choice, grammar, "
            "json_object, structural_tag"
        )
        raise bad_request(message, param="structured_outputs")
    return found[0]


def _tag_of(given: dict[str, Any] | str, where: str) -> Grammar:
    """Of a structural tag, as an object or its JSON. Raises ApiError."""
    try:
        tag = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise bad_request(f"{where}={given!r:.80} is not JSON: {error}", param=where) from None
    match tag:
        case {"type": "structural_tag", "format": dict(format)}:
            return Grammar(kind="structural_tag", source=json.dumps(format))
    raise bad_request(f'{where}={tag!r:.80} is no tag; give {{"type": "structural_tag", "format": ...}}', param=where)


def _schema(schema: dict[str, Any] | str) -> Grammar:
    return Grammar(kind="json_schema", source=schema if isinstance(schema, str) else json.dumps(schema))
