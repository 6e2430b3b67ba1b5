"""The engine's socket: frames in, messages out, and which clients are there. Knows nothing of requests.

A client that does not read its messages is not waited for: what it does not take is kept up to a limit, then its
requests are given up. A client that has gone is noticed by the next message to it, at the latest by the pulse.
"""

from __future__ import annotations

import contextlib
import os
import socket as unix_socket
import time
from collections import deque
from collections.abc import Iterator

import zmq

from superinfer.errors import InvalidRequestError, ProtocolError
from superinfer.runtime import protocol
from superinfer.runtime.protocol import Failed, Hello, Message, ModelInfo, Refused, Stopping, ToEngine, Welcome

MAX_AT_ONCE = 32  # messages that are taken at one time, whatever they cost
MAX_BACKLOG = 4096  # messages kept for a client that does not read, beyond what ZMQ itself holds
HEARTBEAT_INTERVAL_MS = 500
HEARTBEAT_TIMEOUT_MS = 5000


class FrontDoor:
    """Bound ROUTER socket. `gone` collects clients whose requests are to be given up."""

    def __init__(self, address: str, info: ModelInfo, lifeline_fd: int | None = None) -> None:
        """Bind. Raises InvalidRequestError when the address is malformed or in use."""
        self._info = info
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        ):
            self._socket.setsockopt(option, value)
        try:
            self.address = _bind(self._socket, address)
        except BaseException:
            self._socket.close(0)
            self._context.term()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._lifeline_fd = lifeline_fd
        if lifeline_fd is not None:
            self._poller.register(lifeline_fd, zmq.POLLIN)
        self._backlog: dict[bytes, deque[bytes]] = {}
        self.clients: set[bytes] = set()
        self.gone: set[bytes] = set()
        self.orphaned = False

    def receive(self, timeout_ms: int, seconds: float = 0.0) -> Iterator[tuple[bytes, ToEngine]]:
        """Messages of welcomed clients, waiting up to `timeout_ms` for the first. Handshakes and bad frames are
        answered here. Sets `orphaned` once the parent process is gone.

        Beyond MAX_AT_ONCE it takes what there is time for in `seconds`. ZMQ takes from one client after the other, so
        who sends much does not hold others' messages up; what is left waits in the sockets for the next call.
        """
        ready = dict(self._poller.poll(timeout_ms))
        if self._lifeline_fd in ready:
            self.orphaned = True
        if self._socket not in ready:
            return
        until, taken = time.monotonic() + seconds, 0
        while taken < MAX_AT_ONCE or time.monotonic() < until:
            taken += 1
            try:
                client, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._open(client, frames)
            if message is not None:
                yield client, message

    def _open(self, client: bytes, frames: list[bytes]) -> ToEngine | None:
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message is one frame, this one has {len(frames)}")
            message = protocol.decode_to_engine(frames[0])
        except (ProtocolError, InvalidRequestError) as error:
            request_id = protocol.request_id_of(frames[0]) if frames else None
            # Only a client that speaks our protocol can be told which of its requests was bad.
            self.send(client, Failed(code=error.code, message=str(error), request_id=request_id))
            return None
        if isinstance(message, Hello):
            self._shake_hands(client, message)
            return None
        if client not in self.clients:
            self.send(client, Failed(code=ProtocolError.code, message="say Hello before anything else"))
            return None
        return message

    def _shake_hands(self, client: bytes, hello: Hello) -> None:
        version = protocol.PROTOCOL_VERSION
        if hello.version != version:
            reason = (
                f"protocol {hello.version} is not this engine's {version}; install the same superinfer on both sides"
            )
            self.send(client, Refused(version=version, reason=reason))
            return
        self.clients.add(client)
        self.send(client, Welcome(version=version, info=self._info))

    def send(self, client: bytes, message: Message) -> None:
        """Send without waiting."""
        frame = protocol.encode(message)
        backlog = self._backlog.get(client)
        if backlog is None:
            if not self._try_send(client, frame):
                self._backlog[client] = deque([frame])
        elif len(backlog) < MAX_BACKLOG:
            backlog.append(frame)
        else:
            self.gone.add(client)

    def flush(self) -> None:
        """Send what clients could not take before."""
        for client, backlog in list(self._backlog.items()):
            while backlog and self._try_send(client, backlog[0]):
                backlog.popleft()
            if not backlog:
                del self._backlog[client]

    def forget(self, client: bytes) -> None:
        """The client is gone; drop what was meant for it."""
        self.clients.discard(client)
        self.gone.discard(client)
        self._backlog.pop(client, None)

    def _try_send(self, client: bytes, frame: bytes) -> bool:
        """False where the client must be tried again later."""
        try:
            self._socket.send_multipart((client, frame), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.gone.add(client)
        return True

    def close(self, reason: str) -> None:
        """Say goodbye to every client and unbind; an ipc socket file is removed."""
        for client in self.clients:
            self._backlog.pop(client, None)
            self.send(client, Stopping(reason=reason))
        with contextlib.suppress(zmq.ZMQError):
            self._socket.unbind(self.address)
        self._socket.close()
        self._context.term()
        if self.address.startswith("ipc://"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix("ipc://"))


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    """Bind and return the endpoint with wildcards resolved."""
    if address.startswith("ipc://"):
        _check_ipc(address)
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdigit() and int(port) > 65535:  # ZMQ would take what is left over
        raise InvalidRequestError(f"the engine cannot listen at {address!r}: ports go from 0 to 65535; choose another")
    wanted = address[:-1] + "*" if address.startswith("tcp://") and address.endswith(":0") else address
    try:
        socket.bind(wanted)
    except zmq.ZMQError as error:
        taken = error.errno == zmq.EADDRINUSE
        hint = (
            "another process uses it; choose another port" if taken else f"{error}; give ipc://PATH or tcp://HOST:PORT"
        )
        raise InvalidRequestError(f"the engine cannot listen at {address!r}: {hint}") from error
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def _check_ipc(address: str) -> None:
    """ZMQ removes whatever lies at an ipc path before it binds: refuse to take it from a living engine."""
    path = address.removeprefix("ipc://")
    if len(os.fsencode(path)) > 100:
        raise InvalidRequestError(f"ipc path {path!r} is longer than 100 bytes, more than a socket allows; shorten it")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InvalidRequestError(f"ipc path {path!r}: its folder does not exist; create it")
    if os.path.exists(path):
        with unix_socket.socket(unix_socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except OSError:
                return  # left behind by a process that was killed
        raise InvalidRequestError(f"an engine already listens at {address!r}; choose another path or connect to it")
