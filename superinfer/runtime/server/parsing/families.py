"""Which formats a model speaks: by its chat template, which names their markers, else by its architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from superinfer.errors import InvalidRequestError
from superinfer.runtime.server.parsing import written
from superinfer.runtime.server.parsing.pieces import AnswerReader, OpeningReader, PlainReader, Reader, SpecialFilter
from superinfer.runtime.server.parsing.reasoning import ThinkReader
from superinfer.runtime.server.parsing.tool_calls import (
    JsonReader,
    MistralReader,
    NamedReader,
    PythonicReader,
    TaggedReader,
)
from superinfer.runtime.tokenization import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """How tool calls are read and written. template: text in a chat template that tells; architectures: those that,
    with a template that does not tell, most likely use it. special: markers that the tokenizer may hold as special
    tokens. opening: the marker that every call begins with; "" where the whole answer is calls or none is."""

    read: Callable[[frozenset[str]], Reader]
    write: written.Write
    opening: str
    template: tuple[str, ...]
    architectures: tuple[str, ...]
    special: tuple[str, ...] = ()


# The first match counts. Markers are those that the models' own chat templates on the Hugging Face hub use.
TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(
        read=TaggedReader,
        write=written.tagged,
        opening="<tool_call>",
        template=("<tool_call>",),
        architectures=("Qwen2", "Qwen3"),
        special=("<tool_call>", "</tool_call>"),
    ),
    "mistral": ToolFormat(
        read=MistralReader,
        write=written.mistral,
        opening="[TOOL_CALLS]",
        template=("[TOOL_CALLS]",),
        architectures=("Mistral", "Mixtral", "Ministral"),
        special=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    "pythonic": ToolFormat(
        read=PythonicReader,
        write=written.pythonic,
        opening="",
        template=("[func_name1(",),
        architectures=("Llama4",),
        special=("<|python_start|>", "<|python_end|>"),
    ),
    "llama3_json": ToolFormat(
        read=JsonReader,
        write=written.bare,
        opening="",
        template=("<|python_tag|>", '{"name": function name, "parameters"'),
        architectures=("Llama",),
        special=("<|python_tag|>",),
    ),
}
REASONING_FORMATS = ("think",)
THINK_MARKERS = ("<think>", "</think>")
DEFAULT_TOOLS = "hermes"


@dataclass(frozen=True)
class Formats:
    """What one model speaks. tools: a key of TOOL_FORMATS. reasoning: whether it marks reasoning by `<think>`. drop:
    special tokens to leave out of a text that is to show others of them."""

    tools: str
    reasoning: bool
    drop: tuple[str, ...]
    spelling: written.Spelling = written.PLAINLY

    def calls(self, tools: list[written.Tool], *, one: bool) -> written.Format:
        """What calls of these tools look like, of one or of several. Raises UnsupportedError for a tool that cannot be
        called so."""
        return TOOL_FORMATS[self.tools].write(tools, self.spelling, one)

    def reader(
        self, names: frozenset[str], *, prompt_end: str, named: str = "", listed: bool = False, constrained: bool,
        one_call: bool,
    ) -> AnswerReader:  # fmt: skip
        """A reader for one answer.

        names: of the tools; empty: none were given. named, listed: the answer is constrained to be the arguments of
        this tool, or a list of calls. constrained: to anything, so that there is no reasoning, and a call where there
        are names is all of the answer.
        """
        tools: Reader = PlainReader()
        if named:
            tools = NamedReader(named)
        elif listed:
            tools = JsonReader(names)
        elif names:
            known = TOOL_FORMATS[self.tools]
            tools = known.read(names)
            if constrained and known.opening:
                tools = OpeningReader(known.opening, tools)
        inside = prompt_end.rstrip().endswith("<think>")
        closed = prompt_end.rstrip().endswith("</think>")
        thinks = self.reasoning and not constrained and not closed
        special = SpecialFilter(self.drop) if self.sees_special(names) else None
        return AnswerReader(special, ThinkReader(inside=inside) if thinks else None, tools, one_call=one_call)

    def sees_special(self, names: frozenset[str]) -> bool:
        """Whether the text must come with its special tokens, as some of them are markers."""
        return bool(self.drop) and (bool(names) or self.reasoning)


def formats_of(tokenizer: Tokenizer, architecture: str, *, tools: str = "auto", reasoning: str = "auto") -> Formats:
    """What this model speaks; `tools` and `reasoning` override it. Raises InvalidRequestError for unknown names."""
    template = tokenizer.chat_template
    if tools == "auto":
        tools = _tools_of(template, architecture)
    if tools not in TOOL_FORMATS:
        raise InvalidRequestError(f"tool parser {tools!r} is unknown; choose one of auto, {', '.join(TOOL_FORMATS)}")
    if reasoning not in ("auto", "none", *REASONING_FORMATS):
        raise InvalidRequestError(f"reasoning parser {reasoning!r} is unknown; choose one of auto, none, think")
    thinks = reasoning == "think" or (reasoning == "auto" and any(marker in template for marker in THINK_MARKERS))
    markers = (*TOOL_FORMATS[tools].special, *(THINK_MARKERS if thinks else ()))
    special = tokenizer.special_tokens
    ids = {marker: special[marker] for marker in markers if marker in special}
    return Formats(tools, thinks, _dropped(tuple(special), markers), written.Spelling(ids, template))


def _tools_of(template: str, architecture: str) -> str:
    for name, known in TOOL_FORMATS.items():
        if any(marker in template for marker in known.template):
            return name
    for name, known in TOOL_FORMATS.items():
        if any(architecture.startswith(start) for start in known.architectures) and "tools" in template:
            return name
    return DEFAULT_TOOLS


def _dropped(special: Sequence[str], markers: Sequence[str]) -> tuple[str, ...]:
    """The special tokens to leave out of the text, where some are markers; none where they are skipped as usual."""
    if not any(token in markers for token in special):
        return ()
    return tuple(token for token in special if token not in markers)
