"""Runs the expressions of one state in order, as a task on the language's loop.

Programs submit from their own thread or loop and never wait for it; everything a state holds changes on the language's
loop only. A fork is a step too: children begin from what their parent has said when the step's turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from superinfer.errors import (
    DeadlineMissedError,
    InvalidRequestError,
    NothingToExtendError,
    OverloadedError,
    QueueFullError,
    RequestCancelledError,
)
from superinfer.lang import calls
from superinfer.lang.ahead import CallsAhead, group_of
from superinfer.lang.callgraph import Call, site_of
from superinfer.lang.ir import (
    Expr,
    Gen,
    Select,
    VarScopeBegin,
    VarScopeEnd,
    leaves,
)
from superinfer.lang.loop import language_loop, on_language_loop
from superinfer.lang.outcome import Outcome
from superinfer.lang.planner import NO_PAUSES, Sent, hints_unseen, unseen
from superinfer.lang.promise import Promise, Promises
from superinfer.lang.prompt import NO_PROMPT, Transcript
from superinfer.lang.report import CallWatch
from superinfer.lang.sampling import DEFAULT_MAX_TOKENS, Sampling
from superinfer.lang.steps import Append, Ask, Fork, OpenScope, Say, Step
from superinfer.lang.unknown import DataDependent
from superinfer.lang.variable import Feed, Variable
from superinfer.lang.written import SentCall, Written, can_be_extended, new_mark, say

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
        self.steps: deque[Say | Step | Ask | Fork | Append] = deque()  # the first is the one being executed
        self._task: asyncio.Task[None] | None = None
        self.scopes: list[OpenScope] = []
        self._published = 0
        self._expected: dict[str, Variable] = {}
        self._lock = threading.Lock()
        self.frontier: tuple[int, ...] = ()  # calls that whatever this state says next comes after
        self._extends: int | None = None  # the call from whose text its next one goes on
        self._visits: dict[str, int] = {}  # how often it has made a call of a name
        self._group = ""  # of its first call, in a fork with siblings
        self.written = Written(transcript.copy()) if run.backend.extends and not run.tracing else None
        self.ahead = CallsAhead(self)
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
        return not self.steps

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
        self.steps.extend(steps)
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
        self.written = parent.written.copy() if parent.written is not None else None
        self.ahead.begin()
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
        self.ahead.look()
        if self._begun and not self.idle and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self.steps:
            step = self.steps[0]
            if isinstance(step, Ask):
                self._pop()  # first: whoever is answered may rely on our being idle
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
            self._pop()
        self._task = None  # so that it goes now, and not when the state does

    def _pop(self) -> None:
        self.steps.popleft()
        self.ahead.popped()

    def _give_up(self, step: Say | Step | Fork | Append) -> None:
        assert self.error is not None
        self.ahead.close()
        for scope in self.scopes:
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
            self.scopes.append(OpenScope(step.expr.name, len(self.transcript.text()), step.variable))
        elif isinstance(step, Fork):
            for child in step.children:
                child.begin(self, group_of(step, self.run))
        else:
            for child in step.children:
                self.transcript.append(child.transcript, child.fork_mark)
                if self.written is not None:
                    self.written.outline.append(child.transcript, child.fork_mark)
                self.frontier = tuple({*self.frontier, *child.frontier})

    def _say_expr(self, expr: Expr) -> None:
        if say(self.transcript, expr):
            if self.written is not None:
                say(self.written.outline, expr)
            return
        match expr:
            case VarScopeEnd(name=name):
                if not self.scopes or self.scopes[-1].name != name:
                    raise InvalidRequestError(f"variable scope {name!r} ends, but it is not the innermost open one")
                scope = self.scopes.pop()
                scope.variable.set(self.transcript.text()[scope.start :])
            case other:
                raise InvalidRequestError(f"cannot execute {other!r}")

    async def _call(self, expr: Gen | Select, variable: Variable, step: Step) -> None:
        begun = self.ahead.take(step)
        run, ledger = self.run, self.run.ledger
        watch = CallWatch(
            expr.name or ("gen" if isinstance(expr, Gen) else "select"),
            (*self.path, *(scope.name for scope in self.scopes)),
            None,
        )
        call = variable.call = self._record(expr, watch, step)
        promise = step.promises.for_call(expr.slo, run.clock())
        watch.slo = promise.slo
        sent = self._plan(call, promise)
        watch.planned = sent.planned
        live = run.stream or variable.feed.is_read
        context = calls.Context(
            run.backend, NO_PROMPT, sent.slo, run.program_id, watch, sent.hints, run.slo_class, sent.enforced, live
        )
        why = "budget" if promise.spent else ""
        try:
            answer = await self._answer(context, step, promise, begun)
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

    def plan_ahead(self, step: Step, group: str, same: int) -> Sent:
        """What goes to the engine with a call that is sent before its turn, and is promised nothing.

        group: as its first call in a fork. same: calls of its name that are to come before it.
        """
        name = step.expr.name or "gen"
        path = (*self.path, *(scope.name for scope in self.scopes))
        site = site_of(path, name, self._visits.get(name, 0) + same + 1)
        return self._plan(Call(-1, site, name, path, (), None, 1, None, 0.0), Promise(None), group)

    def _plan(self, call: Call, promise: Promise, group: str | None = None) -> Sent:
        if group is None:
            group, self._group = self._group, ""
        pauses, session = NO_PAUSES, self.run.session
        if session is not None:
            pauses = session.pauses()
            group = group or (session.group() if call.index == 0 else "")
        if self.run.planner is None:
            return Sent(promise.slo, hints_unseen(group, unseen(pauses), promise.shared))
        return self.run.planner.send(call, promise, self.run.due - self.run.clock(), group, pauses)

    async def _answer(
        self, context: calls.Context, step: Step, promise: Promise, begun: SentCall | None
    ) -> calls.Answer:
        expr = step.expr
        assert not isinstance(expr, VarScopeBegin)
        if self.run.tracing:
            return calls.unknown(context, expr)
        on_miss = promise.slo.on_miss if promise.slo is not None else "finish"
        if promise.spent and on_miss == "truncate":
            return calls.spent(expr, self.run.sampling)
        if promise.spent and on_miss == "raise":
            raise DeadlineMissedError(
                f"program {self.run.ledger.name} had no time left for call {context.watch.call!r}: its deadline of "
                f"{self.run.ledger.deadline} s has passed"
            )
        try:
            try:
                return await self._ask(context, step, begun)
            except (NothingToExtendError, QueueFullError):
                if begun is None:
                    raise
                return await self._ask(context, step)  # sent ahead in vain; what it goes on from is known by now
        except OverloadedError:
            if context.watch.planned is None:
                raise
            # Refused for a deadline that was only our plan: once more with the true one.
            context.watch.planned = None
            return await self._ask(replace(context, slo=promise.slo, enforced=None), step)
        except DeadlineMissedError:
            if on_miss != "truncate" or isinstance(expr, Gen):
                raise
            return calls.spent(expr, self.run.sampling)

    async def _ask(self, context: calls.Context, step: Step, begun: SentCall | None = None) -> calls.Answer:
        """Send a call, unless it has been, and read its answer."""
        expr = step.expr
        if isinstance(expr, Select) or self.written is None or (isinstance(expr, Gen) and expr.reasoning is not None):
            context = replace(context, prompt=self.transcript.prompt(messages=self.run.backend.takes_messages))
        if isinstance(expr, Select):
            answer = await calls.choose(context, expr)
            if self.written is not None:
                self.written.outline.add(answer.rest)
            return answer
        assert isinstance(expr, Gen)
        sampling, emit = expr.sampling.over(self.run.sampling), partial(self._say, step.variable)
        if self.written is None:
            stream = self.run.backend.stream(calls.request_of(context, expr, sampling))
            return await calls.generate(context, expr, sampling, emit, stream)
        if begun is None:
            begun = self._begin(context, step, sampling)
        self.ahead.follow(begun)
        try:
            answer = await calls.generate(context, expr, sampling, emit, begun.begun.deltas())
        finally:
            begun.begun.close()
        self._note(self.written, begun, answer)
        return answer

    def _begin(self, context: calls.Context, step: Step, sampling: Sampling) -> SentCall:
        """Send a call whose turn has come: the tokens that the engine has, and what was said behind them."""
        expr, written, backend = step.expr, self.written, self.run.backend
        assert isinstance(expr, Gen) and written is not None
        keeps = backend.keeps_answers or self.transcript.is_plain
        rest = written.rest() if keeps else None
        if rest is None:
            self.written = written = Written(self.transcript.copy())
            whole = self.transcript.prompt()
            prompt = backend.encode(whole.text, special=whole.add_special)
            text = whole.text
        else:
            prompt = [*written.ids, *backend.encode(rest, special=False)]
            text = written.text + rest
        mark = new_mark() if keeps and can_be_extended(expr, sampling) else ""
        return SentCall(step, backend.begin(calls.request_of(context, expr, sampling, prompt)), text, mark)

    def _note(self, written: Written, call: SentCall, answer: calls.Answer) -> None:
        """What the engine has now."""
        if call.mark and answer.finish_reason in ("stop", "length"):
            ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
            before = written.ids if call.extends else ()
            written.answered(call.text, call.mark, [*before, *call.begun.prompt, *ids])
        else:
            copy = self.transcript.copy()
            copy.add(answer.rest)
            self.written = Written(copy)

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
