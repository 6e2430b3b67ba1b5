"""/v1/select: choices scored behind a prompt, the same numbers as `echo` gives; what is wrong is said."""

from __future__ import annotations

from typing import Any

import pytest

MODEL = "tiny"


def ask(served: Any, **body: Any) -> tuple[int, dict[str, Any]]:
    with served.http() as http:
        answer = http.post("/v1/select", json={"model": MODEL, "choices": ["yes", "no"]} | body)
    return answer.status_code, answer.json()


def test_scores_are_those_of_an_echoed_prompt(served: Any, client: Any) -> None:
    status, found = ask(served, prompt="is it so? ", alone=True)
    assert status == 200 and found["object"] == "select"
    echoed = client.completions.create(
        model=MODEL, prompt=["is it so? yes", "is it so? no"], max_tokens=0, echo=True, logprobs=0
    )
    for choice, wanted in zip(found["choices"], echoed.choices, strict=True):
        values = wanted.logprobs.token_logprobs[len("is it so? ") :]
        assert [token["logprob"] for token in choice["tokens"]] == pytest.approx(values, abs=1e-4)
        assert choice["mean_logprob"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        assert "".join(token["text"] for token in choice["tokens"]) == choice["text"]
        assert choice["alone"][0]["logprob"] is None and len(choice["alone"]) == len(choice["tokens"])
    assert len(found["reports"]) == 4
    assert found["usage"]["prompt_tokens"] == sum(report["prompt_tokens"] for report in found["reports"])


def test_the_shared_prompt_is_computed_once(served: Any) -> None:
    _, found = ask(served, prompt="a prompt of some length, " * 16, choices=[f"{i}" for i in range(8)])
    computed = sum(report["prompt_tokens"] - report.get("cached_tokens", 0) for report in found["reports"])
    assert computed < 2 * len("a prompt of some length, " * 16)


def test_a_promise_is_judged(served: Any) -> None:
    _, found = ask(served, prompt="is it so? ", slo={"deadline_ms": 60_000})
    assert found["slo"]["met"] is True


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "either a prompt or messages"),
        ({"prompt": "a", "messages": []}, "prompt", "either a prompt or messages"),
        ({"prompt": "a", "choices": []}, "choices", "has 0 texts"),
        ({"prompt": "a", "choices": ["x"] * 513}, "choices", "has 513 texts"),
        ({"prompt": "a", "choices": ["x", ""]}, "choices", "choices[1]="),
        ({"prompt": "a", "choices": "x"}, "choices", "wrong type"),
        ({"prompt": "a" * 3000}, "prompt", "context holds"),
        ({"prompt": "a", "temperature": 1}, "temperature", "unknown parameter"),
        ({"prompt": "a", "model": "other"}, "model", "not served here"),
    ],
)
def test_what_is_wrong_is_said(served: Any, body: dict[str, Any], param: str, said: str) -> None:
    status, found = ask(served, **body)
    assert status in (400, 404) and found["error"]["param"] == param and said in found["error"]["message"]


@pytest.mark.parametrize("interval", [-1, 20_000])
def test_an_interval_out_of_range_is_refused(served: Any, interval: float) -> None:
    with served.http() as http:
        body = {"model": MODEL, "prompt": "a", "stream": True, "stream_options": {"interval_ms": interval}}
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and "interval_ms" in answer.json()["error"]["message"]
