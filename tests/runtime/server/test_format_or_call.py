"""A format beside tools that the model may call: its answer is a call as it writes them, or is in the format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from chat_checkpoint import write_checkpoint

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.server.parsing.families import TOOL_FORMATS

Serving = Callable[..., AbstractContextManager[Any]]

FORMAT = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", 'a "quoted" /\\city']}, "cold": {"type": "boolean"}},
    "required": ["city"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}, "at": {"enum": [None, 7]}}}
SCHEMAS = {"weather": WEATHER, "time": TIME, "ping": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": FORMAT}}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "well?"}], "tools": TOOLS, "max_tokens": 400}
# The first character of a call in each format.
BEGINS = {"hermes": "<", "mistral": "[", "pythonic": "[", "llama3_json": "{"}


@pytest.fixture(scope="module", params=list(BEGINS))
def spoken(request: pytest.FixtureRequest, tiny_engine: EngineProcess, serving: Serving) -> Iterator[Any]:
    """(format, client of a server whose model speaks it)"""
    with serving(tiny_engine.address, tool_parser=request.param) as server, server.http() as http:
        yield request.param, http


def bias(http: httpx.Client, **characters: float) -> dict[str, float]:
    """logit_bias of characters, which are this model's tokens; named by their Python names or as they are."""
    found = {}
    for character, value in characters.items():
        (token_id,) = http.post("/tokenize", json={"model": "tiny", "prompt": character}).json()["tokens"]
        found[str(token_id)] = value
    return found


def streamed(http: httpx.Client, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """By choice, what the chunks of a stream make: content, calls, reason."""
    found: dict[int, dict[str, Any]] = {}
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    one = found.setdefault(choice["index"], {"content": "", "calls": [], "reason": None})
                    one["content"] += choice["delta"].get("content") or ""
                    for call in choice["delta"].get("tool_calls") or []:
                        if "id" in call:
                            one["calls"].append([call["function"]["name"], ""])
                        one["calls"][call["index"]][1] += call["function"]["arguments"]
                    one["reason"] = choice["finish_reason"] or one["reason"]
    return found


def whole(http: httpx.Client, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of an answer that is not streamed."""
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return {
        choice["index"]: {
            "content": choice["message"]["content"] or "",
            "calls": [
                [call["function"]["name"], call["function"]["arguments"]]
                for call in choice["message"].get("tool_calls") or []
            ],
            "reason": choice["finish_reason"],
        }
        for choice in answer.json()["choices"]
    }


def check_call(name: str, arguments: str) -> None:
    given, properties = json.loads(arguments), SCHEMAS[name]["properties"]
    assert given.keys() <= properties.keys() and given.keys() >= set(SCHEMAS[name].get("required", ()))
    for key, value in given.items():
        assert value in properties[key].get("enum", [True, False]), (name, key, value)


@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_is_a_call_or_in_the_format(spoken: Any, parallel: bool) -> None:
    tools, http = spoken
    asked = ASK | {"response_format": JSON_SCHEMA, "parallel_tool_calls": parallel, "n": 6, "seed": 1}
    calling = asked | {"logit_bias": bias(http, **{BEGINS[tools]: 100.0, "n": 100.0})}
    for get in (whole, streamed):
        for one in get(http, calling).values():
            if one["reason"] == "length":  # it went on calling
                assert parallel and len(one["calls"]) > 1
                del one["calls"][-1]
            else:
                assert one["reason"] == "tool_calls" and one["content"] == ""
            assert one["calls"] if parallel else len(one["calls"]) == 1
            for name, arguments in one["calls"]:
                check_call(name, arguments)
    # `"a` is only in the format, and where both begin alike it is chosen there
    answering = asked | {"logit_bias": bias(http, **{"{": 100.0, "a": 50.0})}
    assert whole(http, answering) == streamed(http, answering)
    for one in whole(http, answering).values():
        assert one["reason"] == "stop" and one["calls"] == []
        assert json.loads(one["content"]).keys() == {"answer", "sure"}


def test_streamed_and_whole_are_the_same(spoken: Any) -> None:
    tools, http = spoken
    calling = ASK | {"response_format": JSON_SCHEMA, "parallel_tool_calls": False, "n": 4, "seed": 3}
    calling |= {"logit_bias": bias(http, **{BEGINS[tools]: 100.0, "n": 100.0})}
    assert whole(http, calling) == streamed(http, calling)


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": json.dumps(FORMAT)}},
        {"structured_outputs": {"regex": "(aye|nay) <tool_call>"}},
        {"structured_outputs": {"choice": ["aye", "nay"]}},
        {"structured_outputs": {"grammar": 'root ::= "aye" | "nay"'}},
    ],
)
def test_every_kind_of_format_goes_beside_tools(spoken: Any, given: dict[str, Any]) -> None:
    tools, http = spoken
    asked = ASK | given | {"parallel_tool_calls": False, "seed": 1, "max_tokens": 100}
    if tools != "llama3_json" or "response_format" not in given:  # where both are any objects, this model never calls
        (call,) = whole(http, asked | {"logit_bias": bias(http, **{BEGINS[tools]: 100.0, "n": 50.0})}).values()
        ((name, arguments),) = call["calls"]
        check_call(name, arguments)
        assert call["reason"] == "tool_calls" and call["content"] == ""
    steered = bias(http, a=50.0, **{"{": 50.0, "[": -100.0, "<": -50.0})
    (answer,) = whole(http, asked | {"logit_bias": steered}).values()
    assert answer["calls"] == []
    text = answer["content"]
    match given:
        case {"response_format": _}:
            assert text.startswith("{")
        case {"structured_outputs": {"json": _}}:
            assert json.loads(text).keys() == {"answer", "sure"}
        case {"structured_outputs": {"regex": _}}:
            assert text == "aye <tool_call>"
        case _:
            assert text in ("aye", "nay")


def test_tools_that_demand_a_call_or_forbid_it_are_as_before(spoken: Any) -> None:
    _, http = spoken
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        (one,) = whole(http, ASK | {"response_format": JSON_SCHEMA, "tool_choice": choice, "seed": 2}).values()
        for name, arguments in one["calls"]:
            check_call(name, arguments)
        assert one["calls"]
    (one,) = whole(http, ASK | {"response_format": JSON_SCHEMA, "tool_choice": "none", "seed": 2}).values()
    assert one["calls"] == [] and json.loads(one["content"]).keys() == {"answer", "sure"}


def test_only_the_allowed_tools_are_called(spoken: Any) -> None:
    tools, http = spoken
    allowed = [{"type": "function", "function": {"name": "time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    asked = ASK | {"response_format": JSON_SCHEMA, "tool_choice": choice, "parallel_tool_calls": False, "n": 4}
    for one in whole(http, asked | {"logit_bias": bias(http, **{BEGINS[tools]: 100.0, "n": 100.0})}).values():
        assert [name for name, _ in one["calls"]] == ["time"]


def test_responses_call_or_answer_too(spoken: Any) -> None:
    tools, http = spoken
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    text = {"format": {"type": "json_schema", "name": "answer", "schema": FORMAT}}
    asked = {"model": "tiny", "input": "well?", "tools": flat, "text": text, "parallel_tool_calls": False, "seed": 1}
    calling = http.post(
        "/v1/responses", json=asked | {"logit_bias": bias(http, **{BEGINS[tools]: 100.0, "n": 100.0})}
    ).json()
    (call,) = [item for item in calling["output"] if item["type"] == "function_call"]
    check_call(call["name"], call["arguments"])
    answering = http.post("/v1/responses", json=asked | {"logit_bias": bias(http, **{"{": 100.0, "a": 50.0})}).json()
    (message,) = answering["output"]
    assert json.loads(message["content"][0]["text"]).keys() == {"answer", "sure"}


def test_a_tool_whose_schema_is_not_honoured_is_refused_by_name(http: httpx.Client) -> None:
    odd = {"type": "object", "properties": {"at": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "odd", "parameters": odd}}]
    error = http.post("/v1/chat/completions", json=ASK | {"response_format": JSON_SCHEMA, "tools": tools}).json()[
        "error"
    ]
    assert error["code"] == "unsupported" and "'uniqueItems'" in error["message"]


@pytest.mark.parametrize(
    ("name", "schema", "said"),
    [
        ("mail", {"type": "object", "properties": {"from": {"type": "string"}}}, "'from' is no name in Python"),
        ("say-it", {"type": "object", "properties": {}}, "'say-it' is no name in Python"),
        ("mail", {"anyOf": [{"type": "object"}]}, "is more than an object's type"),
    ],
)
def test_a_tool_that_python_cannot_call_is_refused_by_name(
    tiny_engine: EngineProcess, serving: Serving, name: str, schema: dict[str, Any], said: str
) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
    with serving(tiny_engine.address, tool_parser="pythonic") as server, server.http() as http:
        answer = http.post("/v1/chat/completions", json=ASK | {"response_format": JSON_SCHEMA, "tools": tools})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]
        assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("markers", "begin"),
    [
        (("[TOOL_CALLS]",), "[TOOL_CALLS]"),
        (("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]"),
        (("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), "[TOOL_CALLS]"),
        (("<tool_call>", "</tool_call>"), "<tool_call>"),
    ],
)
def test_markers_that_are_special_tokens_are_written_as_such(
    tmp_path: Path, tiny_config: EngineConfig, serving: Serving, markers: tuple[str, ...], begin: str
) -> None:
    model = write_checkpoint(tmp_path / "marked", markers)
    with (
        launch_engine(msgspec.structs.replace(tiny_config, model=str(model))) as engine,
        serving(engine.address, tool_parser="auto") as server,
        server.http() as http,
    ):
        asked = ASK | {"response_format": JSON_SCHEMA, "parallel_tool_calls": False, "n": 4, "seed": 1}
        calling = asked | {"logit_bias": bias(http, **{begin: 100.0})}
        assert whole(http, calling) == streamed(http, calling)
        for one in whole(http, calling).values():
            ((name, arguments),) = one["calls"]
            check_call(name, arguments)
            assert one["reason"] == "tool_calls" and one["content"] == ""
        # Nothing but a grammar that names a special token allows it: a text of the format holds none.
        free = asked | {"tools": None, "logit_bias": bias(http, **{begin: 100.0}), "max_tokens": 40}
        free |= {"response_format": None, "structured_outputs": {"regex": "[^a]{10}"}}
        for one in whole(http, free).values():
            assert len(one["content"]) == 10 and not re.search(r"TOOL|tool", one["content"])


def test_every_format_is_tried_here() -> None:
    assert BEGINS.keys() == TOOL_FORMATS.keys()
