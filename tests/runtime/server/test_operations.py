"""What an operator sets and asks: keys, limits, classes, metrics, logs, CORS, and clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.server.service import SHORT_BODY, aside
from superinfer.runtime.server.settings import load_settings
from superinfer.version import version

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
# Takes an engine ten seconds.
LONG: dict[str, Any] = ASK | {"max_tokens": 1500, "ignore_eos": True, "stream": True, "n": 60}


@pytest.fixture(scope="module")
def operated(tiny_engine: EngineProcess, serving: Callable[..., Any]) -> Any:
    """A server with keys, classes and small limits."""
    classes = {
        "default": {"weight": 0.5},
        "gold": {"ttft_ms": 60_000, "deadline_ms": 90_000, "api_keys": ["rich"]},
        "hopeless": {"ttft_ms": 0.001},
    }
    with serving(
        tiny_engine.address,
        api_keys=["poor", "rich"],
        slo_classes=classes,
        max_concurrent=2,
        max_body_bytes=10_000,
        cors_origins=["https://a.example"],
    ) as served:
        yield served


@pytest.fixture
def keyed(operated: Any) -> Any:
    with httpx.Client(base_url=operated.url, headers={"authorization": "Bearer poor"}, timeout=30) as http:
        yield http


def test_a_request_needs_a_key(operated: Any, keyed: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{operated.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="not one of"):
        client.models.list()
    with operated.http() as http:
        assert http.get("/v1/models").status_code == 401 and http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200
        assert http.get("/v1/models", headers={"api-key": "rich"}).status_code == 200
    assert keyed.get("/v1/models").status_code == 200


def test_it_tells_its_version(keyed: httpx.Client) -> None:
    assert keyed.get("/version").json() == {"version": version()}


@pytest.mark.parametrize("told", [True, False])
def test_a_body_over_the_limit_is_refused(keyed: httpx.Client, told: bool) -> None:
    body = b"x" * 10_001
    answer = keyed.post("/v1/chat/completions", content=body if told else iter([body]))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_the_bodies_of_all_requests_are_bounded_together(
    tiny_engine: EngineProcess, serving: Callable[..., Any]
) -> None:
    padded = {"user": "x" * 8000}
    limits = {"max_body_bytes": 10_000, "max_total_body_bytes": 15_000}
    with serving(tiny_engine.address, **limits) as served, served.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=LONG | padded) as running:
            lines = running.iter_lines()
            next(lines)
            refused = http.post("/v1/chat/completions", json=ASK | padded)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        deadline = time.monotonic() + 30
        while http.post("/v1/chat/completions", json=ASK | padded).status_code != 200:
            assert time.monotonic() < deadline, "what a request held is given back when it ends"


def test_further_requests_are_refused_with_429_and_health_is_still_told(keyed: httpx.Client) -> None:
    with keyed.stream("POST", "/v1/chat/completions", json=LONG) as one:
        first = one.iter_bytes()  # kept: a dropped iterator closes its response
        next(first)
        with keyed.stream("POST", "/v1/chat/completions", json=LONG) as two:
            second = two.iter_bytes()
            next(second)
            refused = keyed.post("/v1/chat/completions", json=ASK)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert keyed.get("/health").status_code == 200
    deadline = time.monotonic() + 30
    while keyed.post("/v1/chat/completions", json=ASK).status_code != 200:
        assert time.monotonic() < deadline, "the streams that were left still count"


def test_the_class_comes_from_the_tier_the_key_or_the_default(keyed: httpx.Client) -> None:
    def ask(key: str = "poor", **more: Any) -> Any:
        return keyed.post("/v1/chat/completions", json=ASK | more, headers={"authorization": f"Bearer {key}"}).json()

    assert ask(service_tier="gold")["slo"]["slo_class"] == "gold"
    by_key = ask(key="rich")
    assert by_key["slo"]["met"] is True and by_key["slo"]["ttft_met"] is True and by_key["service_tier"] == "gold"
    assert by_key["slo"]["tbt_met"] is None  # not promised
    assert ask(key="rich", service_tier="default")["slo"]["slo_class"] == "default"
    missed = ask(service_tier="hopeless")["slo"]
    assert (missed["met"], missed["ttft_met"]) == (False, False)
    assert ask(service_tier="hopeless", slo={"ttft_ms": 60_000})["slo"]["met"] is True  # the request's own counts more
    error = ask(service_tier="platinum")["error"]
    assert error["param"] == "service_tier" and "gold" in error["message"]


def test_headers_promise_too(keyed: httpx.Client) -> None:
    def ask(headers: dict[str, str], **more: Any) -> Any:
        return keyed.post("/v1/chat/completions", json=ASK | more, headers=headers).json()

    assert ask({"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "5000"})["slo"]["tbt_met"] is True
    assert ask({"x-slo-ttft-ms": "0.001"})["slo"]["met"] is False
    assert ask({"x-slo-ttft-ms": "0.001"}, slo={"ttft_ms": 60_000})["slo"]["met"] is True
    assert ask({"x-slo-ttft-ms": "soon"})["error"]["param"] == "x-slo-ttft-ms"
    assert ask({"x-slo-ttft-ms": "60000", "x-slo-tbt-ms": "5000"})["slo"]["tbt_met"] is True
    assert ask({"x-slo-deadline-ms": "60000", "x-slo-weight": "2"})["slo"]["deadline_met"] is True
    for wrong in ({"x-slo-deadline-ms": "-1"}, {"x-slo-weight": "0"}, {"x-slo-tpot-ms": "nan"}):
        assert ask(wrong)["error"]["code"] == "invalid_slo"


def test_metrics_can_be_scraped_and_count(keyed: httpx.Client) -> None:
    def read() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(keyed.get("/metrics").text)
        return {
            (s.name, s.labels.get("slo_class", s.labels.get("tier", "")), s.labels.get("outcome", "")): s.value
            for family in families
            for s in family.samples
        }

    before = read()
    keyed.post("/v1/chat/completions", json=ASK | {"service_tier": "hopeless", "ignore_eos": True})
    after = read()
    count = ("superinfer:time_to_first_token_seconds_count", "hopeless", "")
    assert after[count] == before.get(count, 0) + 1
    promised = ("superinfer:slo_requests_total", "hopeless", "missed")
    assert after[promised] == before.get(promised, 0) + 1
    generated = ("superinfer:generation_tokens_total", "", "")
    assert after[generated] >= before[generated] + 4
    assert after["superinfer:engine_up", "", ""] == 1 and ("superinfer:kv_blocks", "gpu", "") in after


@pytest.fixture(scope="module")
def scraped(tiny_config: EngineConfig, serving: Callable[..., Any]) -> dict[str, list[dict[str, str]]]:
    """Labels of each sample that a server tells of an engine with two tiers, after a request with a promise."""
    config = msgspec.structs.replace(tiny_config, kv_tokens=2048, dram_tokens=8192, policy="rota")
    with launch_engine(config) as engine, serving(engine.address) as served, served.http() as http:
        asked = ASK | {"slo": {"ttft_ms": 60_000}, "ignore_eos": True}
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        found: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
        return found


def test_every_query_of_the_dashboard_finds_what_it_asks_for(scraped: dict[str, list[dict[str, str]]]) -> None:
    dashboard = json.loads((Path(__file__).parents[3] / "deploy" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 20 and len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for query in queries:
        asked = re.findall(r"(superinfer:\w+)(?:\{([^}]*)\})?", query)
        assert asked, query
        grouped = {name.strip() for group in re.findall(r"by \(([^)]*)\)", query) for name in group.split(",")}
        for name, selector in asked:
            labels = set(re.findall(r"(\w+)(?:=~|!=|=)", selector)) | grouped
            assert any(labels <= set(one) for one in scraped.get(name, [])), (name, labels, query)
    (model,) = dashboard["templating"]["list"][1:]
    assert model["query"] == "label_values(superinfer:engine_up, model_name)" and "superinfer:engine_up" in scraped


def test_metrics_have_the_fields_names(scraped: dict[str, list[dict[str, str]]]) -> None:
    """Those of vLLM behind another prefix, and ours for what it does not have."""
    histograms = (
        "time_to_first_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "max_time_between_tokens_seconds",
    )  # fmt: skip
    plain = (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total",
        "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "request_success_total", "kv_blocks", "rotations_total", "link_bytes_total", "slo_requests_total",
        "slo_refused_total", "slo_expired_total", "http_requests_total",
    )  # fmt: skip
    names = {f"superinfer:{name}_bucket" for name in histograms} | {f"superinfer:{name}" for name in plain}
    assert names <= set(scraped), names - set(scraped)
    assert {"gpu", "cpu"} == {labels["tier"] for labels in scraped["superinfer:kv_blocks"]}
    assert {"in", "out"} == {labels["direction"] for labels in scraped["superinfer:rotations_total"]}


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_head_is_answered_as_get_is_without_the_body(
    tiny_engine: EngineProcess, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    if protocol == "h11":
        monkeypatch.setattr("superinfer.runtime.server.serve.http_protocol", lambda _: protocol)
    with serving(tiny_engine.address) as served, served.http() as http:
        for path in ("/health", "/ready", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/"):
            read, head = http.get(path), http.head(path)  # on one connection: a body would be in the next one's way
            assert (head.status_code, head.content) == (read.status_code, b"") == (200, b""), path
            assert head.headers["content-type"] == read.headers["content-type"]
            assert int(head.headers["content-length"]) > 0
        assert http.head("/v1/models/other").status_code == 404
        assert http.head("/v1/live").status_code == 405  # events without an end
        assert http.head("/v1/completions").status_code == 405


def test_browsers_of_allowed_origins_may_ask(operated: Any) -> None:
    with operated.http() as http:
        asked = {"access-control-request-method": "POST", "origin": "https://a.example"}
        allowed = http.options("/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = http.options("/v1/chat/completions", headers=asked | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_client_that_reads_nothing_is_cut_off_and_its_request_cancelled(
    tiny_engine: EngineProcess, serving: Callable[..., Any]
) -> None:
    # 20 rivals for each token: thousands of tokens are many megabytes, more than the sockets' buffers hold.
    body = json.dumps(LONG | {"logprobs": True, "top_logprobs": 20}).encode()
    with serving(tiny_engine.address, write_timeout_s=0.3) as served, served.http() as http, socket.socket() as slow:
        host, port = served.url.removeprefix("http://").split(":")
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert slow.recv(1)
        deadline = time.monotonic() + 60
        while http.get("/health").json().get("running", 1):  # 503 where a busy machine keeps the engine from answering
            assert time.monotonic() < deadline
            time.sleep(0.05)
        counted = http.get("/metrics").text
        assert 'finished_reason="length"' not in counted, "it was cancelled before it had finished"
        received = b""
        while chunk := slow.recv(1 << 20):  # ends, with what the kernel still had
            received += chunk
        assert b"[DONE]" not in received


def test_streams_do_not_need_the_shortcut_to_the_socket(
    tiny_engine: EngineProcess, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where httptools is not installed, all goes through ASGI's own `send`."""
    asked = ASK | {"max_tokens": 60, "stream": True, "ignore_eos": True, "seed": 5}

    def text() -> str:
        with serving(tiny_engine.address) as served, served.openai() as client:
            extra = {"ignore_eos": asked.pop("ignore_eos", True)}
            chunks = client.chat.completions.create(**asked, extra_body=extra)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    short = text()
    monkeypatch.setattr("superinfer.runtime.server.serve.http_protocol", lambda _: "h11")
    assert text() == short and len(short) > 50


def test_a_log_that_nobody_reads_any_more_cuts_no_connection(
    tiny_engine: EngineProcess, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as log:
        monkeypatch.setattr("superinfer.runtime.server.gate.sys.stderr", log)
        with (
            serving(tiny_engine.address, access_log=True) as served,
            contextlib.closing(http.client.HTTPConnection(served.url.removeprefix("http://"))) as line,
        ):
            line.connect()
            opened = line.sock
            for _ in range(5):
                line.request("GET", "/v1/models")
                assert line.getresponse().read()
                assert line.sock is opened
        monkeypatch.undo()
        with contextlib.suppress(OSError):  # what was not written
            log.close()


def test_the_access_log_is_a_json_line_for_each_request(
    tiny_engine: EngineProcess, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr("superinfer.runtime.server.gate.sys.stderr", log)
    with serving(tiny_engine.address, access_log=True) as served, served.http() as http:
        http.post("/v1/chat/completions", json=ASK | {"slo": {"ttft_ms": 60_000}})
        http.post("/v1/chat/completions", content=b"{")
        http.get("/nothing")
        http.head("/v1/models")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["status"], line["path"]) for line in lines] == [
        (200, "/v1/chat/completions"),
        (400, "/v1/chat/completions"),
        (404, "/nothing"),
        (200, "/v1/models"),
    ]
    assert lines[2]["bytes"] > 0 and (lines[3]["method"], lines[3]["bytes"]) == ("HEAD", 0)
    assert lines[0]["output_tokens"] > 0 and lines[0]["slo_met"] is True and lines[0]["ms"] > 0


def test_flags_win_over_the_environment_and_this_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'model_name = "file"\nmax_concurrent = 7\ngrace_s = 9.0\n[slo_classes.gold]\nttft_ms = 500\napi_keys = ["a"]\n'
    )
    environment = {"SUPERINFER_MAX_CONCURRENT": "8", "SUPERINFER_API_KEYS": "a, b", "SUPERINFER_GRACE_S": "3"}
    settings = load_settings({"grace_s": 1.0}, config=file, environment=environment)
    assert (settings.model_name, settings.max_concurrent, settings.grace_s) == ("file", 8, 1.0)
    assert settings.api_keys == ("a", "b") and settings.slo_classes["gold"].ttft_ms == 500


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_nam = 'x'", "model_nam"),
        ("max_concurrent = 0", "max_concurrent=0"),
        ("max_total_body_bytes = 5", "max_total_body_bytes=5"),
        ("[slo_classes.gold]\nttft_ms = -1", "ttft"),
        ("tls_cert = 'a'", "tls_key"),
        ("grace_s = -1", "grace_s=-1"),
        ("otlp_endpoint = 'collector'", "otlp_endpoint='collector'"),
        ("api_keys = ['a', '']", "an API key is empty"),
        ("[slo_classes.gold]\napi_keys = [' ']", "an API key is empty"),
        ("= 3", "not TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=says):
        load_settings({}, config=file, environment={})


async def test_long_requests_are_tokenized_beside_the_event_loop() -> None:
    class Http:
        def __init__(self, size: int) -> None:
            self._size = size

        async def body(self) -> bytes:
            return b"x" * self._size

    loop = threading.get_ident()
    assert await aside(Http(SHORT_BODY), threading.get_ident) == loop  # type: ignore[arg-type]
    assert await aside(Http(SHORT_BODY + 1), threading.get_ident) != loop  # type: ignore[arg-type]
