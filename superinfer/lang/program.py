"""`@function`: programs, and the ways to run one or many."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, overload

from superinfer.errors import InvalidRequestError, RequestCancelledError, UnsupportedError
from superinfer.lang.backend import Backend, resolve_backend
from superinfer.lang.batch import as_tasks, as_tasks_here, check_at_once, check_items, in_threads
from superinfer.lang.callgraph import CallGraph
from superinfer.lang.dry_run import constant_prefix, trace
from superinfer.lang.history import History
from superinfer.lang.loop import Threads, language_loop, on_language_loop
from superinfer.lang.options import TAKEN_NAMES, RunOptions
from superinfer.lang.plan import ProgramPlan, plan
from superinfer.lang.planner import Planner
from superinfer.lang.promise import Promises, check_deadline, check_slo
from superinfer.lang.report import Ledger
from superinfer.lang.run import Run
from superinfer.lang.state import ProgramState, inside_run
from superinfer.lang.trace import ProgramTrace
from superinfer.runtime.slo import SLO

# Where `arun` runs programs that are no `async def`; apart from the loop's default threads, which they could fill up.
_THREADS = Threads(96, "superinfer-program")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Function:
    """A program. `run`, `run_batch` and their asynchronous twins take the program's arguments by position or name,
    and by name also (see RunOptions): max_new_tokens (128), temperature (1.0), stop and the other sampling arguments
    of `gen`, which hold where a `gen` says nothing; `backend`; `deadline`; `slo`; `plan` (True): split the deadline
    among the calls by what was learnt; `session`: the Session that the run is a turn of. An argument of the program
    that is named `deadline`, `slo`, `plan` or `session` is the program's own.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        deadline: float | None = None,
        slo: SLO | None = None,
        slo_class: str = "",
        history: History | str | os.PathLike[str] | None = None,
        bound: Mapping[str, Any] | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Raises InvalidRequestError for a function without a state argument, with one named like a run option, or with
        a `yield`."""
        self.func = func
        self.name = getattr(func, "__name__", repr(func))
        self.__name__, self.__doc__ = self.name, func.__doc__
        self.deadline = check_deadline(deadline)
        self.slo = check_slo(slo)
        self.slo_class = slo_class
        self.history = History.of(history)
        self.planner = Planner(self.name, self.history)
        self.bound = dict(bound or {})
        self.backend = backend
        self.is_async = inspect.iscoroutinefunction(func)
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise InvalidRequestError(
                f"program {self.name} has a `yield`, so that calling it runs nothing; return a value, or read the text "
                "as it comes with run(stream=True) or astream()"
            )
        self._last: Ledger | None = None
        self.signature = inspect.signature(func)
        parameters = list(self.signature.parameters)
        if not parameters:
            raise InvalidRequestError(f"program {self.name} takes no argument; its first one is the state, `s`")
        self.arg_names = parameters[1:]
        for name in self.arg_names:
            if name in TAKEN_NAMES:
                raise InvalidRequestError(f"argument {name!r} of program {self.name} is an option of run(); rename it")

    def bind(self, **arguments: Any) -> Function:
        """This program with some arguments given. Raises InvalidRequestError for one that it does not have."""
        for name in arguments:
            if name not in self.arg_names:
                raise InvalidRequestError(f"program {self.name} has no argument {name!r}; it has {self.arg_names}")
        return self._again(bound={**self.bound, **arguments})

    def _again(self, **changes: Any) -> Function:
        """This program with something changed; it learns and plans with what this one has learnt."""
        given = {name: getattr(self, name) for name in ("deadline", "slo", "slo_class", "history", "bound", "backend")}
        twin = Function(self.func, **{**given, **changes})
        twin.planner = self.planner
        return twin

    def trace(self, *args: Any, **kwargs: Any) -> CallGraph:
        """Run the program's Python without a model and return its calls: which come after which, in forks and joins.

        Arguments not given are unknown texts. The trace stops, and says so, where the program looks into a text that
        only a model could give. Raises what the program raises before that.
        """
        kwargs.pop("backend", None)  # as SGLang's tracer is called; nothing is asked of it
        graph, _ = trace(self, args, kwargs)
        self.planner.learn_trace(graph)
        return graph

    def plan(self, *args: Any, deadline: float | None = None, **kwargs: Any) -> ProgramPlan:
        """What a deadline (seconds; default: the program's own) means for each call, and whether it can be kept.

        Traces the program, with these arguments, and goes by what earlier runs took; nothing is sent.
        """
        deadlines = [d for d in (self.deadline, check_deadline(deadline)) if d is not None]
        return plan(self.planner, self.trace(*args, **kwargs), min(deadlines, default=None))

    def compile(self, *, backend: Backend | None = None) -> Function:
        """The program, traced: its deadlines are planned from the first run on. `backend`: what it runs on from now."""
        self.trace()
        return self._again(backend=backend or self.backend)

    def cache(self, backend: Backend | None = None) -> None:
        """Compute the KV cache of what the program says before its first call or argument, so that runs find it there.

        Raises UnsupportedError for a program that begins with either, or on a backend that keeps no KV cache.
        """
        chosen = resolve_backend(backend or self.backend)
        prefix = constant_prefix(self, chosen.render_chat)
        if prefix is None:
            raise UnsupportedError(f"program {self.name} begins with an argument or a call: there is nothing to cache")
        language_loop().run(chosen.cache_prefix(prefix))

    @property
    def last_trace(self) -> ProgramTrace | None:
        """The calls of the run that was started last, those that have ended by now; None before the first."""
        return ProgramTrace(self._last.report()) if self._last is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`run`; inside another program, with its state as first argument, the same state is continued."""
        if not (args and isinstance(args[0], ProgramState)):
            return self.run(*args, **kwargs)
        state, *rest = args
        if self.is_async:
            return self._acontinue(state, rest, kwargs)
        with state.slo(self.slo, deadline=self.deadline):
            return self.func(state, *rest, **{**self.bound, **kwargs})

    async def _acontinue(self, state: ProgramState, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with state.slo(self.slo, deadline=self.deadline):
            return await self.func(state, *args, **{**self.bound, **kwargs})

    # ------------------------------------------------------------------ one run

    def run(self, *args: Any, stream: bool = False, **kwargs: Any) -> ProgramState:
        """Run to the end; with stream=True return at once, to read with `text_iter` or `text_async_iter`.

        Raises what the program raises. A call that fails raises where its variable is read; one that is never read
        leaves its error in `state.error()` and a warning. Raises RuntimeError within an `async def` program: await
        `arun` there.
        """
        self._check_may_wait("run", stream)
        options = RunOptions.take(kwargs, self.arg_names)
        arguments = self._arguments(args, kwargs)
        state = self._new_state(options, stream=stream)
        if stream:
            self._start(state, arguments)
            return state
        if self.is_async:
            language_loop().run(self._abody(state, arguments))
        else:
            self._body(state, arguments)
        _warn_of_error(self.name, state)
        return state

    async def arun(self, *args: Any, **kwargs: Any) -> ProgramState:
        """Async twin of `run`, on the caller's loop; a program that is no `async def` gets a thread. Cancelling the
        task that awaits this cancels the program's requests."""
        options = RunOptions.take(kwargs, self.arg_names)
        arguments = self._arguments(args, kwargs)
        state = self._new_state(options)
        await self._arun(state, arguments)
        _warn_of_error(self.name, state)
        return state

    async def astream(self, *args: Any, var_name: str | None = None, **kwargs: Any) -> AsyncIterator[str]:
        """Run, and yield the text as it comes: a variable's, or all of it. Closing the iterator cancels the program.

        Raises what makes the program fail.
        """
        options = RunOptions.take(kwargs, self.arg_names)
        arguments = self._arguments(args, kwargs)
        state = self._new_state(options, stream=True)
        self._start(state, arguments)
        chunks = state.text_async_iter(var_name)
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    def _check_may_wait(self, method: str, stream: bool = False) -> None:
        """Raises RuntimeError on the language's loop, where waiting for a program would wait for itself."""
        if not stream and on_language_loop():
            raise RuntimeError(
                f"{method}() of {self.name} would block the event loop that its calls run on; use a{method}() within "
                "an async program"
            )

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Raises InvalidRequestError for arguments that the program does not take."""
        named = {**self.bound, **kwargs}
        try:
            self.signature.bind(None, *args, **named)
        except TypeError as error:
            raise InvalidRequestError(f"program {self.name}: {error}; it takes ({', '.join(self.arg_names)})") from None
        return tuple(args), named

    def _new_state(self, options: RunOptions, *, stream: bool = False) -> ProgramState:
        promises = Promises()
        now = time.monotonic()
        session = options.session
        promised: list[Any] = [one for one in (self, session, options) if one is not None]
        for one in promised:
            promises = promises.within(one.slo, one.deadline, now=now)
        deadlines = [one.deadline for one in promised if one.deadline is not None]
        ledger = Ledger(self.name, min(deadlines, default=None))
        of_session = session.backend if session is not None else None
        backend = resolve_backend(options.backend or of_session or self.backend)
        if session is not None:
            session.begin()
        run = Run(
            backend,
            options.sampling,
            ledger,
            is_async=self.is_async,
            stream=stream,
            due=promises.due,
            planner=self.planner if options.plan else None,
            slo_class=self.slo_class or (session.slo_class if session is not None else ""),
            session=session,
        )
        self._last = ledger
        return ProgramState(run.root, promises)

    def _body(self, state: ProgramState, arguments: Arguments) -> None:
        """Run a program that is no `async def` on this thread, to the end of its calls."""
        run = state.stream_executor.run
        token = inside_run.set(run)
        try:
            state.ret_value = self.func(state, *arguments[0], **arguments[1])
            for executor in run.executors:  # forks are appended while we wait
                executor.drained().result()
            run.check_turn()
            self._warn_of_forks(run)
        except BaseException as error:
            run.abort(self._kept(error))
            raise
        finally:
            inside_run.reset(token)
            run.end()

    async def _abody(self, state: ProgramState, arguments: Arguments) -> None:
        """Run an `async def` program on this loop, to the end of its calls."""
        run = state.stream_executor.run
        token = inside_run.set(run)
        try:
            state.ret_value = await self.func(state, *arguments[0], **arguments[1])
            for executor in run.executors:
                await executor.drained().get()
            run.check_turn()
            self._warn_of_forks(run)
        except BaseException as error:
            run.abort(self._kept(error))
            raise
        finally:
            inside_run.reset(token)
            run.end()

    def _warn_of_forks(self, run: Run) -> None:
        """Of those that failed and that the program neither read nor joined: nobody else would hear of it."""
        code = getattr(self.func, "__code__", None)
        file, line = (code.co_filename, code.co_firstlineno) if code is not None else (f"<program {self.name}>", 1)
        for fork, error in run.untold():
            which = f"{fork} of program {self.name}, which nobody read or joined"
            text = f"{which}, failed: {type(error).__name__}: {error}"
            _warn(text, file, line, getattr(self.func, "__module__", None))

    def _kept(self, error: BaseException) -> BaseException:
        """What a state keeps of what ended its program: who reads it there is not to exit or end in the program's
        stead."""
        if isinstance(error, SystemExit):
            code = "" if error.code is None else repr(error.code)
            return RuntimeError(f"program {self.name} called sys.exit({code})")
        if isinstance(error, asyncio.CancelledError):
            return RequestCancelledError(f"program {self.name} was cancelled")
        return error

    async def _arun(self, state: ProgramState, arguments: Arguments) -> None:
        if self.is_async:
            await self._abody(state, arguments)
            return
        body = _THREADS.submit(self._body, state, arguments)
        try:
            await asyncio.wrap_future(body)
        except asyncio.CancelledError:
            state.stream_executor.run.cancel()  # the thread ends when the program next reads
            if body.cancelled():  # it has not even begun
                state.stream_executor.run.end()
            raise

    def _start(self, state: ProgramState, arguments: Arguments) -> None:
        """Run in the background; errors stay in the state."""
        if self.is_async:
            language_loop().loop.call_soon_threadsafe(self._start_task, state, arguments)
        else:
            threading.Thread(
                target=self._body_quietly, args=(state, arguments), name=f"superinfer-{self.name}", daemon=True
            ).start()

    def _start_task(self, state: ProgramState, arguments: Arguments) -> None:
        run = state.stream_executor.run
        run.task = asyncio.get_running_loop().create_task(self._abody_quietly(state, arguments))
        run.task.add_done_callback(lambda _: run.end())  # also of one that was cancelled before it began

    def _body_quietly(self, state: ProgramState, arguments: Arguments) -> ProgramState:
        # `_body` has put it into the state.
        with contextlib.suppress(Exception, SystemExit, asyncio.CancelledError):
            self._body(state, arguments)
        return state

    async def _abody_quietly(self, state: ProgramState, arguments: Arguments) -> ProgramState:
        try:
            await self._arun(state, arguments)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # else it is the program's own: of a task that it awaited
        except (Exception, SystemExit):
            pass  # it is in the state
        return state

    # ------------------------------------------------------------------ many runs

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **options: Any,
    ) -> Any:
        """Run once for each item, a dict or a tuple of arguments, and return the states in that order.

        An item that fails, or exits, keeps its error in its state (`error()`; reading a variable raises it) and harms
        no other. Ctrl-C, and a KeyboardInterrupt of an item, end the batch at once and cancel what runs.
        num_threads: programs at a time, "auto" for at most 96 (for `async def` programs, which need no threads: all).
        generator_style: an iterator that yields each state as soon as it and those before it are done.
        Raises InvalidRequestError for arguments that the program does not take, before anything is run, and
        RuntimeError within an `async def` program: use `arun_batch` there.
        """
        self._check_may_wait("run_batch")
        items, chosen = self._items(batch_kwargs, options)
        batch = self._batch(items, chosen, check_at_once(num_threads))
        states: Iterator[ProgramState] = batch
        if progress_bar:
            from rich.progress import track

            states = iter(track(batch, description=self.name, total=len(items)))
        if generator_style:
            return states
        with contextlib.closing(batch):  # Ctrl-C may come anywhere
            return list(states)

    async def arun_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        concurrency: int | None = None,
        **options: Any,
    ) -> AsyncIterator[ProgramState]:
        """Async twin of `run_batch(generator_style=True)`; at most `concurrency` programs at a time (None: all).

        Closing the iterator cancels what has not finished.
        """
        items, chosen = self._items(batch_kwargs, options)
        states = as_tasks_here(items, lambda item: self._abody_quietly(self._new_state(chosen), item), concurrency)
        async with contextlib.aclosing(states):
            async for state in states:
                yield state

    def _items(self, batch: Sequence[Any], options: dict[str, Any]) -> tuple[list[Arguments], RunOptions]:
        """The items of a batch, and how to run them; nothing has been run yet."""
        chosen = RunOptions.take(options)
        if chosen.session is not None:
            raise InvalidRequestError("session: its turns come one after the other; run one program of a batch in each")
        if options:
            name = next(iter(options))
            raise InvalidRequestError(f"run_batch has no option {name!r}; arguments belong into the items")
        return check_items(batch, self._arguments), chosen

    def _batch(
        self, items: list[Arguments], options: RunOptions, at_once: int | None
    ) -> Generator[ProgramState, None, None]:
        if self.is_async:
            return as_tasks(items, lambda item: self._abody_quietly(self._new_state(options), item), at_once)
        running: set[ProgramState] = set()
        is_over = False

        def one(item: Arguments) -> ProgramState:
            state = self._new_state(options)
            running.add(state)
            if is_over:  # it came after the others had been cancelled
                state.stream_executor.run.cancel()
            try:
                return self._body_quietly(state, item)
            finally:
                running.discard(state)

        def cancel() -> None:
            nonlocal is_over
            is_over = True
            for state in list(running):
                state.stream_executor.run.cancel()

        return in_threads(items, one, at_once, cancel)

    def __repr__(self) -> str:
        return f"<program {self.name}({', '.join(self.arg_names)})>"


@overload
def function(func: Callable[..., Any], /) -> Function: ...
@overload
def function(
    func: None = None,
    num_api_spec_tokens: int | None = None,
    *,
    deadline: float | None = None,
    slo: SLO | None = None,
    slo_class: str = "",
    history: History | str | os.PathLike[str] | None = None,
) -> Callable[[Callable[..., Any]], Function]: ...
def function(
    func: Callable[..., Any] | None = None,
    num_api_spec_tokens: int | None = None,
    *,
    deadline: float | None = None,
    slo: SLO | None = None,
    slo_class: str = "",
    history: History | str | os.PathLike[str] | None = None,
) -> Any:
    """Make a program of a function whose first argument is the state. Works with `def` and `async def`.

    deadline: seconds that one run may take; each call is sent what is left of them.
    slo: what each call of the program inherits. slo_class: under which name servers count whether it was kept.
    history: where what its calls take is learnt: a History, which programs may share, or the path of a file to keep it
    in; None: in memory, for as long as the program lives.
    """
    if num_api_spec_tokens is not None:
        raise UnsupportedError(f"num_api_spec_tokens={num_api_spec_tokens!r} is not supported; leave it out")

    def decorate(func: Callable[..., Any]) -> Function:
        return Function(func, deadline=deadline, slo=slo, slo_class=slo_class, history=history)

    return decorate if func is None else decorate(func)


MOST_WARNED = 1024  # warnings of failures remembered, so that none is shown twice; most name a request or a time
_warned: dict[Any, Any] = {}


def _warn_of_error(name: str, state: ProgramState) -> None:
    """At the caller's caller."""
    error = state.stream_executor.error
    if error is not None:
        caller = sys._getframe(2)
        text = f"program {name} failed: {type(error).__name__}: {error} (see state.error())"
        _warn(text, caller.f_code.co_filename, caller.f_lineno, caller.f_globals.get("__name__"))


def _warn(text: str, file: str, line: int, module: str | None) -> None:
    """Each once, as long as it is remembered; by the module at fault it would be for as long as the process lives."""
    if len(_warned) > MOST_WARNED:
        _warned.clear()
    warnings.warn_explicit(text, RuntimeWarning, file, line, module, registry=_warned)
