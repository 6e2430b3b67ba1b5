"""Runs a program without a model, to see its calls. See docs/slo.md."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from superinfer.errors import UnsupportedError
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

    Raises what the program raises before it has read any variable.
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
        if not graph.seen:
            raise
        graph.stopped = f"it raises {type(error).__name__}: {error}"
    return graph, state


def constant_prefix(program: Function, render: RenderChat) -> Prompt | None:
    """What every run of the program says before its first argument or call, by the template of `render`."""
    _, state = trace(program, (), {})
    prefix = state.stream_executor.transcript.until(UNKNOWN_MARK, render)
    return prefix.prompt(messages=True) if prefix is not None else None
