"""Runs the expressions of one state in order, as a task on the language's loop.

Programs submit from their own thread or loop and never wait for it; everything a state holds changes on the language's
loop only. A fork is a step too: children begin from what their parent has said when the step's turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from superinfer.errors import DeadlineMissedError, InvalidRequestError, OverloadedError, RequestCancelledError
from superinfer.lang import calls
from superinfer.lang.callgraph import Call, site_of
from superinfer.lang.ir import (
    Expr,
    Gen,
    RoleBegin,
    RoleEnd,
    Select,
    Text,
    Tools,
    VarScopeBegin,
    VarScopeEnd,
    leaves,
)
from superinfer.lang.loop import language_loop, on_language_loop
from superinfer.lang.outcome import Outcome
from superinfer.lang.planner import NO_PAUSES, Sent, unseen
from superinfer.lang.promise import Promise, Promises
from superinfer.lang.prompt import Transcript
from superinfer.lang.report import CallWatch
from superinfer.lang.sampling import DEFAULT_MAX_TOKENS
from superinfer.lang.steps import Append, Ask, Fork, OpenScope, Say, Step
from superinfer.lang.unknown import DataDependent
from superinfer.lang.variable import Feed, Variable
from superinfer.runtime.protocol import Hints

if TYPE_CHECKING:
    from superinfer.lang.run import Run

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_TRACED = 1000  # calls, after which a trace is not expected to end


class StreamExecutor:
    """The engine room of one ProgramState."""

    def __init__(self, run: Run, transcript: Transcript, path: tuple[str, ...] = ()) -> None:
        self.run = run
        self.loop = language_loop().loop
        self.transcript = transcript
        self.path = path
        self.variables: dict[str, Variable] = {}
        self.error: BaseException | None = None
        self.text_feed = Feed()
        self.fork_mark = (0, 0)
        self._begun = False
        self._ended = False
        self._steps: deque[Say | Step | Ask | Fork | Append] = deque()  # the first is the one being executed
        self._task: asyncio.Task[None] | None = None
        self._scopes: list[OpenScope] = []
        self._published = 0
        self._expected: dict[str, Variable] = {}
        self._lock = threading.Lock()
        self.frontier: tuple[int, ...] = ()  # calls that whatever this state says next comes after
        self._extends: int | None = None  # the call from whose text its next one goes on
        self._visits: dict[str, int] = {}  # how often it has made a call of a name
        self._group = ""  # of its first call, in a fork with siblings
        run.executors.append(self)

    # ------------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Execute what is submitted; for a state that is no fork."""
        self._begun = True

    def submit(self, expr: Expr, promises: Promises) -> None:
        """Queue an expression. The variables it will fill exist from now on."""
        seen = self.run.graph.seen
        if self.run.tracing and len(self.run.graph.calls) > MAX_TRACED:
            raise DataDependent(f"it makes more than {MAX_TRACED} calls")
        steps: list[Say | Step] = []
        said: list[Expr] = []
        for leaf in leaves(expr):
            if not isinstance(leaf, (Gen, Select, VarScopeBegin)):
                said.append(leaf)
                continue
            if said:
                steps.append(Say(tuple(said)))
                said = []
            steps.append(Step(leaf, self._declare(leaf), promises, seen))
        if said:
            steps.append(Say(tuple(said)))
        self._put(*steps)

    def fork(self, names: Sequence[str]) -> tuple[StreamExecutor, ...]:
        """Queue a fork. Children may be used at once; they begin when their parent has come here."""
        children = tuple(
            StreamExecutor(self.run, Transcript(self.run.backend.render_chat), (*self.path, name)) for name in names
        )
        for child in children:
            child.variables = dict(self.variables)
        self._put(Fork(children))
        return children

    def append(self, children: tuple[StreamExecutor, ...]) -> None:
        """Queue an append of what `children` have said. They must be idle."""
        self._put(Append(children))

    def ask(self, compute: Callable[[], T]) -> Outcome[T]:
        """The result of `compute` once all that was submitted before is done."""
        answer: Outcome[T] = Outcome()
        if self.idle:  # nothing can change it meanwhile
            _compute(compute, answer)
        else:
            self._put(Ask(compute, answer))
        return answer

    def drained(self) -> Outcome[None]:
        """When all that was submitted before is done."""
        return self.ask(_nothing)

    @property
    def idle(self) -> bool:
        """Whether all that was submitted is done."""
        return not self._steps

    def expect(self, name: str) -> Variable:
        """The variable `name`, perhaps before the program has come to it."""
        with self._lock:
            variable = self.variables.get(name) or self._expected.get(name)
            if variable is None:
                variable = self._expected[name] = Variable()
                if self._ended:
                    self.loop.call_soon_threadsafe(variable.never, name, self.error)
            return variable

    def _declare(self, expr: Gen | Select | VarScopeBegin) -> Variable:
        if expr.name is None:
            return Variable()
        with self._lock:
            variable = self._named(expr.name)
            if isinstance(expr, Gen) and expr.reasoning is not None:
                variable.reasoning = self._named(f"{expr.name}_reasoning_content")
            return variable

    def _named(self, name: str) -> Variable:
        variable = self.variables[name] = self._expected.pop(name) if name in self._expected else Variable()
        return variable

    def fail(self, error: BaseException) -> None:
        """Execute nothing more, cancel what runs; what waits gets `error`. The first failure stands."""
        with self._lock:
            if self._ended or self.error is not None:
                return
            self.error = error
        self.loop.call_soon_threadsafe(self._stop)

    def _put(self, *steps: Say | Step | Ask | Fork | Append) -> None:
        self._steps.extend(steps)
        if on_language_loop():
            self._wake()
        else:
            self.loop.call_soon_threadsafe(self._wake)

    # ------------------------------------------------------------------ on the language's loop

    def begin(self, parent: StreamExecutor, group: str) -> None:
        """A fork starts from what its parent has said. group: name shared with its siblings, "" for none."""
        self.transcript = parent.transcript.copy()
        self.fork_mark = self.transcript.mark()
        self.frontier, self._extends, self._group = parent.frontier, parent._extends, group
        self._begun = True
        self._wake()

    def _stop(self) -> None:
        self._begun = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self.loop.call_soon(self._wake)  # a task cancelled before its first turn has drained nothing

    def end(self) -> None:
        """The program has ended: readers of text that will not come are let go."""
        with self._lock:
            self._ended = True
        for name, variable in self._expected.items():
            variable.never(name, self.error)
        if self.run.stream:
            self._publish()
            self.text_feed.close(self.error)

    def _wake(self) -> None:
        if self._begun and not self.idle and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._steps:
            step = self._steps[0]
            if isinstance(step, Ask):
                self._steps.popleft()  # first: whoever is answered may rely on our being idle
                _compute(step.compute, step.answer)
                continue
            try:
                if self.error is not None:
                    pass
                elif isinstance(step, Step) and not isinstance(step.expr, VarScopeBegin):
                    await self._call(step.expr, step.variable, step)
                else:
                    self._execute(step)
                if self.run.stream and self.error is None and not isinstance(step, Fork):
                    self._publish()
            except asyncio.CancelledError:
                # `fail` has set the error and cancelled us; else the loop itself is closing.
                self.error = self.error or RequestCancelledError("the event loop was closed")
            except Exception as error:
                logger.debug("state %s of %s failed", "/".join(self.path), self.run.ledger.name, exc_info=error)
                self.error = self.error or error
            if self.error is not None:
                self._give_up(step)
            self._steps.popleft()
        self._task = None  # so that it goes now, and not when the state does

    def _give_up(self, step: Say | Step | Fork | Append) -> None:
        assert self.error is not None
        for scope in self._scopes:
            scope.variable.fail(self.error)
        if isinstance(step, Step):
            step.variable.fail(self.error)
        elif isinstance(step, Fork):
            for child in step.children:
                child.fail(self.error)

    def _execute(self, step: Say | Step | Fork | Append) -> None:
        """A step that waits for nothing."""
        if isinstance(step, Say):
            for expr in step.exprs:
                self._say_expr(expr)
        elif isinstance(step, Step):  # a scope begins
            assert isinstance(step.expr, VarScopeBegin)
            self._scopes.append(OpenScope(step.expr.name, len(self.transcript.text()), step.variable))
        elif isinstance(step, Fork):
            first = step.children[0]
            group = f"{self.run.id}/{'/'.join(first.path)}" if len(step.children) > 1 else ""
            for child in step.children:
                child.begin(self, group)
        else:
            for child in step.children:
                self.transcript.append(child.transcript, child.fork_mark)
                self.frontier = tuple({*self.frontier, *child.frontier})

    def _say_expr(self, expr: Expr) -> None:
        match expr:
            case Text(value=value):
                self.transcript.add(value)
            case RoleBegin(role=role):
                self.transcript.begin(role)
            case RoleEnd(role=role):
                self.transcript.end(role)
            case Tools(schemas=schemas):
                self.transcript.tools = schemas
            case VarScopeEnd(name=name):
                if not self._scopes or self._scopes[-1].name != name:
                    raise InvalidRequestError(f"variable scope {name!r} ends, but it is not the innermost open one")
                scope = self._scopes.pop()
                scope.variable.set(self.transcript.text()[scope.start :])
            case other:
                raise InvalidRequestError(f"cannot execute {other!r}")

    async def _call(self, expr: Gen | Select, variable: Variable, step: Step) -> None:
        prompt = self.transcript.prompt(messages=self.run.backend.takes_messages)
        run, ledger = self.run, self.run.ledger
        watch = CallWatch(
            expr.name or ("gen" if isinstance(expr, Gen) else "select"),
            (*self.path, *(scope.name for scope in self._scopes)),
            None,
        )
        call = variable.call = self._record(expr, watch, step)
        promise = step.promises.for_call(expr.slo, run.clock())
        watch.slo = promise.slo
        sent = self._plan(call, promise)
        watch.planned = sent.planned
        live = run.stream or variable.feed.is_read
        context = calls.Context(
            run.backend, prompt, sent.slo, run.program_id, watch, sent.hints, run.slo_class, sent.enforced, live
        )
        why = "budget" if promise.spent else ""
        try:
            answer = await self._answer(context, expr, promise, variable)
        except BaseException as error:
            told = self.error if isinstance(error, asyncio.CancelledError) and self.error is not None else error
            ledger.rows.append(watch.report(error=told, why=why, began=ledger.started))
            raise
        row = watch.report(answer.finish_reason, why=why, began=ledger.started)
        ledger.rows.append(row)
        call.end(run.clock() - ledger.started, row, watch.engine)
        self._say(variable, answer.rest, answer.meta)
        if variable.reasoning is not None:
            variable.reasoning.set("" if answer.reasoning is None else answer.reasoning, answer.meta)
        variable.set(answer.value, answer.meta)

    def _record(self, expr: Gen | Select, watch: CallWatch, step: Step) -> Call:
        """The call takes its place in the run's graph."""
        graph = self.run.graph
        visit = self._visits[watch.call] = self._visits.get(watch.call, 0) + 1
        limit = 1
        if isinstance(expr, Gen):
            limit = expr.sampling.max_tokens or self.run.sampling.max_tokens or DEFAULT_MAX_TOKENS
        call = Call(
            index=len(graph.calls),
            site=site_of(watch.path, watch.call, visit),
            name=watch.call,
            path=watch.path,
            after=tuple(sorted({*self.frontier, *step.seen})),
            extends=self._extends,
            max_tokens=limit,
            deadline=expr.slo.deadline if expr.slo is not None else None,
            begun=self.run.clock() - self.run.ledger.started,
        )
        graph.calls.append(call)
        self.frontier, self._extends = (call.index,), call.index
        return call

    def _plan(self, call: Call, promise: Promise) -> Sent:
        group, self._group = self._group, ""
        pauses, session = NO_PAUSES, self.run.session
        if session is not None:
            pauses = session.pauses()
            group = group or (session.group() if call.index == 0 else "")
        if self.run.planner is None:
            keep = unseen(pauses)
            return Sent(promise.slo, Hints(group=group, keep_s=keep) if group or keep is not None else None)
        return self.run.planner.send(call, promise, self.run.due - self.run.clock(), group, pauses)

    async def _answer(
        self, context: calls.Context, expr: Gen | Select, promise: Promise, variable: Variable
    ) -> calls.Answer:
        if self.run.tracing:
            return calls.unknown(context, expr)
        on_miss = promise.slo.on_miss if promise.slo is not None else "finish"
        if promise.spent and on_miss == "truncate":
            return calls.spent(expr)
        if promise.spent and on_miss == "raise":
            raise DeadlineMissedError(
                f"program {self.run.ledger.name} had no time left for call {context.watch.call!r}: its deadline of "
                f"{self.run.ledger.deadline} s has passed"
            )
        try:
            return await self._ask(context, expr, variable)
        except OverloadedError:
            if context.watch.planned is None:
                raise
            # Refused for a deadline that was only our plan: once more with the true one.
            context.watch.planned = None
            return await self._ask(replace(context, slo=promise.slo, enforced=None), expr, variable)
        except DeadlineMissedError:
            if on_miss != "truncate" or isinstance(expr, Gen):
                raise
            return calls.spent(expr)

    def _ask(self, context: calls.Context, expr: Gen | Select, variable: Variable) -> Awaitable[calls.Answer]:
        if isinstance(expr, Select):
            return calls.choose(context, expr)
        sampling = expr.sampling.over(self.run.sampling)
        return calls.generate(context, expr, sampling, partial(self._say, variable))

    def _say(self, variable: Variable, text: str, meta: Any) -> None:
        """The model's new text, to the transcript and to whoever reads along."""
        variable.meta = meta
        if not text:
            return
        self.transcript.add(text)
        variable.feed.push(text, meta)
        if self.run.stream:
            self.text_feed.push(text)
            self._published += len(text)

    def _publish(self) -> None:
        """Bring the feed of the whole text up to date."""
        try:
            text = self.transcript.text()
        except InvalidRequestError:
            return  # the template cannot show this yet, a system message alone perhaps; the next step tries again
        if len(text) > self._published:
            self.text_feed.push(text[self._published :])
        self._published = len(text)


def _nothing() -> None:
    """What is asked of a state only to learn that its turn has come."""


def _compute(compute: Callable[[], Any], answer: Outcome[Any]) -> None:
    try:
        answer.set(compute())
    except BaseException as error:
        answer.fail(error)
