"""What a program is given as `s`: append to it, read from it, fork it."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.lang.executor import StreamExecutor
from superinfer.lang.ir import (
    Expr,
    ExprList,
    RoleBegin,
    RoleEnd,
    VarScopeBegin,
    VarScopeEnd,
    leaves,
    to_expr,
)
from superinfer.lang.loop import on_language_loop
from superinfer.lang.outcome import Outcome
from superinfer.lang.promise import Promises, check_deadline, check_slo
from superinfer.lang.report import SLOReport
from superinfer.lang.run import Run
from superinfer.lang.variable import Chunk, Variable, aread, read
from superinfer.runtime.slo import SLO

T = TypeVar("T")

# The run whose program body is executing here: it may look away from a stream without giving the program up.
inside_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("inside_run", default=None)


class ProgramState:
    """The state of one running program, or of one fork of it. Use it from one thread or task at a time."""

    def __init__(self, executor: StreamExecutor, promises: Promises) -> None:
        self.stream_executor = executor
        self.ret_value: Any = None
        self._promises = promises
        self._forks = 0
        self._open_scopes: list[str] = []

    # ------------------------------------------------------------------ saying

    def __iadd__(self, other: object) -> ProgramState:
        """Append text or an expression; nothing waits. Raises InvalidRequestError for anything else."""
        if other is not self:  # `s += s.user(...)`: the method has appended it
            self.stream_executor.submit(to_expr(other), self._promises)
        return self

    def _role(self, role: str, content: str | Expr | None) -> Any:
        if content is None:
            return self._block(RoleBegin(role), RoleEnd(role))
        self += ExprList((RoleBegin(role), *leaves(to_expr(content)), RoleEnd(role)))
        return self

    @contextmanager
    def _block(self, begin: Expr, end: Expr) -> Iterator[ProgramState]:
        self.stream_executor.submit(begin, self._promises)
        try:
            yield self
        finally:
            self.stream_executor.submit(end, self._promises)

    def system(self, content: str | Expr | None = None) -> Any:
        """`with s.system(): ...`, or append a whole system message."""
        return self._role("system", content)

    def user(self, content: str | Expr | None = None) -> Any:
        """`with s.user(): ...`, or append a whole user message."""
        return self._role("user", content)

    def assistant(self, content: str | Expr | None = None) -> Any:
        """`with s.assistant(): ...`, or append a whole assistant message."""
        return self._role("assistant", content)

    def tool(self, content: str | Expr | None = None) -> Any:
        """`with s.tool(): ...`, or append a tool's result."""
        return self._role("tool", content)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[ProgramState]:
        """`with s.var_scope(name): ...`: variable `name` becomes all text appended inside."""
        self._open_scopes.append(name)
        try:
            with self._block(VarScopeBegin(name), VarScopeEnd(name)):
                yield self
        finally:
            self._open_scopes.pop()

    @contextmanager
    def slo(self, slo: SLO | None = None, *, deadline: float | None = None) -> Iterator[ProgramState]:
        """Calls appended inside inherit `slo`, and have `deadline` seconds from here for all of them together."""
        outer = self._promises
        self._promises = self._within(check_slo(slo), check_deadline(deadline))
        try:
            yield self
        finally:
            self._promises = outer

    def _within(self, slo: SLO | None, deadline: float | None) -> Promises:
        return self._promises.within(slo, deadline, now=self.stream_executor.run.clock())

    # ------------------------------------------------------------------ reading

    def get_var(self, name: str) -> Any:
        """The variable's value, once its call is done. Raises KeyError, and what ended the call."""
        with self._telling():
            variable = self._variable(name)
            value = self._wait(variable.outcome, f"await s.get({name!r})")
        self._saw(variable)
        return value

    __getitem__ = get_var

    async def get(self, name: str) -> Any:
        """Async twin of `s[name]`."""
        with self._telling():
            variable = self._variable(name)
            value = await variable.outcome.get()
        self._saw(variable)
        return value

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What is raised within tells the program what made its state fail, if anything did."""
        try:
            yield
        except Exception as error:
            self.stream_executor.run.tell(error)
            raise

    def _saw(self, variable: Variable | None = None) -> None:
        """The program knows this call's outcome, or that of all its state has made so far: what follows comes after."""
        executor = self.stream_executor
        if variable is None:
            executor.run.graph.saw(*executor.frontier)
        elif variable.call is not None:
            executor.run.graph.saw(variable.call.index)

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable; the text is not changed."""
        self.stream_executor.variables[name] = Variable.of(value)

    __setitem__ = set_var

    def __contains__(self, name: object) -> bool:
        return name in self.stream_executor.variables

    def get_meta_info(self, name: str) -> Any:
        """What is known of the call that made `name`: finish_reason, prompt_tokens, completion_tokens, cached_tokens,
        logprobs, report; for a select the log probabilities it went by. A list of these where n > 1."""
        self.get_var(name)
        return self._variable(name).meta

    def text(self) -> str:
        """All text so far, as the model reads it. After a failure: up to there."""
        executor = self.stream_executor
        text = self._wait(executor.ask(lambda: executor.transcript.text()), "await s.drain() first")
        self._saw()
        return text

    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, each with role and content."""
        executor = self.stream_executor
        messages = self._wait(executor.ask(lambda: executor.transcript.messages()), "await s.drain() first")
        self._saw()
        return messages

    def sync(self) -> None:
        """Wait until all that was appended is done. Raises nothing: see `error`."""
        self._wait(self.stream_executor.drained(), "await s.drain()")
        self._saw()

    async def drain(self) -> None:
        """Async twin of `sync`; after it `text`, `messages`, `error` and `slo_report` do not block."""
        await self.stream_executor.drained().get()
        self._saw()

    def error(self) -> BaseException | None:
        """What made this state fail, if anything did."""
        self.sync()
        executor = self.stream_executor
        if executor.error is not None:
            executor.run.tell(executor.error)
        return executor.error

    def slo_report(self) -> SLOReport:
        """What was promised to each call of the program, forks included, and what happened.

        Covers the calls that have ended; in a program that is not asynchronous it waits for this state's own first.
        """
        if not (self._is_async_body() or on_language_loop()):
            self.sync()
        return self.stream_executor.run.ledger.report()

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Text as it comes: a variable's, or all of it (within the program: up to here). Raises what made the state
        fail, and KeyError for a variable that is not there, unless a program with stream=True may yet make it.

        Leaving the loop early, from outside the program, cancels a program that was started with stream=True.
        """
        if var_name is None and self._has_whole_text():
            yield self.text()
            return
        with self._telling():
            for chunk in read(self._feed(var_name), self._abandoned()):
                yield chunk.text
        self._saw(self.stream_executor.variables.get(var_name) if var_name is not None else None)

    @overload
    def text_async_iter(self, var_name: str | None = None) -> AsyncIterator[str]: ...
    @overload
    def text_async_iter(self, var_name: str, return_meta_data: bool) -> AsyncIterator[Any]: ...
    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """Async twin of `text_iter`. return_meta_data: yield (text, what is known of the call by then)."""
        if return_meta_data and var_name is None:
            raise InvalidRequestError("return_meta_data=True needs the name of a variable")
        if var_name is None and self._has_whole_text():
            await self.drain()
            yield self.text()
            return
        last = Chunk("")
        with self._telling():
            async for chunk in aread(self._feed(var_name), self._abandoned()):
                last = chunk
                yield (chunk.text, chunk.meta) if return_meta_data else chunk.text
        if return_meta_data and var_name is not None and (meta := self._variable(var_name).meta) is not last.meta:
            yield "", meta

    def _feed(self, name: str | None) -> Any:
        return self.stream_executor.text_feed if name is None else self._variable(name).feed

    def _has_whole_text(self) -> bool:
        """Whether `text` is all that there is to read: nothing is streamed, or the reader is the program itself, which
        would wait for its own end."""
        run = self.stream_executor.run
        return not run.stream or inside_run.get() is run

    def _abandoned(self) -> Callable[[], object]:
        run = self.stream_executor.run
        return run.cancel if run.stream and inside_run.get() is not run else lambda: None

    def _variable(self, name: str) -> Variable:
        executor = self.stream_executor
        if name in self._open_scopes:
            raise InvalidRequestError(f"variable scope {name!r} is still open; read it after the `with` block")
        variable = executor.variables.get(name)
        if variable is None and executor.run.stream and inside_run.get() is not executor.run:
            return executor.expect(name)  # the program runs beside us and may not have come to it yet
        if variable is None:
            if executor.error is not None:
                raise executor.error
            raise KeyError(f"{name!r} is not a variable of this state; it has {sorted(executor.variables)}")
        return variable

    def _is_async_body(self) -> bool:
        run = self.stream_executor.run
        return run.is_async and inside_run.get() is run

    def _wait(self, outcome: Outcome[T], twin: str) -> T:
        if not outcome.done and (self._is_async_body() or on_language_loop()):
            raise RuntimeError(f"this would block the event loop until a call is done; use {twin}")
        return outcome.result()

    # ------------------------------------------------------------------ forking

    def fork(self, size: int = 1, position_ids_offset: Sequence[int] | None = None) -> ProgramStateGroup:
        """`size` independent continuations of this state, sharing all text before. Nothing waits."""
        if position_ids_offset is not None:
            raise UnsupportedError("position_ids_offset: positions follow the text; leave it out")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidRequestError(f"fork size={size!r} must be an integer of at least 1")
        self._forks += 1
        label = "fork" if self._forks == 1 else f"fork{self._forks}"
        children = self.stream_executor.fork([f"{label}[{i}]" for i in range(size)])
        return ProgramStateGroup([ProgramState(child, self._promises) for child in children], self)

    def copy(self, position_ids_offset: Sequence[int] | None = None) -> _Copy:
        """`with s.copy() as c:` (or `async with`): a fork of one, joined at the end."""
        return _Copy(self.fork(1, position_ids_offset))

    def __repr__(self) -> str:
        executor = self.stream_executor
        state = f"failed: {executor.error!r}" if executor.error else "idle" if executor.idle else "running"
        return f"<ProgramState of {executor.run.ledger.name}, {state}, variables {sorted(executor.variables)}>"


class ProgramStateGroup:
    """The forks of one state. `group += x` appends to each: one expression, a list, or what a function of the index
    gives."""

    def __init__(self, states: list[ProgramState], src_state: ProgramState) -> None:
        self.states = states
        self.src_state = src_state

    def join(self, mode: str = "gather_variable") -> None:
        """Wait for the forks and bring what they made back to the state they came from.

        gather_variable: each variable that is new in the forks becomes a list, one value per fork that has it.
        concate_and_append: what the forks have said is appended, one after the other.
        Raises what made a fork fail.
        """
        _check_mode(mode)
        for state in self.states:
            state.sync()
        self._merge(mode)

    async def ajoin(self, mode: str = "gather_variable") -> None:
        """Async twin of `join`."""
        _check_mode(mode)
        for state in self.states:  # all run by themselves: the last of them is waited for
            await state.drain()
        self._merge(mode)

    def _merge(self, mode: str) -> None:
        executors = tuple(state.stream_executor for state in self.states)
        errors = [executor.error for executor in executors if executor.error is not None]
        for error in errors:
            self.src_state.stream_executor.run.tell(error)
        if errors:
            raise errors[0]
        source = self.src_state.stream_executor
        if mode == "concate_and_append":
            source.append(executors)
            return
        known = set(source.variables)
        gathered: dict[str, list[Any]] = {}
        for executor in executors:
            for name, variable in executor.variables.items():
                if name not in known and variable.done:
                    gathered.setdefault(name, []).append(variable.outcome.result())
        for name, values in gathered.items():
            self.src_state.set_var(name, values)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, value: ProgramState) -> None:
        if self.states[index] is not value:  # `forks[i] += x` ends in this assignment
            raise InvalidRequestError("a fork cannot be replaced; append to it with forks[i] += ...")

    def __iadd__(self, other: object) -> ProgramStateGroup:
        if isinstance(other, (list, tuple)):
            if len(other) != len(self.states):
                raise InvalidRequestError(f"{len(other)} expressions for {len(self.states)} forks; give one for each")
            each = list(other)
        elif callable(other):
            each = [other(i) for i in range(len(self.states))]
        else:
            each = [other] * len(self.states)
        for state, expr in zip(self.states, each, strict=True):
            state += expr
        return self


class _Copy:
    """A fork of one as a block."""

    def __init__(self, group: ProgramStateGroup) -> None:
        self._group = group

    def __enter__(self) -> ProgramState:
        return self._group[0]

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self._group.join()

    async def __aenter__(self) -> ProgramState:
        return self._group[0]

    async def __aexit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            await self._group.ajoin()


def _check_mode(mode: str) -> None:
    if mode not in ("gather_variable", "concate_and_append"):
        raise InvalidRequestError(f"join mode={mode!r} must be 'gather_variable' or 'concate_and_append'")
