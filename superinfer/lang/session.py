"""Sessions: conversations whose turns share KV, and agents that call tools. See docs/sessions.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from superinfer.errors import InvalidRequestError, OutputError
from superinfer.lang.api import assistant, gen, tool, user
from superinfer.lang.backend import Backend, resolve_backend
from superinfer.lang.conversation import Conversation
from superinfer.lang.history import History
from superinfer.lang.ir import Expr
from superinfer.lang.loop import language_loop
from superinfer.lang.program import Function
from superinfer.lang.promise import check_pause
from superinfer.lang.state import ProgramState
from superinfer.lang.tool_run import OnToolError, Tool, Toolbox, ToolResult, check_on_error
from superinfer.lang.tools import ToolCall, tool_calls
from superinfer.runtime.slo import SLO

_HISTORY = History()  # of sessions that are given none


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a turn of `ask` came to. text: the last answer. tools: all calls, in order. state: of the run; its
    `slo_report()` says what became of the promises."""

    text: str
    tools: tuple[ToolResult, ...]
    state: ProgramState


class Session(Conversation):
    """A conversation that outlives a run. `ask` is a ready-made turn; `program.run(..., session=session)`, and `arun`,
    `astream` and `run(stream=True)` likewise, make any program a turn of it.

    system, tools, messages: what it begins with; tools are annotated Python functions, `def` or `async def`.
    backend: what its turns run on; None: the default one at that time. slo, deadline: for each turn; seconds.
    slo_class: under which name servers count whether promises were kept.
    name: of its kind: what turns and pauses take is learnt over all sessions of one name, in `history`: a History, or a
    file to keep it in; None: in memory. tool_s, idle_s: seconds between two calls of a turn, and between turns, as long
    as nothing has been learnt.
    tool_timeout: seconds for one tool call; None: no limit. on_tool_error: "tell" the model, or "raise".
    max_rounds: answers in one turn that may call tools.
    Raises InvalidRequestError for a wrong value, UnsupportedError for a tool without a schema.
    """

    def __init__(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        messages: Sequence[dict[str, Any]] = (),
        backend: Backend | None = None,
        slo: SLO | None = None,
        deadline: float | None = None,
        slo_class: str = "",
        name: str = "session",
        history: History | str | os.PathLike[str] | None = None,
        tool_s: float | None = None,
        idle_s: float | None = None,
        tool_timeout: float | None = None,
        on_tool_error: OnToolError = "tell",
        max_rounds: int = 8,
    ) -> None:
        check_on_error(on_tool_error)
        if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
            raise InvalidRequestError(f"max_rounds={max_rounds!r} must be an integer of at least 1")
        super().__init__(
            name=name,
            history=_HISTORY if history is None else History.of(history),
            backend=backend,
            slo=slo,
            deadline=deadline,
            slo_class=slo_class,
            tool_s=tool_s,
            idle_s=idle_s,
        )
        self.toolbox = Toolbox(tools)
        self.tool_timeout = check_pause("tool_timeout", tool_timeout)
        self.on_tool_error = on_tool_error
        self.max_rounds = max_rounds
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        self.say(messages, self.toolbox.schemas)
        self._turn = self._make_turn()

    def ask(self, text: str | Expr, **options: Any) -> Reply:
        """One turn: say `text`, let the model call tools until it answers in words, and return that.

        options: as of `Function.run` (max_new_tokens, temperature, deadline, slo, backend, ...).
        Raises what ends the turn, and OutputError after `max_rounds` answers that all call tools; the session is then
        as it was before.
        """
        return language_loop().run(self.aask(text, **options))

    async def aask(self, text: str | Expr, **options: Any) -> Reply:
        """Async twin of `ask`. Cancelling the task cancels the turn's requests on the engine and its `async def`
        tools."""
        if not isinstance(text, (str, Expr)):
            raise InvalidRequestError(f"ask({text!r:.80}): give the text that the user says")
        if options.get("n", 1) != 1:
            raise InvalidRequestError(f"n={options['n']!r}: a turn of a session has one answer; leave it out")
        results: list[ToolResult] = []
        state = await self._turn.arun(text, results, session=self, **options)
        return Reply(text=state.ret_value, tools=tuple(results), state=state)

    def _make_turn(self) -> Function:
        async def turn(s: ProgramState, text: str | Expr, results: list[ToolResult]) -> str:
            s += user(text)
            for _ in range(self.max_rounds):
                s += assistant(gen("reply"))
                answer: str = await s.get("reply")
                try:
                    calls = tool_calls(answer) if len(self.toolbox) else []
                except OutputError as error:
                    if self.on_tool_error == "raise":
                        raise
                    s += tool(f"error: {error}")
                    continue
                if not calls:
                    return answer
                for result in await self._run_tools(calls):
                    results.append(result)
                    s += tool(result.text)
            raise OutputError(f"the model called tools {self.max_rounds} times in a row without an answer in words")

        turn.__name__ = self.name
        return Function(turn, history=self.history)

    async def _run_tools(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return await self.toolbox.run(calls, timeout=self.tool_timeout, on_error=self.on_tool_error)

    # ------------------------------------------------------------------ looking, and the rest

    def messages(self) -> list[dict[str, Any]]:
        """All that was said, OpenAI style, up to the last turn that has ended well."""
        with self._lock:
            return self._transcript.messages()

    def text(self) -> str:
        """The same as the model reads it, by the chat template of the session's backend."""
        return self.transcript(resolve_backend(self.backend).render_chat).text()

    def prefetch(self) -> None:
        """Have the KV of all that was said where the next turn needs it, now: copied back from the second tier, or
        computed again. Waits for it. Raises UnsupportedError on a backend that keeps no KV cache for us."""
        language_loop().run(self._prefetch())

    async def aprefetch(self) -> None:
        """Async twin of `prefetch`."""
        await language_loop().arun(self._prefetch())

    async def _prefetch(self) -> None:
        backend = resolve_backend(self.backend)
        transcript = self.transcript(backend.render_chat)
        if transcript.messages():
            await backend.cache_prefix(transcript.prompt(messages=backend.takes_messages))

    def fork(self) -> Session:
        """Another session that begins with all that was said in this one, tools and settings included."""
        twin = Session(
            backend=self.backend,
            slo=self.slo,
            deadline=self.deadline,
            slo_class=self.slo_class,
            name=self.name,
            history=self.history,
            tool_s=self.tool_s,
            idle_s=self.idle_s,
            tool_timeout=self.tool_timeout,
            on_tool_error=self.on_tool_error,
            max_rounds=self.max_rounds,
        )
        twin.toolbox = self.toolbox
        twin.take_from(self)
        return twin

    def close(self) -> None:
        """No more turns. The engine drops its KV as room is wanted. Safe to call twice."""
        self.finish()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
