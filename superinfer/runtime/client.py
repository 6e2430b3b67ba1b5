"""The ZMQ client, async and sync: the only door into an engine.

Tokens in, tokens out; text lives in `runtime.text`. The engine's death is noticed through the socket's monitor: the
kernel reports a closed link at once, and ZMTP heartbeats, which ZMQ's own thread answers even while Python is busy,
report a frozen one within 1.5 s. Every waiting call then raises EngineDeadError, and so do later ones until that engine
goes on or another one of the same model is started at its address. See docs/protocol.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from superinfer.errors import (
    DeadlineMissedError,
    EngineDeadError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    error_from_code,
)
from superinfer.runtime import protocol
from superinfer.runtime.loop_thread import LoopThread
from superinfer.runtime.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Deltas,
    Failed,
    Generate,
    GetHealth,
    GetLive,
    GetStats,
    HealthReport,
    Hello,
    LiveReport,
    ModelInfo,
    RequestReport,
    Score,
    SequenceDelta,
    Shutdown,
    StatsReport,
    Stopping,
    TokenLogprob,
    Welcome,
)

MAX_AT_ONCE = 64  # messages taken in before others on the loop have their turn
HEARTBEAT_INTERVAL_MS = 400
HEARTBEAT_TIMEOUT_MS = 1200  # a frozen engine is noticed within 0.4 + 1.2 s, inside the 2 s that we promise


# Called on the client's loop with each delta of a request as it arrives, or with the error that ended it.
Sink = Callable[[SequenceDelta | Exception], None]


def new_request_id() -> str:
    """An id no other request of this connection has."""
    return uuid.uuid4().hex


class AsyncEngineClient:
    """One connection to one engine. Make it with `await AsyncEngineClient.connect(address)`; all methods belong to
    the event loop it was made on."""

    def __init__(self, address: str) -> None:
        """Not connected yet: use `connect`."""
        self.address = address
        self.info: ModelInfo
        context: Any = zmq.asyncio.Context()  # the monitor's socket is of its kind
        self._context = context
        # Not an asyncio socket: that makes a future and wakes a task for each message, where a callback is enough.
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER, socket_class=zmq.Socket)
        for option, value in (
            (zmq.LINGER, 200),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),  # a loop that is busy for seconds loses nothing; what it asked for bounds what can come
            (zmq.RECONNECT_IVL, 100),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
        ):
            self._socket.setsockopt(option, value)
        self._streams: dict[str, Sink] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._tokens = itertools.count(1)
        self._dead: Exception | None = None
        self._is_lost = False  # dead because the engine is, or its link broke: it, or another, may answer again
        self.name = ""  # as the engine was told
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[protocol.ToClient] = self._loop.create_future()
        self._receive_is_due = False
        self._tasks: list[asyncio.Task[None]] = []
        self._monitor: zmq.asyncio.Socket

    @classmethod
    async def connect(cls, address: str, *, name: str = "", timeout: float = 10.0) -> AsyncEngineClient:
        """Connect and shake hands within `timeout` seconds.

        Raises InvalidRequestError (no address), EngineUnavailableError (no answer), ProtocolError (other version).
        """
        client = cls(address)
        monitor: Any = client._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            try:
                client._socket.connect(address)
            except zmq.ZMQError as error:
                raise InvalidRequestError(
                    f"engine address {address!r} is not usable ({error}); use ipc://PATH or tcp://HOST:PORT"
                ) from error
            client._loop.add_reader(client._fd, client._receive)
            client.name = name or f"pid {os.getpid()}"
            client._say_hello()
            try:
                answer = await asyncio.wait_for(client._welcome, timeout)
            except TimeoutError:
                raise EngineUnavailableError(
                    f"no engine answered at {address} within {timeout:g} s; start one with `superinfer engine` "
                    "or check the address"
                ) from None
            if not isinstance(answer, Welcome):
                raise ProtocolError(f"engine at {address} refused the connection: {getattr(answer, 'reason', answer)}")
            client.info = answer.info
        except BaseException:
            client._loop.remove_reader(client._fd)
            client._socket.disable_monitor()
            monitor.close(0)
            client._socket.close(0)
            client._context.term()
            raise
        client._monitor = monitor
        client._tasks = [asyncio.create_task(client._watch(monitor))]
        return client

    # ------------------------------------------------------------------ calls

    async def open(self, request: Generate | Score, sink: Sink) -> None:
        """Send a request whose deltas go to `sink`, until `release`. Raises EngineDeadError, InvalidRequestError.

        For callers with thousands of streams, to whom a queue and a task for each would be the larger part of the work;
        `generate` and `score` are made of it. `sink` must not raise, and must not call `open` or `release`.
        """
        if self._dead is not None:
            raise _afresh(self._dead)
        if request.request_id in self._streams:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is already in use on this connection; give a new one"
            )
        self._streams[request.request_id] = sink
        try:
            await self._send(request)
        except BaseException:
            del self._streams[request.request_id]
            raise

    def open_soon(self, request: Generate | Score, sink: Sink) -> None:
        """`open` for callers that cannot wait. A link that breaks just now is told to `sink`. Raises like `open`."""
        if self._dead is not None:
            raise _afresh(self._dead)
        if request.request_id in self._streams:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is already in use on this connection; give a new one"
            )
        self._streams[request.request_id] = sink
        self._send_soon(request)

    def release(self, request_id: str, *, finished: bool) -> None:
        """Forget a request given to `open`; it is cancelled unless it has `finished`."""
        if self._streams.pop(request_id, None) is not None and not finished:
            self._send_soon(Cancel(request_id=request_id))

    async def generate(self, request: Generate) -> AsyncGenerator[SequenceDelta, None]:
        """Deltas of all `n` continuations as they come. Closing the iterator early cancels the request.

        Raises InvalidRequestError, QueueFullError, EngineDeadError; DeadlineMissedError where the SLO says
        `on_miss="raise"`.
        """
        open_sequences = request.sampling.n
        raises = request.slo is not None and request.slo.on_miss == "raise"
        async with self._stream(request) as deltas:
            try:
                while open_sequences:
                    delta = await deltas.get()
                    if isinstance(delta, Exception):
                        open_sequences = 0
                        raise delta
                    if delta.finish_reason is not None:
                        open_sequences -= 1
                        if raises and delta.finish_reason == "deadline":
                            raise DeadlineMissedError(deadline_text(request, delta))
                    yield delta
            finally:
                if open_sequences:
                    self._send_soon(Cancel(request_id=request.request_id))

    async def score(self, request: Score) -> tuple[list[TokenLogprob], RequestReport]:
        """Log probabilities of the prompt tokens from `request.start` on. Raises like `generate`."""
        scores: list[TokenLogprob] = []
        async with self._stream(request) as deltas:
            finished = False
            try:
                while True:
                    delta = await deltas.get()
                    if isinstance(delta, Exception):
                        finished = True
                        raise delta
                    scores.extend(delta.logprobs or [])
                    if delta.finish_reason is not None:
                        finished = True
                        if delta.finish_reason == "cancelled" or delta.report is None:
                            raise RequestCancelledError(f"score {request.request_id} was cancelled")
                        if delta.finish_reason == "deadline":
                            raise DeadlineMissedError(f"score {request.request_id} missed its deadline")
                        return scores, delta.report
            finally:
                if not finished:
                    self._send_soon(Cancel(request_id=request.request_id))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request or one of its continuations; its iterator then ends with finish_reason "cancelled"."""
        self._send_soon(Cancel(request_id=request_id, index=index))

    async def health(self, timeout: float = 2.0) -> HealthReport:
        """Raises EngineUnavailableError when the engine does not answer in `timeout` seconds."""
        token = next(self._tokens)
        return await self._ask(GetHealth(token=token), token, timeout)

    async def stats(self, timeout: float = 5.0) -> StatsReport:
        """Counters and gauges. Raises EngineUnavailableError when the engine does not answer in time."""
        token = next(self._tokens)
        return await self._ask(GetStats(token=token), token, timeout)

    async def live(self, limit: int = 200, timeout: float = 5.0) -> LiveReport:
        """What the engine is doing now, with at most `limit` of its unfinished sequences (0 to 1,000).

        Raises InvalidRequestError, and EngineUnavailableError when the engine does not answer in time.
        """
        token = next(self._tokens)
        return await self._ask(GetLive(token=token, limit=limit), token, timeout)

    async def shutdown_engine(self) -> None:
        """Ask the engine process to end. Requests that are not finished fail."""
        await self._send(Shutdown())

    async def close(self, reason: str = "the client was closed") -> None:
        """Disconnect. Waiting calls raise RequestCancelledError(reason); the engine cancels their requests."""
        if self._closed:
            return
        self._closed, linger = True, 0 if self._is_lost else None
        for request_id in self._streams:
            self._send_soon(Cancel(request_id=request_id))
        self._fail(RequestCancelledError(reason))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._loop.remove_reader(self._fd)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger)
        self._context.term()

    async def __aenter__(self) -> AsyncEngineClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def alive(self) -> bool:
        """False once the client is closed, and while no engine of its model answers at the address."""
        return self._dead is None

    @property
    def trouble(self) -> str:
        """Why calls are refused now; "" where they are not."""
        return str(self._dead or "")

    # ------------------------------------------------------------------ link

    def _say_hello(self) -> None:
        """Without waiting: it is sent as soon as there is a link."""
        self._socket.send(protocol.encode(Hello(version=PROTOCOL_VERSION, client=self.name)), zmq.NOBLOCK)
        self._receive_soon()

    async def _send(self, message: protocol.Message) -> None:
        if self._dead is not None:
            raise _afresh(self._dead)
        self._send_soon(message)

    def _send_soon(self, message: protocol.Message) -> None:
        """Send without waiting. The send queue has no limit, so this cannot block; a dead link needs no message."""
        if self._dead is None:
            self._socket.send(protocol.encode(message), zmq.NOBLOCK)
            self._receive_soon()  # sending may take in the signal that tells of what has arrived

    @contextlib.asynccontextmanager
    async def _stream(self, request: Generate | Score) -> AsyncIterator[asyncio.Queue[SequenceDelta | Exception]]:
        deltas: asyncio.Queue[SequenceDelta | Exception] = asyncio.Queue()
        await self.open(request, deltas.put_nowait)
        try:
            yield deltas
        finally:
            self.release(request.request_id, finished=True)

    async def _ask(self, message: protocol.Message, token: int, timeout: float) -> Any:
        answer = self._answers[token] = asyncio.get_running_loop().create_future()
        try:
            await self._send(message)
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise EngineUnavailableError(f"engine at {self.address} did not answer within {timeout:g} s") from None
        finally:
            del self._answers[token]

    @property
    def _fd(self) -> int:
        """Readable when something may have arrived; it tells so only once."""
        return int(self._socket.getsockopt(zmq.FD))

    def _receive_soon(self) -> None:
        if not self._receive_is_due:
            self._receive_is_due = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        """Take in what has arrived."""
        self._receive_is_due = False
        if self._socket.closed:
            return
        for _ in range(MAX_AT_ONCE):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._dispatch(protocol.decode_to_client(frame))
            except Exception as error:
                self._loop.remove_reader(self._fd)
                self._fail(ProtocolError(f"engine at {self.address} sent a message that cannot be read: {error}"))
                return
        self._receive_soon()

    def _dispatch(self, message: protocol.ToClient) -> None:
        match message:
            case _ if not self._welcome.done():
                self._welcome.set_result(message)
            case Welcome(info=info):
                if self._is_lost:
                    self._go_on(info)
            case _ if self._is_lost:
                pass  # about what was under way when the link broke
            case Deltas(deltas=deltas):
                for delta in deltas:
                    stream = self._streams.get(delta.request_id)
                    if stream is not None:  # else: cancelled, and its last delta was already under way
                        stream(delta)
            case Failed(request_id=str(request_id)):
                stream = self._streams.get(request_id)
                if stream is not None:
                    stream(_error_of(message))
            case Failed():
                self._fail(_error_of(message))
            case HealthReport() | StatsReport() | LiveReport():
                answer = self._answers.get(message.token)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Stopping(reason=reason):
                self._fail(EngineDeadError(f"engine at {self.address} stopped: {reason}"))
                self._is_lost = True
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__}")

    def _go_on(self, info: ModelInfo) -> None:
        """An engine answers at the address: the one that was lost, which has given our requests up, or another."""
        if _served(info) == _served(self.info):
            self.info, self._is_lost, self._dead = info, False, None
        else:
            self._dead = EngineUnavailableError(
                f"the engine at {self.address} serves {info.path!r} now, not {self.info.path!r} as the one before it: "
                "connect to it with a client of its own"
            )

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Until this is cancelled. The monitor stays open: libzmq waits for ever to tell something to a closed one.

        A link breaks when the engine dies, when it is frozen, and when this process itself has stood still: libzmq
        finds then that it has heard nothing for too long before it looks at what has come. So whoever is at the address
        is asked again, over the link that libzmq makes anew as soon as it can.
        """
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                # What the engine said before it went (a Stopping with its reason) may still be on its way.
                await asyncio.sleep(0.02)
                if self._dead is None:
                    self._fail(
                        EngineDeadError(
                            f"engine at {self.address} (pid {self.info.pid}) died or its link broke; unfinished "
                            "requests are lost, and more are refused until it answers again or is started anew there"
                        )
                    )
                    self._is_lost = True
                if self._is_lost:
                    self._say_hello()

    def _fail(self, error: Exception) -> None:
        """The link is of no use: everyone who waits, and everyone who calls later, gets `error`."""
        if self._dead is None:
            self._dead = error
        if not self._welcome.done():
            self._welcome.set_exception(_afresh(self._dead))
        for stream in list(self._streams.values()):
            stream(_afresh(self._dead))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_afresh(self._dead))


def _served(info: ModelInfo) -> tuple[object, ...]:
    """What a client knows of a model, beyond how much there is room for."""
    return info.model, info.path, info.architecture, info.vocab_size, info.eos_token_ids


def _afresh(error: Exception) -> Exception:
    """The same error, never raised: one that is raised again and again keeps the frames of all who ever got it."""
    return copy.copy(error)


def _error_of(failed: Failed) -> Exception:
    error = error_from_code(failed.code, failed.message)
    if isinstance(error, OverloadedError):
        error.retry_after_s = failed.retry_after_s
    return error


def deadline_text(request: Generate, delta: SequenceDelta) -> str:
    """What DeadlineMissedError says."""
    took = f" after {delta.report.e2e_s:.3f} s with {delta.report.output_tokens} tokens" if delta.report else ""
    deadline = request.slo.deadline if request.slo else None
    return f"request {request.request_id} missed its deadline of {deadline} s: stopped{took}"


class EngineClient:
    """Synchronous twin of AsyncEngineClient: the same calls, on a thread of its own. Safe to share among threads."""

    def __init__(self, address: str, *, name: str = "", timeout: float = 10.0) -> None:
        """Connect. Raises like AsyncEngineClient.connect."""
        self._loop = LoopThread("superinfer-client")
        try:
            self._client = self._loop.run(AsyncEngineClient.connect(address, name=name, timeout=timeout))
        except BaseException:
            self._loop.close()
            raise
        self.address = address

    @property
    def info(self) -> ModelInfo:
        """The model and the limits of the engine."""
        return self._client.info

    def generate(self, request: Generate) -> Iterator[SequenceDelta]:
        """See AsyncEngineClient.generate."""
        return self._loop.iterate(self._client.generate(request))

    def score(self, request: Score) -> tuple[list[TokenLogprob], RequestReport]:
        """See AsyncEngineClient.score."""
        return self._loop.run(self._client.score(request))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """See AsyncEngineClient.cancel."""
        self._loop.loop.call_soon_threadsafe(self._client.cancel, request_id, index)

    def health(self, timeout: float = 2.0) -> HealthReport:
        """See AsyncEngineClient.health."""
        return self._loop.run(self._client.health(timeout))

    def stats(self, timeout: float = 5.0) -> StatsReport:
        """See AsyncEngineClient.stats."""
        return self._loop.run(self._client.stats(timeout))

    def live(self, limit: int = 200, timeout: float = 5.0) -> LiveReport:
        """See AsyncEngineClient.live."""
        return self._loop.run(self._client.live(limit, timeout))

    def shutdown_engine(self) -> None:
        """See AsyncEngineClient.shutdown_engine."""
        self._loop.run(self._client.shutdown_engine())

    def close(self) -> None:
        """See AsyncEngineClient.close. Safe to call twice."""
        if self._loop.loop.is_running():
            self._loop.run(self._client.close())
            self._loop.close()

    @property
    def alive(self) -> bool:
        """See AsyncEngineClient.alive."""
        return self._client.alive

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
