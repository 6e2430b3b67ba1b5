"""Every parameter that OpenAI documents, as its own client lists them, is known here: honoured, or refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from superinfer.runtime.server import schema
from superinfer.runtime.server.refused import ANYTHING, CHAT_PASS, COMPLETION_PASS, RESPONSES_PASS
from superinfer.runtime.server.responses import ResponsesRequest

pytest.importorskip("openai")
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

ENDPOINTS = [
    ("/v1/chat/completions", chat_create_params.CompletionCreateParamsBase, schema.ChatRequest, CHAT_PASS),
    ("/v1/completions", completion_create_params.CompletionCreateParamsBase, schema.CompletionRequest,
     COMPLETION_PASS),
    ("/v1/responses", response_create_params.ResponseCreateParamsBase, ResponsesRequest, RESPONSES_PASS),
]  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 2},
}


def documented(params: type) -> set[str]:
    return {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})} | {"stream"}


@pytest.mark.parametrize(("url", "params", "own", "passing"), ENDPOINTS, ids=[url for url, *_ in ENDPOINTS])
def test_what_openai_documents_is_known(url: str, params: type, own: type, passing: dict[str, Any]) -> None:
    assert documented(params) - set(own.__struct_fields__) - set(passing) == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("url", "passing"), [(url, passing) for url, _, _, passing in ENDPOINTS])
def test_what_is_not_honoured_is_refused_by_name_and_what_asks_for_nothing_passes(
    http: httpx.Client, url: str, passing: dict[str, tuple[Any, ...]]
) -> None:
    for name, values in passing.items():
        for value in values:
            if value is not ANYTHING:
                answer = http.post(url, json=NEEDED[url] | {name: value})
                assert answer.status_code == 200, (name, value, answer.text)
        if ANYTHING not in values:
            error = http.post(url, json=NEEDED[url] | {name: {"never": "heard of"}}).json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported_parameter"), name


@pytest.mark.parametrize(
    ("url", "change", "name"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_all": True}}, "stream_options.include_all"),
        ("/v1/responses", {"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary"),
        ("/v1/responses", {"text": {"colour": "red"}}, "text.colour"),
        ("/v1/completions", {"messages": []}, "messages"),
        (
            "/v1/completions",
            {"structured_outputs": {"whitespace_pattern": "x"}},
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_an_unknown_part_is_named_too(http: httpx.Client, url: str, change: dict[str, Any], name: str) -> None:
    answer = http.post(url, json=NEEDED[url] | change)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"
    assert answer.json()["error"]["param"] == name


def test_the_generation_prompt_can_be_left_out(http: httpx.Client) -> None:
    ask = NEEDED["/v1/chat/completions"]

    def prompt_tokens(**more: Any) -> int:
        return int(http.post("/v1/chat/completions", json=ask | more).json()["usage"]["prompt_tokens"])

    assert prompt_tokens() == prompt_tokens(add_generation_prompt=True)
    assert prompt_tokens() - prompt_tokens(add_generation_prompt=False) == 1 + len("assistant\n")
    messages = [*ask["messages"], {"role": "assistant", "content": "well"}]
    both = {"messages": messages, "add_generation_prompt": True, "continue_final_message": True}
    refused = http.post("/v1/chat/completions", json=ask | both)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "add_generation_prompt"
