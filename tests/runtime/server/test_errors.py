"""Bad input gets an OpenAI-shaped error that names the value, and disturbs nothing else."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import openai
import pytest

from superinfer.errors import OverloadedError
from superinfer.runtime.server.errors import as_api_error

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
BAD_CALL = [
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}
]

TOOL = {"type": "function", "function": {"name": "weather"}}
NAMED = {"type": "function", "function": {"name": "other"}}

CHAT_CASES: list[tuple[dict[str, Any], int, str, str]] = [
    # change to a good request, status, code, what the message must contain
    ({"model": "gpt-9"}, 404, "model_not_found", "'gpt-9'"),
    ({"model": ""}, 404, "model_not_found", "model ''"),
    ({"model": 3}, 400, "invalid_type", "model=3"),
    ({"messages": None}, 400, "missing_parameter", "messages"),
    ({"messages": []}, 400, "invalid_request", "messages=[]"),
    ({"messages": "hello"}, 400, "invalid_type", "messages='hello'"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_type", "'robot'"),
    ({"messages": [{"role": "user"}]}, 400, "missing_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, 400, "unknown_parameter", "mood"),
    ({"messages": IMAGE}, 400, "unsupported_content", "'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_type", "content[0].text=None"),
    ({"messages": BAD_CALL}, 400, "invalid_request", "arguments='{'"),
    ({"messages": [{"role": "user", "content": "no template for this"}]}, 400, "invalid_request", "not for me"),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "context_length_exceeded", "2048"),
    ({"max_tokens": 5000}, 400, "context_length_exceeded", "5000"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens=0"),
    ({"max_tokens": -1}, 400, "invalid_request", "max_tokens=-1"),
    ({"max_tokens": "4"}, 400, "invalid_type", "max_tokens='4'"),
    ({"max_tokens": 4.5}, 400, "invalid_type", "max_tokens=4.5"),
    ({"max_tokens": True}, 400, "invalid_type", "max_tokens=True"),
    ({"max_tokens": 10**30}, 400, "context_length_exceeded", str(10**30)),
    ({"max_completion_tokens": 0, "max_tokens": None}, 400, "invalid_request", "max_completion_tokens=0"),
    ({"max_completion_tokens": 5}, 400, "invalid_request", "max_completion_tokens=5"),
    ({"min_tokens": 9}, 400, "invalid_request", "min_tokens=9"),
    ({"temperature": -1}, 400, "invalid_request", "temperature=-1"),
    ({"temperature": float("nan")}, 400, "invalid_request", "temperature=nan"),
    ({"temperature": 10**400}, 400, "invalid_type", "temperature="),
    ({"top_p": 0}, 400, "invalid_request", "top_p=0"),
    ({"top_k": -2}, 400, "invalid_request", "top_k=-2"),
    ({"n": 0}, 400, "invalid_request", "n=0"),
    ({"n": 1000}, 400, "invalid_request", "n=1000"),
    ({"seed": 2**70}, 400, "invalid_request", str(2**70)),
    ({"presence_penalty": 3}, 400, "invalid_request", "presence_penalty=3"),
    ({"stop": ""}, 400, "invalid_request", "stop=''"),
    ({"stop": [str(i) for i in range(17)]}, 400, "invalid_request", "17"),
    ({"stop": ["x", "y" * 1025]}, 400, "invalid_request", "1025 characters"),
    ({"stop": [1]}, 400, "invalid_type", "stop[0]=1"),
    ({"stop_token_ids": [10**6]}, 400, "invalid_request", "stop_token_ids[0]=1000000"),
    ({"logprobs": 3}, 400, "invalid_type", "logprobs=3"),
    ({"top_logprobs": 3}, 400, "invalid_request", "top_logprobs=3"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_request", "top_logprobs=21"),
    ({"stream": "yes"}, 400, "invalid_type", "stream='yes'"),
    ({"tools": [{"type": "magic"}]}, 400, "invalid_request", "tools[0]="),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, 400, "invalid_request", "tools[0]="),
    ({"tool_choice": "required"}, 400, "invalid_request", "tool_choice='required'"),
    ({"tools": [TOOL], "tool_choice": "perhaps"}, 400, "invalid_request", "tool_choice='perhaps'"),
    ({"tools": [TOOL], "tool_choice": NAMED}, 400, "invalid_request", "tool_choice='other'"),
    ({"response_format": {"type": "yaml"}}, 400, "invalid_request", "'yaml'"),
    ({"response_format": {"type": "json_schema"}}, 400, "invalid_request", "json_schema is missing"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "invalid_request", "2 constraints"),
    ({"logit_bias": {"hello": 2}}, 400, "invalid_request", "logit_bias='hello'"),
    ({"logit_bias": {"1": 200}}, 400, "invalid_request", "logit_bias=200"),
    ({"logit_bias": {"1000000": 2}}, 400, "invalid_request", "1000000"),
    ({"allowed_token_ids": []}, 400, "invalid_request", "allowed_token_ids holds 0 ids"),
    ({"allowed_token_ids": [5, 1000000]}, 400, "invalid_request", "allowed_token_ids[1]=1000000"),
    ({"allowed_token_ids": [2], "min_tokens": 2}, 400, "invalid_request", "min_tokens=2 forbids at first"),
    ({"allowed_token_ids": [5], "bad_words": ["x"]}, 400, "invalid_request", "bad_words beside allowed_token_ids"),
    ({"bad_words": "x"}, 400, "invalid_type", "bad_words='x'"),
    ({"bad_words": [" "]}, 400, "invalid_request", "bad_words[0]=' '"),
    ({"bad_words": ["x" * 40]}, 400, "invalid_request", "is 40 tokens"),
    ({"bad_words": ["x"] * 257}, 400, "invalid_request", "257 words"),
    ({"bad_words": ["x"], "response_format": {"type": "json_object"}}, 400, "invalid_request", "contradicts a grammar"),
    ({"truncate_prompt_tokens": 0}, 400, "invalid_request", "truncate_prompt_tokens=0"),
    ({"truncate_prompt_tokens": 2049}, 400, "invalid_request", "must be 1 to 2048, or -1"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "invalid_request", "chat_template_kwargs.messages"),
    ({"slo": {"ttft_ms": -5}}, 400, "invalid_slo", "slo.ttft_ms=-5"),
    ({"slo": {"tbt_ms": 0}}, 400, "invalid_slo", "slo.tbt_ms=0"),
    ({"slo": {"deadline_ms": float("nan")}}, 400, "invalid_slo", "slo.deadline_ms=nan"),
    ({"slo": {"deadline_ms": float("inf")}}, 400, "invalid_slo", "slo.deadline_ms=inf"),
    ({"slo": {"weight": -1}}, 400, "invalid_slo", "slo.weight=-1"),
    ({"slo": {"ttft_ms": "soon"}}, 400, "invalid_type", "slo.ttft_ms='soon'"),
    ({"slo": {"ttft": 1}}, 400, "unknown_parameter", "slo.ttft"),
    ({"slo": {"on_miss": "cry"}}, 400, "invalid_type", "slo.on_miss='cry'"),
    ({"slo": 5}, 400, "invalid_type", "slo=5"),
    ({"made_up": 1}, 400, "unknown_parameter", "'made_up'"),
    ({"cache_salt": "\ud800"}, 400, "invalid_request", "Unicode"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_request", "cannot be tokenized"),
]
UNSUPPORTED: dict[str, Any] = {
    "audio": {"voice": "x"},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content"},
    "prompt_cache_options": {"mode": "explicit"},
    "reasoning_effort": "high",
    "service_tier": "priority",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
PLAIN_CASES: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": None}, 400, "missing_parameter", "prompt"),
    ({"prompt": ""}, 400, "invalid_request", "prompt=''"),
    ({"prompt": []}, 400, "invalid_request", "prompt=[]"),
    ({"prompt": {}}, 400, "invalid_type", "prompt={}"),
    ({"prompt": ["a", 1]}, 400, "invalid_request", "prompt[1]=1"),
    ({"prompt": [1, -1]}, 400, "invalid_request", "prompt[1]=-1"),
    ({"prompt": [[1], [10**30]]}, 400, "invalid_request", str(10**30)),
    ({"prompt": ["a"] * 1025}, 400, "invalid_request", "1025"),
    ({"prompt": ["a"] * 600, "n": 2}, 400, "invalid_request", "n=2"),
    ({"prompt": "x" * 2048, "max_tokens": None}, 400, "context_length_exceeded", "2048"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens=0"),
    ({"logprobs": 21}, 400, "invalid_request", "logprobs=21"),
    ({"logprobs": True}, 400, "invalid_type", "logprobs=True"),
    ({"echo": True, "logprobs": 21}, 400, "invalid_request", "logprobs=21"),
    ({"echo": True, "logprobs": 0, "stream": True}, 400, "invalid_request", "echo=true"),
    ({"suffix": "x"}, 400, "unsupported_parameter", "suffix='x'"),
    ({"best_of": 3}, 400, "unsupported_parameter", "best_of=3"),
    ({"messages": []}, 400, "unknown_parameter", "'messages'"),
]


def refused(http: httpx.Client, url: str, body: Any, status: int, code: str, says: str) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(url, content=content)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["code"]) == (status, code), error
    assert says in error["message"]
    return dict(error)


def name_of(case: object) -> str | None:
    return json.dumps(case)[:50] if isinstance(case, dict) else None


@pytest.mark.parametrize(("change", "status", "code", "says"), CHAT_CASES, ids=name_of)
def test_a_bad_chat_request_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], status: int, code: str, says: str
) -> None:
    for stream in (False, True):  # a stream's error too has its status, as nothing was sent yet
        refused(http, "/v1/chat/completions", CHAT | {"stream": stream} | change, status, code, says)


@pytest.mark.parametrize(("change", "status", "code", "says"), PLAIN_CASES, ids=name_of)
def test_a_bad_completion_request_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], status: int, code: str, says: str
) -> None:
    refused(http, "/v1/completions", PLAIN | change, status, code, says)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_not_dropped(http: httpx.Client, name: str) -> None:
    body = CHAT | {name: UNSUPPORTED[name]}
    error = refused(http, "/v1/chat/completions", body, 400, "unsupported_parameter", name)
    assert error["param"] == name


def test_the_param_at_fault_is_named(http: httpx.Client) -> None:
    for change, param in (({"top_p": 2}, "top_p"), ({"slo": {"tbt_ms": -1}}, "slo.tbt_ms"), ({"model": "x"}, "model")):
        answer = http.post("/v1/chat/completions", json=CHAT | change)
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"max_tokens": ' + b"1" * 9999]
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    refused(http, "/v1/chat/completions", body, 400, "invalid_json", "the request body")


def test_a_compressed_body_is_refused_as_what_it_is(http: httpx.Client) -> None:
    packed = gzip.compress(json.dumps(CHAT).encode())
    answer = http.post("/v1/chat/completions", content=packed, headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert "'gzip'" in answer.json()["error"]["message"]
    plain = json.dumps(CHAT).encode()
    assert http.post("/v1/chat/completions", content=plain, headers={"content-encoding": "identity"}).is_success


def test_an_oversized_body_is_refused(http: httpx.Client) -> None:
    refused(http, "/v1/completions", b" " * ((32 << 20) + 1), 413, "request_too_large", "32 MiB")


def test_unknown_urls_and_methods_get_the_same_shape(http: httpx.Client) -> None:
    missing, method = http.get("/v1/audio"), http.get("/v1/completions")
    assert (missing.status_code, method.status_code) == (404, 405)
    assert "/v1/audio" in missing.json()["error"]["message"]
    assert method.json()["error"]["code"] == "no_such_route"


def test_embeddings_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as refused:
        client.embeddings.create(model="tiny", input="hello")
    assert refused.value.code == "unsupported"


def test_the_openai_client_raises_its_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9") as missing:
        client.chat.completions.create(**CHAT | {"model": "gpt-9"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens=0"):
        client.completions.create(**PLAIN | {"max_tokens": 0})


def test_models_lists_the_one_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.get("/models/", cast_to=dict[str, Any])["data"][0]["id"] == "tiny"
    with pytest.raises(openai.NotFoundError, match="other/model"):
        client.models.retrieve("other/model")


def test_running_streams_are_not_disturbed_by_refused_requests(client: openai.OpenAI, http: httpx.Client) -> None:
    want = {**CHAT, "max_tokens": 200, "seed": 5, "extra_body": {"ignore_eos": True}}
    alone = client.chat.completions.create(**want).choices[0].message.content
    text = ""
    for i, chunk in enumerate(client.chat.completions.create(**want, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if i % 10 == 0:
            change, status, _, _ = CHAT_CASES[i // 10 % len(CHAT_CASES)]
            assert http.post("/v1/chat/completions", content=json.dumps(CHAT | change)).status_code == status
    assert text == alone


def test_a_promise_that_cannot_be_kept_is_a_503_with_retry_after() -> None:
    error = OverloadedError("the queue is 9 s long")
    error.retry_after_s = 8.2
    answer = as_api_error(error).response()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "9")
    assert json.loads(answer.body)["error"]["code"] == "overloaded"
