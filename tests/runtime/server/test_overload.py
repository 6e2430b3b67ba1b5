"""Too much load: what is refused and how, what is dropped, how soon a place is free again, and ten times of it all."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from slow_engine import slow_engine

from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import Admission, EngineConfig
from superinfer.runtime.launch import launch_engine

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import http_load
import http_overload

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------- a promise that cannot be kept


@pytest.fixture(scope="module")
def choosy(serving: Callable[..., Any]) -> Iterator[Any]:
    """The embedded model, which refuses what it cannot keep."""
    config = EngineConfig(device="cpu", threads=1, kv_tokens=8192, policy="rota", admission="refuse", max_batch_size=8)
    with launch_engine(config) as engine, serving(engine.address, slo_classes={"gold": {"weight": 2}}) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_kept_is_a_503_that_says_when_to_come_back(choosy: Any, stream: bool) -> None:
    impossible = {"slo": {"deadline_ms": 400}, "ignore_eos": True, "service_tier": "gold"}
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 900, "n": 100, "stream": stream}
    with choosy.openai() as client, choosy.http() as http:
        with pytest.raises(openai.InternalServerError, match="cannot keep what was promised") as refused:
            client.chat.completions.create(**ask, extra_body=impossible)  # 90,000 tokens within 0.4 s
        assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        easy = {"slo": {"deadline_ms": 60_000}, "ignore_eos": True}
        kept = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 4} | easy)
        assert kept.status_code == 200 and kept.json()["slo"]["met"] is True
        counted = http.get("/metrics").text
    assert 'superinfer:slo_refused_total{model_name="tiny",slo_class="gold"}' in counted
    assert 'superinfer:http_requests_total{path="/v1/chat/completions",status="503"}' in counted


@pytest.mark.parametrize("admission", ["refuse", "degrade"])
def test_who_could_not_be_in_time_even_alone_hears_it_though_all_others_were_promised_nothing(
    tiny_checkpoint: Path, serving: Callable[..., Any], admission: Admission
) -> None:
    hopeless = {"model": "tiny", "prompt": "hi", "max_tokens": 20, "ignore_eos": True, "slo": {"deadline_ms": 10}}
    with (
        slow_engine(tiny_checkpoint, num_slots=4, policy="rota", admission=admission, told_s=0.05) as engine,
        EngineClient(engine.address) as client,
        serving(engine.address) as served,
        stream(served, max_tokens=900),  # for 45 s at least
    ):
        until(lambda: client.stats().steps >= 8)  # how long they take is known
        answer = httpx.post(f"{served.url}/v1/completions", json=hopeless, timeout=30)
        if admission == "refuse":
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
        else:
            told = answer.json()["slo"]
            assert (told["met"], told["why"], told["degraded"]) == (False, "overload", True)
        counted = client.stats().classes["default"]
        assert (counted.refused, counted.degraded) == ((1, 0) if admission == "refuse" else (0, 1))
        assert client.stats().running == 1, "the other goes on"
        metrics = httpx.get(f"{served.url}/metrics").text
    outcome = "refused" if admission == "refuse" else "degraded"
    assert f'superinfer:slo_{outcome}_total{{model_name="tiny",slo_class="default"}} 1.0' in metrics


# ---------------------------------------------------------------------------- an engine whose steps take their time


@pytest.fixture(scope="module")
def slow(tiny_checkpoint: Path, serving: Callable[..., Any]) -> Iterator[tuple[Any, EngineClient]]:
    """A real engine with one place, of two steps a second, which is long against what a busy machine may add to the way
    of a message: its server, and a connection of the test's own."""
    with (
        slow_engine(tiny_checkpoint, step_s=0.5, num_slots=1, context=512) as engine,
        EngineClient(engine.address) as client,
        serving(engine.address) as served,
    ):
        yield served, client


def stream(served: Any, **more: Any) -> Any:
    asked = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "ignore_eos": True, "stream": True} | more
    return httpx.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=30)


def test_a_client_that_leaves_frees_its_place_within_one_step(slow: Any) -> None:
    served, client = slow
    with stream(served) as answer:
        lines = answer.iter_lines()
        next(lines)
        before = client.stats()
        assert before.running == 1
    until(lambda: client.stats().running == 0)
    after = client.stats()
    # The step that ran when it left, and at most one that had begun before the news of it was there.
    assert after.steps - before.steps <= 2 and after.output_tokens - before.output_tokens <= 2
    assert after.cancelled == before.cancelled + 1


def test_what_expires_while_it_waits_is_dropped_and_not_computed(slow: Any) -> None:
    served, client = slow
    with stream(served) as first:
        lines = first.iter_lines()
        next(lines)
        before = client.stats()
        late = {"model": "tiny", "prompt": "x" * 100, "max_tokens": 5}
        cut = httpx.post(
            f"{served.url}/v1/completions",
            json=late | {"slo": {"deadline_ms": 100, "on_miss": "truncate"}},
            timeout=30,
        ).json()
        raised = httpx.post(
            f"{served.url}/v1/completions", json=late | {"slo": {"deadline_ms": 100, "on_miss": "raise"}}, timeout=30
        )
        after = client.stats()
    assert cut["choices"][0]["text"] == "" and cut["usage"]["completion_tokens"] == 0
    assert cut["choices"][0]["finish_reason"] == "length" and cut["slo"]["truncated"] is True
    assert raised.status_code == 504 and raised.json()["error"]["code"] == "deadline_missed"
    assert after.prefill_tokens == before.prefill_tokens, "nothing of the two prompts of 100 tokens was computed"
    expired = before.classes["default"].expired if "default" in before.classes else 0
    assert after.classes["default"].expired == expired + 2
    until(lambda: client.stats().running == 0)


# ---------------------------------------------------------------------------- ten times of it


@pytest.mark.slow
def test_ten_times_the_load_is_answered_to_the_last_request_in_bounded_memory() -> None:
    """The benchmark's own load, for two seconds; what it measures over a minute is in results/http-overload.json."""
    with http_load.servers(tbt_ms=20, capacity=16, max_queue=64) as found:
        http_load.run(http_overload.offered(found, 40, 1))  # whatever is made once
        run = http_load.run(http_overload.offered(found, 400, 2))
    assert (run["requests"], run["answered"], run["lost"]) == (800, 800, 0)
    assert set(run["statuses"]) <= {"200", "429"} and run["statuses"]["429"] > 0 and run["met"] > 0
    memory = run["server_rss_mib"]
    assert memory["end"] - memory["begin"] < 50


def test_the_noop_engine_can_be_looked_at() -> None:
    with http_load.servers(tbt_ms=20) as found:
        url = f"http://127.0.0.1:{found.port}"
        assert "superinfer:num_requests_running" in httpx.get(f"{url}/metrics").text
        with httpx.stream("GET", f"{url}/v1/live", timeout=20) as viewer:
            event = next(line for line in viewer.iter_lines() if line)
        assert msgspec.json.decode(event.removeprefix("data: "))["live"]["requests"] == []
        assert json.loads(httpx.get(f"{url}/health").text)["model"] == "noop"
