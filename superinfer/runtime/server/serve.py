"""Runs the HTTP server until a signal: binds the port, reaches or starts an engine, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import Progress, launch_engine
from superinfer.runtime.server.app import create_app
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.text import TextClient

DEFAULT_GRACE_S = 5.0
CONNECT_TIMEOUT_S = 5.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(
    engine: EngineConfig | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = "",
    grace: float = DEFAULT_GRACE_S,
    on_progress: Progress | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Call it on the main thread.

    engine: settings of one to start, which ends with the server; or the address of one that runs, which lives on.
    port: 0 picks a free one.
    grace: seconds that running answers may go on after the signal; a second signal ends it at once.
    on_ready: called with the URL once requests are accepted.
    Raises InvalidRequestError (host or port cannot be had; found before an engine is started) and whatever
    `launch_engine` and `TextClient.connect` raise.
    """
    with bind(host, port) as listener:
        if isinstance(engine, str):
            asyncio.run(_serve(engine, listener, model_name, grace, on_ready))
            return
        with launch_engine(engine, on_progress=on_progress) as process:
            asyncio.run(_serve(process.address, listener, model_name, grace, on_ready))


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


def url_of(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn with our own signals: the engine's end is ours to see to, so no signal may end the process before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    address: str, listener: socket.socket, model_name: str, grace: float, on_ready: Callable[[str], None] | None
) -> None:
    url = url_of(listener)
    async with await TextClient.connect(address, name="http server", timeout=CONNECT_TIMEOUT_S) as text:
        app = create_app(text, ServerSettings(model_name=model_name))
        # The connections have one more second after the streams were ended, to hear of it.
        settings = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=int(grace) + 2
        )
        server = _Server(settings)
        stop = asyncio.Event()
        _on_signals(server, stop)
        watcher = asyncio.create_task(_end_streams(stop, text, grace))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started and on_ready is not None:
            on_ready(url)
        try:
            await running
        finally:
            watcher.cancel()


def _on_signals(server: uvicorn.Server, stop: asyncio.Event) -> None:
    def handle() -> None:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True
        stop.set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, handle)


async def _end_streams(stop: asyncio.Event, text: TextClient, grace: float) -> None:
    """After the grace, answers that still run end with an error their clients can read, rather than a cut line."""
    await stop.wait()
    await asyncio.sleep(grace)
    await text.close()
