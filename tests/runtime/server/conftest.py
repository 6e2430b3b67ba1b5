"""A real uvicorn server on a free port, in front of the session's engine or one of a test's own."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn

from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.server.app import create_app
from superinfer.runtime.server.serve import bind, run, url_of, uvicorn_config
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.text import TextClient

MODEL = "tiny"


@dataclass
class Served:
    """One server under test."""

    url: str

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def openai_async(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@contextlib.contextmanager
def _serving(address: str, **settings: Any) -> Iterator[Served]:
    """Serve the engine at `address` from a thread."""
    chosen = msgspec.convert({"model_name": MODEL, "tool_parser": "hermes", "grace_s": 1} | settings, ServerSettings)
    listener = bind("127.0.0.1", 0)
    url = url_of(listener)
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        async with await TextClient.connect(address) as text:
            server = uvicorn.Server(uvicorn_config(create_app(text, chosen), chosen))
            servers.append(server)
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: run(main()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not servers or not servers[0].started:  # before, it does not listen
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    yield Served(url)
    servers[0].should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """Serves the engine at an address."""
    return _serving


@pytest.fixture(scope="session")
def served(tiny_engine: EngineProcess) -> Iterator[Served]:
    with _serving(tiny_engine.address) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.openai() as client:
        yield client


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as http:
        yield http


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return cert, key
