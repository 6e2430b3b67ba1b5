"""Runs the HTTP server until a signal: binds the port, reaches or starts an engine, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from superinfer.errors import EngineDeadError, InvalidRequestError
from superinfer.runtime.collector import spare_the_collector
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.file_limit import raise_file_limit
from superinfer.runtime.launch import EngineProcess, Progress, launch_engine
from superinfer.runtime.server.app import create_app
from superinfer.runtime.server.errors import STOPPING
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.server.wire import http_protocol
from superinfer.runtime.text import TextClient

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
ENGINE_LOOK_S = 0.25  # how often it is seen whether the engine's process has ended
# Of garbage: the libraries alone take 100 ms to be looked at, in which no stream goes on; requests leave few cycles.
COLLECTIONS = (10_000, 20, 50)
# Longer than clients and proxies keep a connection that they do not use (OpenAI's client 5 s, aiohttp 15 s, load
# balancers 60 s): what closes first must be them, or a request is sent on a connection that is just being closed.
KEEP_ALIVE_S = 75
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(
    engine: EngineConfig | str,
    settings: ServerSettings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_progress: Progress | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Call it on the main thread.

    engine: settings of one to start, which ends with the server; or the address of one that runs, which lives on.
    port: 0 picks a free one.
    on_ready: called with the URL once requests are accepted.
    Raises InvalidRequestError (host, port or TLS files cannot be had; found before an engine is started), whatever
    `launch_engine` and `TextClient.connect` raise, and EngineDeadError where the engine that was started ended by
    itself, and the server with it.
    """
    settings = settings or ServerSettings()
    check_tls(settings)
    raise_file_limit()
    with bind(host, port) as listener:
        if isinstance(engine, str):
            run(_serve(engine, None, listener, settings, on_ready))
            return
        with launch_engine(engine, for_text=True, on_progress=on_progress) as process:
            run(_serve(process.address, process, listener, settings, on_ready))
            if (status := process.exit_status) is not None:
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                raise EngineDeadError(f"the engine (pid {process.pid}) {how}, so the server ended: start it again")


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on the fastest event loop there is."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, a third less time for each token that is streamed; None: asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def check_tls(settings: ServerSettings) -> None:
    """Raises InvalidRequestError where the certificate or its key cannot be used."""
    if not settings.tls_cert:
        return

    def passphrase() -> str:
        raise InvalidRequestError(
            f"tls_key={settings.tls_key!r} is encrypted, and nobody is here to type its passphrase; give it in plain, "
            "readable by the server alone"
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, passphrase)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequestError(
            f"tls_cert={settings.tls_cert!r} with tls_key={settings.tls_key!r} cannot be used: {error}"
        ) from None


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises InvalidRequestError saying why it cannot be had."""
    if not 0 <= port <= 65535:
        raise InvalidRequestError(f"port={port} must be between 0 and 65535; 0 picks a free one")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidRequestError(f"host={host!r} is not an address of this machine: {error.strerror}") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InvalidRequestError(
            f"port={port} on {host} cannot be had: {error.strerror}; choose another one, or 0 for any that is free"
        ) from error
    return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """SCHEME://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn with our own signals: the engine's end is ours to see to, so no signal may end the process before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn is to run the application."""
    return uvicorn.Config(
        app,
        http=http_protocol(settings.write_timeout_s),
        lifespan="off",
        log_level="warning",
        access_log=False,
        backlog=4096,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
        # The connections have one more second after the streams were ended, to hear of it.
        timeout_graceful_shutdown=int(settings.grace_s) + 2,
    )


async def _serve(
    address: str,
    engine: EngineProcess | None,
    listener: socket.socket,
    settings: ServerSettings,
    on_ready: Callable[[str], None] | None,
) -> None:
    """engine: the one at the address, where it is ours."""
    url = url_of(listener, "https" if settings.tls_cert else "http")
    async with await TextClient.connect(address, name="http server", timeout=CONNECT_TIMEOUT_S) as text:
        app = create_app(text, settings)
        server = _Server(uvicorn_config(app, settings))
        stop = asyncio.Event()
        _on_signals(server, stop)
        viewers = asyncio.create_task(_end_live(stop, app))
        watcher = asyncio.create_task(_end_streams(stop, text, settings.grace_s))
        guard = asyncio.create_task(_tell_of_trouble(text) if engine is None else _end_with(engine, server, stop))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        spare_the_collector(COLLECTIONS)
        if server.started and on_ready is not None:
            on_ready(url)
        try:
            await running
        finally:
            watcher.cancel()
            viewers.cancel()
            guard.cancel()
            await text.close(STOPPING)


def _on_signals(server: uvicorn.Server, stop: asyncio.Event) -> None:
    def handle() -> None:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True
        stop.set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, handle)


async def _end_with(engine: EngineProcess, server: uvicorn.Server, stop: asyncio.Event) -> None:
    """An engine of ours that has ended by itself does not come back: who watches over the server is to see that."""
    while engine.alive:
        await asyncio.sleep(ENGINE_LOOK_S)
    server.should_exit = True
    stop.set()


async def _tell_of_trouble(text: TextClient) -> None:
    """An engine that is not ours may be started again at its address, when it has ended; requests are refused until
    then."""
    told = ""
    while True:
        await asyncio.sleep(ENGINE_LOOK_S)
        if text.client.trouble != told:
            told = text.client.trouble
            if told:
                log.warning("requests are refused: %s", told)


async def _end_live(stop: asyncio.Event, app: FastAPI) -> None:
    """Who looks at the page is no reason to wait."""
    await stop.wait()
    if hasattr(app.state, "live"):  # without a page nobody looks
        app.state.live.close()


async def _end_streams(stop: asyncio.Event, text: TextClient, grace: float) -> None:
    """After the grace, answers that still run end with an error their clients can read, rather than a cut line."""
    await stop.wait()
    await asyncio.sleep(grace)
    await text.close(STOPPING)
