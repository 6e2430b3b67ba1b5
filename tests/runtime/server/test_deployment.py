"""`superinfer serve` as operators run it: TLS, traces, settings from everywhere, a drain, and the Dockerfile."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import resource
import shlex
import signal
import socket
import ssl
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from command_line import start
from typer.testing import CliRunner

from superinfer.cli.main import app
from superinfer.errors import InvalidRequestError
from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.server.serve import check_tls
from superinfer.runtime.server.settings import ServerSettings

__all__ = ["start"]  # a fixture

ROOT = Path(__file__).parents[3]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def serve(start: Callable[..., Any], engine: EngineProcess, *flags: str, **environment: str) -> tuple[Any, str]:
    """The command, and its URL."""
    command = start(
        "serve", "--port", "0", "--engine", engine.address, "--model-name", "tiny", *flags, **environment
    )  # fmt: skip
    return command, command.line("serving at").split()[2].removesuffix("/v1")


def stop(command: Any) -> str:
    """End it; its stderr."""
    command.process.send_signal(signal.SIGTERM)
    status, _, err = command.end()
    assert status == 0, err
    return str(err)


# ---------------------------------------------------------------------------- TLS


def test_tls_by_flag(start: Callable[..., Any], tiny_engine: EngineProcess, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    command, url = serve(start, tiny_engine, "--tls-cert", str(cert), "--tls-key", str(key))
    assert url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(verify=trusting, timeout=30) as client:
        answer = client.post(f"{url}/v1/chat/completions", json=ASK)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=client, max_retries=0) as speaker:
            chunks = list(speaker.chat.completions.create(**ASK, stream=True))
        assert chunks[-1].choices[0].finish_reason
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{url}/health", timeout=10)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url.replace('https', 'http')}/health", timeout=10)
    stop(command)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"], "/nowhere.pem"),
        (["--tls-cert", "/nowhere.pem"], "belong together"),
    ],
)
def test_tls_files_that_cannot_be_used_are_named(
    start: Callable[..., Any], tiny_engine: EngineProcess, flags: list[str], says: str
) -> None:
    status, out, err = start("serve", "--port", "0", "--engine", tiny_engine.address, *flags).end()
    assert status == 2 and says in err and "serving" not in out and "Traceback" not in err


def test_an_encrypted_key_is_refused_rather_than_its_passphrase_asked_for(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    locked = key.with_name("locked.pem")
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:abc", "-in", str(key), "-out", str(locked)],
        capture_output=True, check=True,
    )  # fmt: skip
    check_tls(ServerSettings(tls_cert=str(cert), tls_key=str(key)))
    with pytest.raises(InvalidRequestError, match=r"locked\.pem' is encrypted"):
        check_tls(ServerSettings(tls_cert=str(cert), tls_key=str(locked)))


# ---------------------------------------------------------------------------- traces


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OpenTelemetry collector on HTTP: its URL, and the spans it was sent."""
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    spans: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            for sent in request.resource_spans:
                named = {a.key: a.value.string_value for a in sent.resource.attributes}
                spans.extend((named, span) for scope in sent.scope_spans for span in scope.spans)
            answer = trace_service.ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()


def test_every_answer_is_a_span_at_the_collector_by_the_time_the_server_has_ended(
    start: Callable[..., Any], tiny_engine: EngineProcess, collector: tuple[str, list[Any]]
) -> None:
    endpoint, spans = collector
    command, url = serve(start, tiny_engine, "--otlp-endpoint", endpoint)
    parent = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    asked = ASK | {"slo": {"ttft_ms": 60_000}, "ignore_eos": True}
    httpx.post(f"{url}/v1/chat/completions", json=asked, headers=parent, timeout=30).raise_for_status()
    httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "hi", "n": 2}, timeout=30).raise_for_status()
    assert stop(command) == ""
    assert len(spans) == 3, "one a sequence"
    resource, span = spans[0]
    assert resource["service.name"] == "superinfer" and resource["superinfer.model"] == "tiny"
    assert span.name == "llm_request" and span.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert span.parent_span_id.hex() == "00f067aa0ba902b7"
    assert span.end_time_unix_nano > span.start_time_unix_nano > 0
    told = {attribute.key: attribute.value for attribute in span.attributes}
    assert told["gen_ai.usage.completion_tokens"].int_value == 4
    assert told["gen_ai.latency.time_to_first_token"].double_value > 0
    assert told["superinfer.slo_met"].bool_value is True
    assert told["gen_ai.response.finish_reason"].string_value == "length"


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_no_answer(start: Callable[..., Any], tiny_engine: EngineProcess) -> None:
    command, url = serve(start, tiny_engine, "--otlp-endpoint", "http://127.0.0.1:9/v1/traces", "--grace", "0.1")
    assert httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=30).status_code == 200
    command.process.send_signal(signal.SIGTERM)
    assert command.end(30)[0] == 0


# ---------------------------------------------------------------------------- settings, logs, CORS


def test_flags_environment_and_file_reach_the_running_server_in_that_order(
    start: Callable[..., Any], tiny_engine: EngineProcess, tmp_path: Path
) -> None:
    keys, file = tmp_path / "keys", tmp_path / "server.toml"
    keys.write_text("# for the tests\nfrom-the-key-file\n")
    file.write_text(
        'api_keys = ["from-the-file"]\nmax_body_bytes = 300\nmax_concurrent = 7\ncors_origins = ["https://file.example"]'
        "\n[slo_classes.gold]\nttft_ms = 60000\n"
    )
    command, url = serve(
        start, tiny_engine, "--config", str(file), "--api-key-file", str(keys), "--access-log",
        SUPERINFER_API_KEYS="from-the-environment", SUPERINFER_MAX_BODY_BYTES="1000",
    )  # fmt: skip

    def ask(key: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "origin": "https://file.example"}
        return httpx.post(f"{url}/v1/chat/completions", json=ASK | more, headers=headers, timeout=30)

    assert ask("from-the-file").status_code == ask("from-the-environment").status_code == 401
    answer = ask("from-the-key-file", service_tier="gold", user="x" * 500)  # over the file's limit, under the other
    assert answer.status_code == 200 and answer.json()["slo"]["slo_class"] == "gold"
    assert answer.headers["access-control-allow-origin"] == "https://file.example"
    assert ask("from-the-key-file", user="x" * 1500).status_code == 413
    lines = [json.loads(line) for line in stop(command).splitlines()]
    assert [line["status"] for line in lines] == [401, 401, 200, 413]
    assert set(lines[2]) == {
        "time", "client", "method", "path", "status", "ms", "bytes", "prompt_tokens", "output_tokens", "slo_class",
        "slo_met",
    }  # fmt: skip
    assert (lines[2]["method"], lines[2]["path"], lines[2]["client"]) == ("POST", "/v1/chat/completions", "127.0.0.1")
    assert lines[2]["bytes"] == len(answer.content) and abs(lines[2]["time"] - time.time()) < 600
    assert "output_tokens" not in lines[0]


def test_a_stream_is_logged_with_all_its_bytes(start: Callable[..., Any], tiny_engine: EngineProcess) -> None:
    command, url = serve(start, tiny_engine, "--access-log")
    asked = ASK | {"stream": True, "max_tokens": 200, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.text.endswith("data: [DONE]\n\n")
    (line,) = [json.loads(line) for line in stop(command).splitlines()]
    assert (line["bytes"], line["output_tokens"]) == (len(answer.content), 200)


def until_it_refuses(url: str) -> None:
    """Until nobody listens there any more."""
    deadline = time.monotonic() + 30
    with pytest.raises(httpx.ConnectError):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError):
                httpx.get(f"{url}/health", timeout=5)
            time.sleep(0.02)


def test_sigterm_drains_streams_and_refuses_new_connections(
    start: Callable[..., Any], tiny_engine: EngineProcess
) -> None:
    command, url = serve(start, tiny_engine, "--grace", "60")
    texts: list[str] = []
    begun = threading.Barrier(5)

    def read() -> None:
        asked = ASK | {"stream": True, "max_tokens": 1200, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=120) as answer:
            lines = answer.iter_lines()
            texts.append(next(lines))
            begun.wait(60)
            texts.extend(lines)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    command.process.send_signal(signal.SIGTERM)
    until_it_refuses(url)
    for thread in threads:
        thread.join(120)
    assert texts.count("data: [DONE]") == 4 and sum('"finish_reason":"length"' in text for text in texts) == 4
    assert command.end(30)[0] == 0


def test_a_second_signal_ends_the_server_at_once(start: Callable[..., Any], tiny_engine: EngineProcess) -> None:
    command, url = serve(start, tiny_engine, "--grace", "600")
    asked = {"model": "tiny", "prompt": ["hi"] * 60, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGTERM)
        until_it_refuses(url)  # the first is taken in: two of a kind at once would be one
        command.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert "event: error" in rest and "data: [DONE]" not in rest, rest[-4:]
    assert "the server is stopping" in rest[rest.index("event: error") + 1]
    assert command.end(30)[0] == 0


def test_sigterm_does_not_wait_for_a_request_that_does_not_come(
    start: Callable[..., Any], tiny_engine: EngineProcess
) -> None:
    command, url = serve(start, tiny_engine, "--grace", "600")
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(ASK).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as lines:
        part, half, whole = (
            lines.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(3)
        )
        part.sendall(head[:20])
        half.sendall(head + body[:10])
        whole.sendall(head + body)
        assert whole.recv(20).startswith(b"HTTP/1.1 200")  # so the others have come as far as they do
        command.process.send_signal(signal.SIGTERM)
        said = b"".join(iter(lambda: half.recv(65536), b""))
        assert said.startswith(b"HTTP/1.1 503") and b'"code":"cancelled"' in said and b"send the request again" in said
        assert part.recv(65536) == b""
    assert command.end(60)[0] == 0


def test_sigterm_lets_a_request_come_that_keeps_coming(start: Callable[..., Any], tiny_engine: EngineProcess) -> None:
    command, url = serve(start, tiny_engine, "--grace", "600")
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(ASK | {"metadata": {"long": "x" * 3000}}).encode()
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        line.sendall(body[:1000])
        httpx.get(f"{url}/health", timeout=30)
        command.process.send_signal(signal.SIGTERM)
        until_it_refuses(url)
        for at in range(1000, len(body), 100):
            line.sendall(body[at : at + 100])
            time.sleep(0.05)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
    assert command.end(60)[0] == 0


def test_sigterm_does_not_wait_for_clients_to_say_that_tls_ends(
    start: Callable[..., Any], tiny_engine: EngineProcess, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    command, url = serve(start, tiny_engine, "--tls-cert", str(cert), "--tls-key", str(key), "--grace", "600")
    host, port = url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(cert))
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=60), server_hostname=host) as line:
        line.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
        command.process.send_signal(signal.SIGTERM)
        # The connection is open, and says nothing; left alone, TLS would wait for 30 s.
        assert command.end(20)[0] == 0


def test_a_low_limit_of_open_files_is_raised_as_far_as_it_may_be(
    start: Callable[..., Any], tiny_engine: EngineProcess
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))  # what the server inherits
    try:
        command, _ = serve(start, tiny_engine)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert psutil.Process(command.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)
    stop(command)


# ---------------------------------------------------------------------------- Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest), comments left out and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def test_what_the_dockerfile_names_exists() -> None:
    found = instructions((ROOT / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert found[0][0] == "FROM" and "nvidia/cuda:" in found[0][1]
    copied: set[str] = set()
    for kind, rest in found:
        if kind == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
            copied |= set(sources)
        elif kind == "RUN":
            for extras in re.findall(r"\.\[([\w,]+)\]", rest):
                assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"]), rest
        elif kind == "ENTRYPOINT":
            program, *arguments = json.loads(rest)  # exec form: signals reach the server
            assert program in project["project"]["scripts"]
            shown = CliRunner().invoke(app, [*arguments, "--help"])
            assert shown.exit_code == 0, shown.output
            assert "0.0.0.0" in arguments
    # The wheel is made of these inside the image.
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    assert needed <= copied, needed - copied
    kinds = [kind for kind, _ in found]
    assert {"USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"} <= set(kinds)
    python = re.search(r"python3\.(\d+)", next(rest for kind, rest in found if kind == "RUN"))
    assert python is not None and 11 <= int(python[1]) < 13, "what requires-python allows"


def test_the_dockerfiles_health_check_tells_a_server_that_is_ready(served: Any) -> None:
    (check,) = [rest for kind, rest in instructions((ROOT / "Dockerfile").read_text()) if kind == "HEALTHCHECK"]
    _, _, command = check.partition("CMD ")
    (port,) = [rest for kind, rest in instructions((ROOT / "Dockerfile").read_text()) if kind == "EXPOSE"]
    assert f"127.0.0.1:{port}/ready" in command
    ready = shlex.split(command.replace(f"127.0.0.1:{port}", served.url.removeprefix("http://")))
    nobody = shlex.split(command.replace(f"127.0.0.1:{port}", "127.0.0.1:9"))
    assert subprocess.run(ready, capture_output=True).returncode == 0
    assert subprocess.run(nobody, capture_output=True).returncode != 0
