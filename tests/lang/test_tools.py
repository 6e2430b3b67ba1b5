"""Tools: schemas from Python functions, calls from answers."""

from __future__ import annotations

from typing import Any, Literal

import pytest

import superinfer as si
from superinfer.lang.tools import tool_schema


def test_a_function_becomes_its_openai_schema() -> None:
    def order(item: str, count: int, price: float = 1.0, tags: list[str] | None = None) -> str:
        """Order something."""
        return ""

    assert tool_schema(order) == {
        "type": "function",
        "function": {
            "name": "order",
            "description": "Order something.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string"},
                    "count": {"type": "integer"},
                    "price": {"type": "number"},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["item", "count"],
            },
        },
    }


def test_choices_options_and_anything_have_schemas() -> None:
    def order(
        size: Literal["s", "m"],
        colour: str | None,
        count: int | None = None,
        more: Any = None,
        rest: dict[str, int] = {},  # noqa: B006
    ) -> None: ...

    properties = tool_schema(order)["function"]["parameters"]["properties"]
    assert properties == {
        "size": {"type": "string", "enum": ["s", "m"]},
        "colour": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "more": {},
        "rest": {"type": "object"},
    }


def test_a_parameter_without_a_json_type_is_refused() -> None:
    def strange(value: bytes) -> str:
        return ""

    def stranger(values: list[bytes] | None = None) -> str:
        return ""

    with pytest.raises(si.InvalidRequestError, match="'value' of tool strange"):
        si.tools([strange])
    with pytest.raises(si.InvalidRequestError, match="'values' of tool stranger"):
        si.tools([stranger])
    with pytest.raises(si.InvalidRequestError, match="neither a function"):
        si.tools([5])  # type: ignore[list-item]


def test_calls_are_read_from_an_answer() -> None:
    text = 'Sure. <tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call><tool_call>{"name": "b"}</tool_call>'
    assert si.tool_calls(text) == [si.ToolCall("a", {"x": 1}), si.ToolCall("b", {})]
    assert si.tool_calls("No call.") == []


@pytest.mark.parametrize("body", ["{", "[]", '{"arguments": {}}', '{"name": 1}', '{"name": "a", "arguments": "x"}'])
def test_a_call_that_cannot_be_read_is_an_output_error(body: str) -> None:
    with pytest.raises(si.OutputError, match="cannot be read"):
        si.tool_calls(f"<tool_call>{body}</tool_call>")
