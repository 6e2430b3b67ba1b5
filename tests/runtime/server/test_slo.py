"""The `slo` field and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from slow_engine import slow_engine

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "seed": 1}


def test_a_kept_promise_is_reported_as_met(client: openai.OpenAI) -> None:
    slo = {"ttft_ms": 30_000, "tbt_ms": 5000, "deadline_ms": 60_000}
    answer = client.chat.completions.create(**ASK, max_tokens=5, extra_body={"slo": slo, "ignore_eos": True})
    report = answer.slo  # type: ignore[attr-defined]
    assert report["met"] is True and report["truncated"] is False
    assert 0 < report["ttft_ms"] <= report["e2e_ms"] < 30_000
    assert report["queue_ms"] + report["prefill_ms"] + report["decode_ms"] == pytest.approx(report["e2e_ms"], abs=50)


def test_a_missed_promise_finishes_late_and_says_why(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **ASK, max_tokens=5, extra_body={"slo": {"ttft_ms": 0.001}, "ignore_eos": True}
    )
    report = answer.slo  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    assert report["met"] is False and report["why"]


def test_without_an_slo_there_is_no_report(http: httpx.Client) -> None:
    assert "slo" not in http.post("/v1/chat/completions", json=ASK | {"max_tokens": 2}).json()


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_reports_on_its_last_chunk(client: openai.OpenAI, usage: bool) -> None:
    chunks = list(
        client.chat.completions.create(
            **ASK,
            n=2,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": usage},
            extra_body={"slo": {"deadline_ms": 60_000}},
        )
    )
    assert chunks[-1].slo["met"] is True  # type: ignore[attr-defined]
    with_report = [chunk for chunk in chunks if hasattr(chunk, "slo")]
    assert with_report == chunks[-2:] if usage else chunks[-1:]


def test_truncate_returns_what_there_is_as_length(client: openai.OpenAI) -> None:
    slo = {"deadline_ms": 60, "on_miss": "truncate"}
    answer = client.chat.completions.create(**ASK, max_tokens=900, extra_body={"slo": slo, "ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens < 900
    assert answer.choices[0].finish_reason == "length"
    assert answer.slo["truncated"] is True and answer.slo["met"] is False  # type: ignore[attr-defined]


def test_raise_is_a_gateway_timeout(client: openai.OpenAI) -> None:
    slo = {"deadline_ms": 60, "on_miss": "raise"}
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**ASK, max_tokens=900, extra_body={"slo": slo, "ignore_eos": True})
    assert raised.value.status_code == 504 and raised.value.code == "deadline_missed"


def test_raise_in_a_stream_is_an_error_event(
    tiny_checkpoint: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the text: time passes for the engine once the client has read some of it."""
    slo = {"deadline_ms": 100, "on_miss": "raise"}
    text = ""
    with slow_engine(tiny_checkpoint, step_s=0.01) as engine, serving(engine.address) as served:
        clock = engine.keep_time(monkeypatch, 0.0)
        with served.openai() as client, pytest.raises(openai.APIError, match="missed its deadline") as raised:
            for chunk in client.chat.completions.create(
                **ASK, max_tokens=900, stream=True, extra_body={"slo": slo, "ignore_eos": True}
            ):
                text += chunk.choices[0].delta.content or ""
                clock.step_s = 0.03 if text else 0.0
    assert 0 < len(text) < 900 and raised.value.code == "deadline_missed"
