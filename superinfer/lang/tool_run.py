"""Running the tools that a model calls: ordinary Python functions, all calls of one answer at the same time.

See docs/sessions.md.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from superinfer.errors import InvalidRequestError, OutputError
from superinfer.lang.loop import Threads, language_loop
from superinfer.lang.tools import ToolCall, tool_schema

Tool = Callable[..., Any]
OnToolError = Literal["tell", "raise"]

MAX_TOOL_THREADS = 64  # in which `def` tools run, of the whole process
_THREADS = Threads(MAX_TOOL_THREADS, "superinfer-tool")


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """What a tool call came to. text: what the model is told. value: what the tool returned, None after an error.

    seconds: how long it took. error: what it raised, OutputError for a call that fits no tool, TimeoutError.
    """

    call: ToolCall
    text: str
    value: Any = None
    seconds: float = 0.0
    error: BaseException | None = None


class Toolbox:
    """Python functions by the names that a model calls them by. Raises InvalidRequestError like `tool_schema`, for a
    schema without a function, and for two tools of one name."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        self._signatures: dict[str, inspect.Signature] = {}
        if not isinstance(tools, Iterable):
            raise InvalidRequestError(f"tools={tools!r:.80} must be a list of functions")
        self.schemas: list[dict[str, Any]] = []
        for tool in tools:
            if not callable(tool):
                raise InvalidRequestError(f"tool {tool!r:.80} is not a Python function, so it cannot be called")
            schema = tool_schema(tool)
            name = schema["function"]["name"]
            if name in self._tools:
                raise InvalidRequestError(f"two tools are named {name!r}; rename one")
            self._tools[name], self._signatures[name] = tool, inspect.signature(tool)
            self.schemas.append(schema)

    def __len__(self) -> int:
        return len(self._tools)

    async def run(
        self, calls: Sequence[ToolCall], *, timeout: float | None = None, on_error: OnToolError = "tell"
    ) -> list[ToolResult]:
        """Run all calls at once; results in their order. See `acall_tools`."""
        check_on_error(on_error)
        tasks = [asyncio.ensure_future(self._one(call, timeout, on_error)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # nobody waits for the others any more
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _one(self, call: ToolCall, timeout: float | None, on_error: OnToolError) -> ToolResult:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                value = await self._invoke(call)
            text = told(value)
        except (Exception, SystemExit) as error:  # sys.exit() in a tool ends the tool
            if isinstance(error, TimeoutError) and not str(error):
                error = TimeoutError(f"{call.name} took longer than {timeout} s")
            if on_error == "raise":
                raise error from None
            text = f"error: {error}" if isinstance(error, OutputError) else f"error: {type(error).__name__}: {error}"
            return ToolResult(call=call, text=text, seconds=time.monotonic() - began, error=error)
        return ToolResult(call=call, text=text, value=value, seconds=time.monotonic() - began)

    async def _invoke(self, call: ToolCall) -> Any:
        tool = self._tools.get(call.name)
        if tool is None:
            raise OutputError(f"there is no tool {call.name!r}; there are {', '.join(self._tools) or 'none'}")
        try:
            self._signatures[call.name].bind(**call.arguments)
        except TypeError as error:
            raise OutputError(f"{call.name}: {error}; it takes {self._signatures[call.name]}") from None
        if inspect.iscoroutinefunction(tool):
            return await tool(**call.arguments)
        context = contextvars.copy_context()
        invoke = functools.partial(context.run, tool, **call.arguments)
        value = await asyncio.wrap_future(_THREADS.submit(invoke))
        return await value if inspect.isawaitable(value) else value


async def acall_tools(
    calls: Sequence[ToolCall],
    tools: Iterable[Tool],
    *,
    timeout: float | None = None,
    on_error: OnToolError = "tell",
) -> list[ToolResult]:
    """Run all calls of an answer (see `tool_calls`) at once, and return their results in that order.

    `async def` tools run on this loop, `def` tools in threads, of which the process has at most MAX_TOOL_THREADS.
    timeout: seconds for each; a `def` that takes longer runs on, unheard. on_error: "tell" puts what went wrong into
    the result, as text for the model; "raise" raises it and gives the other calls up.
    Raises InvalidRequestError for tools that are no functions or have one name, and what on_error="raise" says.
    """
    return await Toolbox(tools).run(calls, timeout=timeout, on_error=on_error)


def call_tools(
    calls: Sequence[ToolCall],
    tools: Iterable[Tool],
    *,
    timeout: float | None = None,
    on_error: OnToolError = "tell",
) -> list[ToolResult]:
    """Synchronous twin of `acall_tools`; `async def` tools run on the loop of the language's own thread."""
    return language_loop().run(acall_tools(calls, tools, timeout=timeout, on_error=on_error))


def told(value: Any) -> str:
    """A tool's result as the model reads it: text as it is, None as "", all else as JSON, or else as `str` shows it."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return json.dumps(msgspec.to_builtins(value), ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        return str(value)


def check_on_error(on_error: object) -> None:
    """Raises InvalidRequestError for a value that it cannot have."""
    if on_error not in ("tell", "raise"):
        raise InvalidRequestError(f"on_error={on_error!r} must be 'tell' or 'raise'")
