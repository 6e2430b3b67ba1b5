"""What a client of the server is told when the model computes no numbers for its request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from overflowing_checkpoint import SPOILS
from prometheus_client.parser import text_string_to_metric_families

from superinfer.runtime.launch import EngineProcess

WHAT = "the model computed values that are not numbers"


@pytest.fixture(scope="module")
def http(overflowing_engine: EngineProcess, serving: Callable[..., Any]) -> Iterator[httpx.Client]:
    with serving(overflowing_engine.address) as served, served.http() as client:
        yield client


def body(text: str, **more: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    return asked | {"ignore_eos": True} | more


def counted(http: httpx.Client, name: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return next(s.value for family in families for s in family.samples if s.name == f"superinfer:{name}_total")


def spoils(http: httpx.Client) -> int:
    return int(http.post("/tokenize", json={"prompt": SPOILS, "add_special_tokens": False}).json()["tokens"][0])


def test_a_request_that_fails_is_a_500_that_says_what_happened_and_is_counted(http: httpx.Client) -> None:
    before = [counted(http, name) for name in ("failed_sequences", "non_finite_sequences")]
    alone = http.post("/v1/chat/completions", json=body("all right")).json()["choices"]
    with ThreadPoolExecutor(4) as pool:
        bad = pool.submit(http.post, "/v1/chat/completions", json=body(f"not {SPOILS} right"))
        good = pool.submit(http.post, "/v1/chat/completions", json=body("all right"))
        whole = pool.submit(http.post, "/v1/completions", json=dict(model="tiny", prompt=f"a{SPOILS}b", logprobs=1))
        several = pool.submit(http.post, "/v1/chat/completions", json=body(f"not {SPOILS} right", n=3))
    assert good.result().json()["choices"] == alone
    for answer in (bad.result(), whole.result(), several.result()):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (500, "non_finite", "server_error")
        assert error["message"].startswith(WHAT) and "dtype bfloat16 or float32" in error["message"]
    failed, spoilt = (counted(http, name) for name in ("failed_sequences", "non_finite_sequences"))
    assert failed - before[0] == 5  # three of them one request's
    assert 3 <= spoilt - before[1] <= 5


def test_a_stream_that_fails_ends_with_an_error_event(http: httpx.Client) -> None:
    likely = {str(spoils(http)): -1}  # a token in 300 or so is that one: the stream has begun when it comes
    asked = body("all right", stream=True, temperature=1, seed=2, max_tokens=1000, logit_bias=likely)
    with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    error = lines.index("event: error")
    assert sum('"content":' in line for line in lines[:error]) > 1  # what came before is told
    assert WHAT in lines[error + 1] and '"non_finite"' in lines[error + 1]
    assert "data: [DONE]" not in lines


def test_a_stream_whose_prompt_fails_is_an_error(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=body(f"not {SPOILS} right", stream=True))
    assert WHAT in answer.text and '"non_finite"' in answer.text and "[DONE]" not in answer.text


def test_a_response_that_fails_says_so(http: httpx.Client) -> None:
    asked = {"model": "tiny", "input": f"not {SPOILS} right", "max_output_tokens": 8}
    answer = http.post("/v1/responses", json=asked)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "non_finite"
    streamed = http.post("/v1/responses", json=asked | {"stream": True}).text
    assert WHAT in streamed and "response.completed" not in streamed
