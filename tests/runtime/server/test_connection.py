"""What a client may do to a connection, in bytes: offers of other protocols, requests that are none, too large a head,
and one that does not come."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slow_engine import slow_engine

from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.server import serve

BODY = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(BODY)
# What java.net.http.HttpClient says with the first request to an http:// URL.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@contextlib.contextmanager
def connected(served: Any) -> Iterator[socket.socket]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        yield line


def answer(line: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the next answer."""
    got = b""
    while b"\r\n\r\n" not in got:
        more = line.recv(65536)
        assert more, got
        got += more
    head, _, body = got.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += line.recv(65536)
    assert len(body) == length
    return int(got.split()[1]), json.loads(body)


@pytest.fixture(scope="module")
def hasty(tiny_engine: EngineProcess, serving: Callable[..., Any]) -> Iterator[Any]:
    """A server that waits for no client."""
    with serving(tiny_engine.address, write_timeout_s=0.3) as served:
        yield served


@pytest.fixture(scope="module")
def patient(tiny_engine: EngineProcess, serving: Callable[..., Any]) -> Iterator[Any]:
    """A server that waits so long that a client which stands still for a second is not cut off."""
    with serving(tiny_engine.address, write_timeout_s=1.5) as served:
        yield served


@pytest.mark.parametrize("cut", [None, 30, len(POST) + len(H2C) + 2, len(POST) + len(H2C) + 20])
def test_an_offer_of_another_protocol_is_left_aside_and_the_request_answered(served: Any, cut: int | None) -> None:
    whole = POST + H2C + b"\r\n" + BODY
    with connected(served) as line:
        for part in (whole[:cut], whole[cut:] if cut else b""):
            line.sendall(part)
            time.sleep(0.05)  # so that it comes in two pieces
        status, said = answer(line)
        assert (status, said["usage"]["completion_tokens"]) == (200, 3)
        line.sendall(POST + b"\r\n" + BODY)
        assert answer(line)[0] == 200  # and the connection goes on


def test_what_is_no_http_gets_an_error_of_the_usual_shape(served: Any) -> None:
    for said, status in (
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 405),
    ):
        with connected(served) as line:
            line.sendall(said)
            found, body = answer(line)
            assert found == status and set(body["error"]) == {"message", "type", "param", "code"}
            assert line.recv(1) == b""


@pytest.mark.parametrize("head", [b"X-A: " + b"a" * 70_000, b"a: b\r\n" * 12_000], ids=["one header", "many headers"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_head_that_is_too_large_is_refused(served: Any, head: bytes, ends: bool) -> None:
    with connected(served) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head + (b"\r\n\r\n" if ends else b""))
        status, body = answer(line)
        assert (status, body["error"]["code"]) == (431, "headers_too_large")


def test_a_large_head_is_fine_and_counts_for_each_request_alone(served: Any) -> None:
    with served.http() as http:
        for _ in range(3):
            assert http.get("/v1/models", headers={"x-a": "a" * 40_000}).status_code == 200


def test_a_request_that_does_not_come_is_not_waited_for(hasty: Any) -> None:
    with connected(hasty) as idle, connected(hasty) as head, connected(hasty) as body, connected(hasty) as late:
        body.sendall(POST + b"\r\n" + BODY[:5])
        late.sendall(POST + b"\r\n" + BODY)
        assert answer(late)[0] == 200
        late.sendall(b"GET /he")  # the next one on a connection counts too
        with contextlib.suppress(OSError):
            for byte in b"GET /health HTTP/1.1":  # each byte in time is not enough
                head.sendall(bytes([byte]))
                time.sleep(0.05)
        for line in (head, body, late):
            status, said = answer(line)
            assert (status, said["error"]["code"]) == (408, "request_timeout")
            assert line.recv(1) == b""
        assert idle.recv(1) == b""


@pytest.mark.parametrize("sent", [20, len(POST) + 5], ids=["of the head", "of the body"])
def test_a_request_that_does_not_come_leaves_the_answer_before_it_whole(
    tiny_checkpoint: Path, serving: Callable[..., Any], sent: int
) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    with (
        slow_engine(tiny_checkpoint, step_s=0.05) as engine,
        serving(engine.address, write_timeout_s=0.3) as served,
        connected(served) as line,
    ):
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        line.sendall((POST + b"\r\n" + BODY)[:sent])  # without waiting for the first answer, and never the rest
        got = b""
        while b"[DONE]" not in got:
            more = line.recv(1 << 20)
            assert more and b"request_timeout" not in more
            got = got[-10:] + more


def test_a_body_may_come_as_slowly_as_it_keeps_coming(patient: Any) -> None:
    with connected(patient) as line:
        line.sendall(POST + b"\r\n")
        for at in range(0, len(BODY), 10):
            line.sendall(BODY[at : at + 10])
            time.sleep(0.25)
        assert answer(line)[0] == 200


def test_a_whole_answer_that_nobody_reads_is_let_go(hasty: Any, patient: Any) -> None:
    asked = {"model": "tiny", "input": "hello", "max_output_tokens": 1, "metadata": {"long": "x" * 12_000_000}}
    body = json.dumps(asked).encode()
    for served, pause, is_whole in ((hasty, 1.2, False), (patient, 0.05, True)):
        with socket.socket() as line:
            line.settimeout(20)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel would hold all of it
            host, port = served.url.removeprefix("http://").split(":")
            line.connect((host, int(port)))
            line.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
            line.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            got = len(line.recv(10))
            time.sleep(pause)
            with contextlib.suppress(ConnectionResetError):
                while more := line.recv(1 << 20):
                    got += len(more)
            assert (got > len(asked["metadata"]["long"])) is is_whole  # type: ignore[index]


def test_under_tls_too(tiny_engine: EngineProcess, serving: Callable[..., Any], certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    long = "x" * 12_000_000
    body = json.dumps({"input": "hello", "max_output_tokens": 1, "metadata": {"long": long}}).encode()
    tls = {"tls_cert": str(certificate[0]), "tls_key": str(certificate[1])}
    for patience, kept, is_whole in ((0.3, "close", False), (0.3, "keep-alive", False), (1.5, "close", True)):
        with serving(tiny_engine.address, write_timeout_s=patience, **tls) as served, socket.socket() as plain:
            plain.settimeout(20)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = served.url.removeprefix("http://").split(":")
            plain.connect((host, int(port)))
            with context.wrap_socket(plain, server_hostname=host) as line:
                line.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: %s\r\n" % kept.encode())
                line.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
                got = len(line.recv(10))
                time.sleep(0.05 if is_whole else 3.0)
                with contextlib.suppress(OSError):  # cut off: a reset, or an end that TLS did not announce
                    while more := line.recv(1 << 20):
                        got += len(more)
                        if is_whole and got % 40 == 0:
                            time.sleep(0.01)
            assert (got > len(long)) is is_whole


def test_a_connection_outlives_what_clients_and_proxies_keep_of_it(
    tiny_engine: EngineProcess, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.KEEP_ALIVE_S > 60  # load balancers' usual
    monkeypatch.setattr(serve, "KEEP_ALIVE_S", 0.2)
    with serving(tiny_engine.address) as served, connected(served) as line:
        began = time.monotonic()
        line.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line)[0] == 200
        assert line.recv(1) == b"" and time.monotonic() - began > 0.1
