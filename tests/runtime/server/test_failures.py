"""Clients that leave, an engine that is full, and one that dies."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest
from own_time import OwnTime
from slow_engine import slow_engine
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.server.connection import Shortcut
from superinfer.runtime.server.relay import Feed

LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "tell me everything"}],
    "max_tokens": 1900,
    "extra_body": {"ignore_eos": True},
}
MANY = 60  # choices of 1,900 tokens take an engine over ten seconds


@pytest.fixture
def own_engine(tiny_config: EngineConfig) -> Iterator[EngineProcess]:
    """An engine that a test may kill."""
    with launch_engine(tiny_config) as engine:
        yield engine


@pytest.fixture
def own_served(own_engine: EngineProcess, serving: Callable[[str], Any]) -> Iterator[Any]:
    with serving(own_engine.address) as server:
        yield server


@pytest.fixture
def engine_client(tiny_engine: EngineProcess) -> Iterator[EngineClient]:
    """Straight to the session's engine, which does nothing for anybody when the test begins."""
    with EngineClient(tiny_engine.address) as client:
        assert until(lambda: client.stats().running == client.stats().waiting == 0)
        yield client


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_health_tells_what_the_engine_does(http: httpx.Client, engine_client: EngineClient) -> None:
    report = http.get("/health")
    assert report.status_code == 200
    assert report.json().items() >= {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}.items()


def test_closing_a_stream_cancels_the_request(client: openai.OpenAI, engine_client: EngineClient) -> None:
    before = engine_client.stats().cancelled
    stream = client.chat.completions.create(**LONG, n=MANY, stream=True)
    next(iter(stream))
    assert until(lambda: engine_client.stats().running > 0)
    stream.close()
    assert until(lambda: engine_client.stats().running == engine_client.stats().waiting == 0)
    assert engine_client.stats().cancelled == before + MANY


@pytest.mark.parametrize("padding", [0, 400_000])
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_end_cancels_the_request(
    served: Any, engine_client: EngineClient, stream: bool, padding: int
) -> None:
    """Reading is paused while a body is longer than the connection's buffer: it must go on, or nobody hears of the
    client's end."""
    before = engine_client.stats().cancelled
    asked = {"model": "tiny", "prompt": "hi", "max_tokens": 1900, "ignore_eos": True, "n": MANY, "stream": stream}
    body = msgspec.json.encode(asked | {"user": "x" * padding})
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert until(lambda: engine_client.stats().running > 0)
    assert until(lambda: engine_client.stats().running == engine_client.stats().waiting == 0)
    assert engine_client.stats().cancelled == before + MANY


def test_a_request_that_is_over_leaves_nothing_for_the_garbage_collector(served: Any) -> None:
    """It would be thousands of them, as a server's collector runs so seldom."""
    asked = LONG["extra_body"] | {"model": "tiny", "messages": LONG["messages"], "max_tokens": 3}

    def in_memory() -> int:
        return sum(isinstance(found, (RequestResponseCycle, Shortcut, Feed)) for found in gc.get_objects())

    gc.collect()
    before = in_memory()
    gc.disable()
    try:
        with served.http() as kept:
            for number in range(12):
                assert kept.post("/v1/chat/completions", json=asked | {"stream": bool(number % 2)}).status_code == 200
        for _ in range(12):
            with served.http() as alone:
                alone.get("/health")
                with alone.stream("POST", "/v1/chat/completions", json=asked | {"stream": True, "max_tokens": 900}):
                    pass  # and leaves
                alone.post("/v1/chat/completions", json=asked | {"messages": 5})
                assert alone.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 2}).is_success
        for _ in range(12):  # and some cut the connection that they were to keep
            with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=30) as reset:
                reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                reset.sendall(b"GET /version HTTP/1.1\r\nhost: here\r\n\r\n")
                assert b" 200 " in reset.recv(1000)
        assert until(lambda: in_memory() <= before), in_memory()
    finally:
        gc.enable()


def test_requests_sent_without_waiting_for_answers_are_answered_in_order(served: Any) -> None:
    asked = {"model": "tiny", "prompt": "hi", "max_tokens": 9, "ignore_eos": True, "stream": True}
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as raw:
        for tier, last in ((None, b""), ("nobody's", b""), (None, b"connection: close\r\n")):
            body = msgspec.json.encode(asked | {"service_tier": tier})
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n"
            raw.sendall(head % (last, len(body)) + body)
        raw.settimeout(30)
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    statuses = [part.split(b" ", 1)[0] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"400", b"200"] and received.count(b"data: [DONE]") == 2


def test_a_full_engine_refuses_with_429_and_goes_on(tiny_checkpoint: Path, serving: Callable[..., Any]) -> None:
    with (
        slow_engine(tiny_checkpoint, max_queue=4, context=2048) as engine,
        serving(engine.address) as full,
        full.openai() as client,
    ):
        asked = LONG | {"max_tokens": 50}
        stream = client.chat.completions.create(**asked, n=4, stream=True)
        next(iter(stream))
        for streaming in (False, True):
            with pytest.raises(openai.RateLimitError) as raised:
                client.chat.completions.create(**asked, stream=streaming)
            assert raised.value.code == "queue_full"
        engine.executor.step_s = 0.0
        reasons = [c.choices[0].finish_reason for c in stream if c.choices[0].finish_reason]
        assert reasons == ["length"] * 4


def test_a_frozen_engine_is_unhealthy_within_two_seconds(own_served: Any, own_engine: EngineProcess) -> None:
    with own_served.http() as http:
        assert http.get("/health").status_code == 200
        os.kill(own_engine.pid, signal.SIGSTOP)
        try:
            with OwnTime() as own:
                answer = http.get("/health")
            assert answer.status_code == 503 and own.seconds < 2.5
            assert answer.json()["error"]["code"] in ("engine_unavailable", "engine_dead")
        finally:
            os.kill(own_engine.pid, signal.SIGCONT)


def test_a_frozen_engine_that_goes_on_is_served_again(own_served: Any, own_engine: EngineProcess) -> None:
    """After its link has been given up, too."""
    with own_served.http() as http, own_served.openai() as client:
        os.kill(own_engine.pid, signal.SIGSTOP)
        try:
            assert until(lambda: http.get("/health").json().get("error", {}).get("code") == "engine_dead")
        finally:
            os.kill(own_engine.pid, signal.SIGCONT)
        assert until(lambda: http.get("/health").status_code == 200)
        asked = LONG | {"max_tokens": 5}
        assert client.chat.completions.create(**asked).choices[0].finish_reason == "length"


def test_a_killed_engine_ends_streams_and_gives_503(own_served: Any, own_engine: EngineProcess) -> None:
    with own_served.openai() as client, own_served.http() as http:
        stream = client.chat.completions.create(**LONG, n=MANY, stream=True)
        next(iter(stream))
        psutil.Process(own_engine.pid).kill()
        with OwnTime() as own:
            with pytest.raises(openai.APIError, match="died or its link broke") as raised:
                list(stream)
            assert raised.value.code == "engine_dead"
            assert http.get("/health").status_code == 503
            with pytest.raises(openai.InternalServerError) as refused:
                client.chat.completions.create(**LONG)
        assert refused.value.status_code == 503 and refused.value.code == "engine_dead"
        assert own.seconds < 2
