"""Tool calls and reasoning found in the model's text, in every family's format, however the text is cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superinfer.runtime.models.registry import MODELS
from superinfer.runtime.protocol import RequestReport
from superinfer.runtime.server.chat_answer import ChatWriter, gather
from superinfer.runtime.server.parsing.families import TOOL_FORMATS, Formats, formats_of
from superinfer.runtime.server.parsing.pieces import AnswerReader, Piece
from superinfer.runtime.server.report import Tally
from superinfer.runtime.server.schema import ChatRequest, FunctionCall, Message
from superinfer.runtime.text import TextDelta, TextResult
from superinfer.runtime.tokenization import Tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "O\\"}slo", "days": [1, {"a": 2}]}}\n</tool_call>'
ARGUMENTS = {"city": 'O"}slo', "days": [1, {"a": 2}]}
REPORT = RequestReport(
    prompt_tokens=3, cached_tokens=0, output_tokens=9, queue_s=0, prefill_s=0, decode_s=0, e2e_s=0.1, ttft_s=0.1
)
INNER = '{"name": "weather", "arguments": {"city": "O\\"}slo", "days": [1, {"a": 2}]}}'
LLAMA = INNER.replace("arguments", "parameters")
PYTHON = "weather(city='O\"}slo', days=[1, {'a': 2}])"
ARGS = json.dumps(ARGUMENTS)

# format, the model's text, the content around the calls, number of calls
WRITTEN = [
    ("hermes", f"Let me see. {CALL}\n{CALL} a < b <tool_cal", "Let me see. \n a < b <tool_cal".replace("\n", ""), 2),
    ("hermes", f"{CALL}{CALL}", "", 2),
    ("hermes", CALL.replace("\n</tool_call>", ""), "", 1),  # cut off, but certain
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", 2),
    ("llama3_json", f" {LLAMA}", "", 1),
    ("llama3_json", f"[{LLAMA}, {LLAMA}]", "", 2),
    ("llama3_json", '{"answer": 42} is it', '{"answer": 42} is it', 0),
    ("llama3_json", '{"name": "nobody", "parameters": {}} x', '{"name": "nobody", "parameters": {}} x', 0),
    ("llama3_json", "It rains.", "It rains.", 0),
    ("llama3_json", ' [ {"answer": 42}, 1]', ' [ {"answer": 42}, 1]', 0),
    ("llama3_json", '[{"name": "nobody", "param', '[{"name": "nobody", "param', 0),
    ("llama3_json", '<|python_tag|>{"answer": 42}', '{"answer": 42}', 0),
    ("llama3_json", f"{LLAMA} and so on", "and so on", 1),
    ("llama3_json", f'{LLAMA}; {{"name": "nobody", "parameters": {{}}}}', '{"name": "nobody", "parameters": {}}', 1),
    ("llama3_json", f'[{LLAMA}, {{"name": "wea', "", 1),  # cut off, and no text of the answer
    ("mistral", f"[TOOL_CALLS][{INNER}, {INNER}]", "", 2),
    ("mistral", f"So: [TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]weather[CALL_ID]a1[ARGS]{ARGS}", "So: ", 2),
    ("mistral", "none [TOOL", "none [TOOL", 0),
    ("pythonic", f"[{PYTHON}, {PYTHON}]", "", 2),
    ("pythonic", f'[weather(city={json.dumps(ARGUMENTS["city"])}, days=[1, {{"a": 2}}])]', "", 1),
    ("pythonic", "[1, 2] are numbers", "[1, 2] are numbers", 0),
    ("pythonic", "[weather('Oslo')]", "[weather('Oslo')]", 0),
    ("pythonic", "It rains.", "It rains.", 0),
]


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def reader(tools: str, *, reasoning: bool = False, one_call: bool = False, prompt_end: str = "") -> AnswerReader:
    formats = Formats(tools, reasoning, ())
    return formats.reader(frozenset(["weather"]), prompt_end=prompt_end, constrained=False, one_call=one_call)


def read(reader: AnswerReader, texts: list[str]) -> list[Piece]:
    return [piece for text in texts for piece in reader.push(text)] + reader.finish()


@pytest.mark.parametrize(("tools", "text", "content", "calls"), WRITTEN)
@given(cuts=st.lists(st.integers(0, 220), max_size=8))
def test_calls_are_found_however_the_text_is_cut(
    tools: str, text: str, content: str, calls: int, cuts: list[int]
) -> None:
    found_content, reasoning, found = gather(read(reader(tools), pieces(text, cuts)))
    assert (found_content, reasoning, len(found)) == (content, "", calls)
    assert all(call.name == "weather" and json.loads(call.arguments) == ARGUMENTS for call in found)


def test_every_format_is_tried_above() -> None:
    assert {tools for tools, *_ in WRITTEN} == set(TOOL_FORMATS)


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
@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_what_is_no_call_stays_text(text: str, cuts: list[int]) -> None:
    assert gather(read(reader("hermes"), pieces(text, cuts))) == (text, "", [])


def test_pythonic_calls_may_hold_literals_of_json() -> None:
    texts = 'c="\\/ \\ud83d\\ude00 \\u00e9", d=\'\\x41\', e={"true": "true"}'
    text = f"[weather(a=true, b=[false, null, True, None], {texts})]"
    _, _, (call,) = gather(read(reader("pythonic"), [text]))
    assert json.loads(call.arguments) == {
        "a": True, "b": [False, None, True, None], "c": "/ \U0001f600 é", "d": "A", "e": {"true": "true"}
    }  # fmt: skip
    assert gather(read(reader("pythonic"), ["[weather(a=nobody)]"]))[2] == []


@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_a_constrained_answer_calls_from_its_beginning_on_or_not_at_all(cuts: list[int]) -> None:
    formats = Formats("hermes", False, ())
    inside = json.dumps({"said": CALL})
    for text, content, calls in ((inside, inside, 0), (f"{CALL}\n{CALL}", "", 2), ("<tool", "<tool", 0), ("", "", 0)):
        reader = formats.reader(frozenset(["weather"]), prompt_end="", constrained=True, one_call=False)
        found = gather(read(reader, pieces(text, cuts)))
        assert (found[0], len(found[2])) == (content, calls)


def test_arguments_come_while_they_are_written() -> None:
    read_so_far = reader("hermes").push('<tool_call>{"name": "weather", "arguments": {"city": "Os')
    assert read_so_far == [Piece("call", "weather"), Piece("arguments", '{"city": "Os')]


def test_keys_in_another_order_and_a_call_without_arguments_are_understood() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>'
    assert gather(read(reader("hermes"), [text]))[2] == [FunctionCall("f", '{"a": 1}'), FunctionCall("g", "{}")]


def test_without_parallel_calls_only_the_first_one_counts() -> None:
    text, _, calls = gather(read(reader("hermes", one_call=True), [f"so: {CALL}{CALL} and more"]))
    assert text == "so: " and len(calls) == 1


@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_reasoning_is_split_from_the_answer(cuts: list[int]) -> None:
    for text, prompt_end in (
        ("<think>\nwell, 1 < 2\n\n</think>\n\nTwo.", ""),
        ("\nwell, 1 < 2\n\n</think>\n\nTwo.", "assistant\n<think>\n"),
    ):
        found = read(reader("hermes", reasoning=True, prompt_end=prompt_end), pieces(text, cuts))
        assert gather(found)[:2] == ("Two.", "well, 1 < 2")
    late = "I write <think> as I like </think>"
    assert gather(read(reader("hermes", reasoning=True), pieces(late, cuts)))[:2] == (late, "")


def test_a_call_may_follow_reasoning() -> None:
    content, reasoning, calls = gather(read(reader("hermes", reasoning=True), [f"<think>hm</think>\n{CALL}"]))
    assert (content, reasoning, len(calls)) == ("", "hm", 1)


@pytest.mark.parametrize(
    ("template", "architecture", "tools", "thinks"),
    [
        ("{{ tools }}<tool_call>{% if enable_thinking %}<think>{% endif %}", "Qwen3ForCausalLM", "hermes", True),
        ("{{ tools }}[TOOL_CALLS]", "MistralForCausalLM", "mistral", False),
        ("{{ tools }}", "MixtralForCausalLM", "mistral", False),
        ("{{ tools }}<|python_tag|>", "LlamaForCausalLM", "llama3_json", False),
        ("{{ tools }}[func_name1(params_name1=params_value1", "LlamaForCausalLM", "pythonic", False),
        ("{{ tools }}", "Qwen2ForCausalLM", "hermes", False),
        ("{{ messages }}", "LlamaForCausalLM", "hermes", False),
    ],
)
def test_the_template_or_the_architecture_tells_the_format(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, template: str, architecture: str, tools: str, thinks: bool
) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", template)
    tokenizer = Tokenizer(str(tiny_checkpoint))
    found = formats_of(tokenizer, architecture)
    assert (found.tools, found.reasoning) == (tools, thinks)
    assert formats_of(tokenizer, architecture, tools="pythonic", reasoning="think").tools == "pythonic"


@pytest.mark.parametrize("architecture", MODELS)
def test_every_model_that_is_loaded_has_a_format_of_its_own(architecture: str) -> None:
    named = [name for name, known in TOOL_FORMATS.items() if architecture.startswith(known.architectures)]
    assert len(named) == 1, "its family is in the table, once"


def writer(checkpoint: Path, *, stream: bool = False, tools: str = "hermes") -> ChatWriter:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
    request = ChatRequest(model="tiny", messages=[Message(role="user", content="x")], tools=[tool], stream=stream)
    return ChatWriter(request, Tokenizer(str(checkpoint)), Tally(1, 1), [reader(tools, reasoning=True)], prompt=[1])


def test_an_answer_with_a_call_has_openais_shape(tiny_checkpoint: Path) -> None:
    result = TextResult(0, f"<think>rain?</think>{CALL}", [1], None, "stop", None, REPORT)
    answer = json.loads(writer(tiny_checkpoint).whole([result]))
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("rain?")}  # a token is a character
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "rain?"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == ARGUMENTS


def test_streamed_calls_come_in_pieces_that_join(tiny_checkpoint: Path) -> None:
    write = writer(tiny_checkpoint, stream=True)
    deltas = [TextDelta(0, piece, [1]) for piece in ("<think>rain?</think>so: ", CALL[:50], CALL[50:] + CALL)]
    deltas.append(TextDelta(0, "", [], None, "stop", None, REPORT))
    events = [event for delta in deltas for event in write.events(delta)]
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    arguments = {0: "", 1: ""}
    for call in calls:
        arguments[call["index"]] += call["function"]["arguments"]
    assert [call["function"]["name"] for call in calls if "id" in call] == ["weather", "weather"]
    assert all(json.loads(text) == ARGUMENTS for text in arguments.values()) and len(calls) > 4
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "so: "
    assert "".join(choice["delta"].get("reasoning_content") or "" for choice in choices) == "rain?"
    assert choices[-1]["finish_reason"] == "tool_calls"
