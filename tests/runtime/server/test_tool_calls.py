"""Tool calls found in the model's text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superinfer.runtime.protocol import RequestReport
from superinfer.runtime.server.chat import ChatWriter
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.schema import ChatRequest, FunctionCall, Message
from superinfer.runtime.server.tool_calls import ToolCallReader
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
REPORT = RequestReport(
    prompt_tokens=3, cached_tokens=0, output_tokens=9, queue_s=0, prefill_s=0, decode_s=0, e2e_s=0.1, ttft_s=0.1
)


def read(pieces: list[str]) -> list[str | FunctionCall]:
    """Everything found; neighbouring text joined."""
    reader = ToolCallReader()
    found = [item for piece in pieces for item in reader.push(piece)] + [reader.flush()]
    joined: list[str | FunctionCall] = []
    for item in found:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        elif item:
            joined.append(item)
    return joined


@given(st.lists(st.integers(0, 200), max_size=8))
def test_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    text = f"Let me see. {CALL}\n{CALL} a < b <tool_cal"
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    call = FunctionCall("weather", '{"city": "Oslo"}')
    assert read(pieces) == ["Let me see. ", call, "\n", call, " a < b <tool_cal"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no json</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f"',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read([text]) == [text]


def writer(checkpoint: Path) -> ChatWriter:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
    request = ChatRequest(model="tiny", messages=[Message(role="user", content="x")], tools=[tool])
    return ChatWriter(request, Tokenizer(str(checkpoint)), Tally(1, 1, slo=False), choices=1)


def test_an_answer_with_a_call_has_openais_shape(tiny_checkpoint: Path) -> None:
    result = TextResult(0, CALL, [1], None, "stop", None, REPORT)
    (choice,) = json.loads(writer(tiny_checkpoint).whole([result]))["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


def test_streamed_calls_are_numbered_and_whole(tiny_checkpoint: Path) -> None:
    write = writer(tiny_checkpoint)
    deltas = [TextDelta(0, piece, [1]) for piece in ("so: ", CALL[:20], CALL[20:] + CALL)]
    deltas.append(TextDelta(0, "", [], None, "stop", None, REPORT))
    choices = [json.loads(chunk)["choices"][0] for delta in deltas for chunk in write.chunks(delta)]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert all(json.loads(call["function"]["arguments"]) == {"city": "Oslo"} for call in calls)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "so: "
    assert choices[-1]["finish_reason"] == "tool_calls"
