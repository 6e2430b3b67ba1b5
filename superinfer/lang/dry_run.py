"""Runs a program without a model, to see its calls. See docs/slo.md."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.lang.backend import Backend
from superinfer.lang.callgraph import CallGraph
from superinfer.lang.chat_text import plain_chat
from superinfer.lang.loop import language_loop
from superinfer.lang.promise import Promises
from superinfer.lang.prompt import Prompt, RenderChat
from superinfer.lang.report import Ledger
from superinfer.lang.run import Run
from superinfer.lang.sampling import Sampling
from superinfer.lang.state import ProgramState
from superinfer.lang.unknown import UNKNOWN_MARK, DataDependent, Unknown
from superinfer.runtime.text import TextDelta, TextRequest

if TYPE_CHECKING:
    from superinfer.lang.program import Function


class NoModel(Backend):
    """What a trace runs on. It shows messages plainly and is never asked for more."""

    def stream(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        raise UnsupportedError("nothing is generated in a trace")

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise UnsupportedError("there is no tokenizer in a trace")

    def piece(self, token_id: int) -> str:
        raise UnsupportedError("there is no tokenizer in a trace")

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return plain_chat(messages, add_generation_prompt=add_generation_prompt)


def trace(program: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CallGraph, ProgramState]:
    """The calls of `program`, and its state at the end. Arguments that are not given are Unknown.

    Raises what the program raises before it has read any variable, and InvalidRequestError where it calls itself
    without end before that.
    """
    named = {**program.bound, **kwargs}
    for name in program.arg_names[len(args) :]:
        parameter = program.signature.parameters[name]
        if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            named.setdefault(name, Unknown(name))
    run = Run(NoModel(), Sampling(), Ledger(program.name, None), is_async=program.is_async, stream=False, tracing=True)
    state = ProgramState(run.root, Promises(program.slo))
    graph = run.graph
    try:
        if program.is_async:
            language_loop().run(program._abody(state, (tuple(args), named)))
        else:
            program._body(state, (tuple(args), named))
    except DataDependent as stop:
        graph.stopped = stop.what
    except Exception as error:
        depth = _depth(program, error)
        if graph.seen:
            graph.stopped = (
                f"it raises {type(error).__name__}: {error}" if depth < 2 else f"it calls itself {depth} deep"
            )
        elif depth < 2:
            raise
        else:
            raise InvalidRequestError(
                f"program {program.name} calls itself {depth} deep, which is as far as Python goes: give it an end; "
                "where it ends by what a model answers, look at the answer before it is called again, so that a trace "
                "stops there"
            ) from None
    return graph, state


def _depth(program: Function, error: Exception) -> int:
    """How many times the program had called itself where Python had no room for more; 0 for other errors."""
    if not isinstance(error, RecursionError):
        return 0
    code = getattr(program.func, "__code__", None)
    return sum(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def constant_prefix(program: Function, render: RenderChat) -> Prompt | None:
    """What every run of the program says before its first argument or call, by the template of `render`."""
    _, state = trace(program, (), {})
    prefix = state.stream_executor.transcript.until(UNKNOWN_MARK, render)
    return prefix.prompt(messages=True) if prefix is not None else None
