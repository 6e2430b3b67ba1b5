"""One run of a program: what its state and all forks of it have in common, and how it ends."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import Any

from superinfer.errors import InvalidRequestError, RequestCancelledError
from superinfer.lang.backend import Backend
from superinfer.lang.callgraph import CallGraph
from superinfer.lang.conversation import Conversation
from superinfer.lang.executor import StreamExecutor
from superinfer.lang.loop import language_loop
from superinfer.lang.planner import Planner
from superinfer.lang.prompt import Transcript
from superinfer.lang.report import Ledger
from superinfer.lang.sampling import Sampling


class Run:
    """One run of a program: what its state and all forks of it have in common."""

    def __init__(
        self,
        backend: Backend,
        sampling: Sampling,
        ledger: Ledger,
        *,
        is_async: bool,
        stream: bool,
        due: float = math.inf,
        planner: Planner | None = None,
        tracing: bool = False,
        slo_class: str = "",
        session: Conversation | None = None,
    ) -> None:
        """due: by when the program must be done, on `clock`. planner: plans its calls and learns from them; None: each
        is sent all that is left. tracing: nothing is sent, variables hold Unknown. session: what it is a turn of."""
        self.id = uuid.uuid4().hex
        self.session = session
        self.program_id = session.id if session is not None else self.id  # as the engine is told
        self.backend = backend
        self.sampling = sampling
        self.ledger = ledger
        self.is_async = is_async
        self.stream = stream
        self.due = due
        self.planner = planner
        self.tracing = tracing
        self.slo_class = slo_class
        self.graph = CallGraph(ledger.name)
        self.clock = time.monotonic
        self.task: asyncio.Task[Any] | None = None  # of a program that runs in the background on the language's loop
        self.executors: list[StreamExecutor] = []  # the first is the program's own state; none once it has ended
        self._has_ended = False
        self._told: list[BaseException] = []
        render = backend.render_chat
        StreamExecutor(self, Transcript(render) if session is None else session.transcript(render))
        if session is not None:
            self.root.variables = session.variables()
        self.root.start()

    @property
    def root(self) -> StreamExecutor:
        """Of the program's own state, until the program has ended."""
        return self.executors[0]

    def abort(self, error: BaseException) -> None:
        """Fail every state that is not failed yet and cancel its calls. From any thread."""
        for executor in list(self.executors):
            executor.fail(error)

    def cancel(self) -> None:
        """Give the program up: its requests are cancelled on the engine."""
        self.abort(RequestCancelledError(f"program {self.ledger.name} was cancelled"))
        if self.task is not None:
            language_loop().loop.call_soon_threadsafe(self.task.cancel)

    def tell(self, error: BaseException) -> None:
        """The program got `error` where it read. Remembered, if it is what made a state fail."""
        if any(executor.error is error for executor in self.executors):
            self._told.append(error)

    def untold(self) -> list[tuple[str, BaseException]]:
        """Which forks have failed, and of what, without the program having been told. What made its own state fail is
        told by that."""
        told = {id(error) for error in (*self._told, self.root.error)}
        failed = []
        for executor in self.executors:  # after the one that they come from
            if executor.error is not None and id(executor.error) not in told:
                told.add(id(executor.error))
                failed.append(("/".join(executor.path), executor.error))
        return failed

    def check_turn(self) -> None:
        """Raises InvalidRequestError for a turn after which a session could not go on."""
        role = self.root.transcript.role if self.root.error is None else None
        if self.session is not None and role is not None:
            raise InvalidRequestError(f"the turn ends inside a {role} message; end it, so that the session can go on")

    def end(self) -> None:
        """The program has ended. From any thread. Safe to call twice."""
        if self._has_ended:
            return
        self._has_ended = True
        if self.session is not None:
            ended_well = self.root.error is None
            self.session.end(self.root.transcript if ended_well else None, self.root.variables)
        self.ledger.ended = self.clock()
        self.graph.ended = self.ledger.ended - self.ledger.started
        if self.planner is not None and all(executor.error is None for executor in self.executors):
            self.planner.history.learn(self.graph)
        for executor in self.executors:
            executor.loop.call_soon_threadsafe(executor.end)
        self.executors = []  # they know us: this way all of it goes when the program's states do
