"""A dialogue with its graded turns, and its text in the chat template: the one definition of the prompt format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.embedded_model.facts import Fact

Message = dict[str, Any]
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOOLS_HEAD = "# Tools\nYou may call these functions:\n<tools>"
TOOLS_TAIL = (
    '</tools>\nTo call one, answer only <tool_call>{"name": function name, "arguments": {its arguments}}</tool_call>'
)

# The same format for Hugging Face; tests compare the two on drawn dialogues.
CHAT_TEMPLATE = (
    "{%- set first = messages[0] if messages else {} %}"
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if first.role == 'system' %}{{- first.content + '\\n\\n' }}{%- endif %}"
    "{{- " + json.dumps(TOOLS_HEAD) + " }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n' + " + json.dumps(TOOLS_TAIL) + " + '<|im_end|>\\n' }}"
    "{%- elif first.role == 'system' %}"
    "{{- '<|im_start|>system\\n' + first.content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}"
    "{%- for call in message.tool_calls %}"
    "{%- set f = call.function if call.function else call %}"
    "{{- '<tool_call>{\"name\": ' + (f.name | tojson) + ', \"arguments\": ' }}"
    "{{- f.arguments if f.arguments is string else (f.arguments | tojson) }}"
    "{{- '}</tool_call>' }}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Dialogue:
    """What one task draws.

    messages: OpenAI-style turns with plain string content; `graded` are indices of the assistant turns that have one
    right answer. A raw completion has `pieces` instead: alternating prompt and graded continuation, no chat tokens;
    every continuation ends with a newline. `stated` are the facts that a drill's text states (see `carry.py`).
    """

    kind: str
    messages: tuple[Message, ...] = ()
    graded: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    pieces: tuple[str, ...] = ()
    stated: tuple[Fact, ...] = ()

    def text(self) -> str:
        """All of its text, for hashing and for training the tokenizer."""
        return "".join(text for text, _ in render(self))


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """The assistant turn that calls a tool."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def chat(kind: str, *messages: Message, tools: Sequence[dict[str, Any]] = ()) -> Dialogue:
    """A dialogue in which every assistant turn is graded."""
    graded = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return Dialogue(kind, tuple(messages), graded, tuple(tools))


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def render(dialogue: Dialogue) -> list[tuple[str, bool]]:
    """The dialogue as (text, is it a graded answer) pieces; the answers include their end (`<|im_end|>`, newline)."""
    if dialogue.pieces:
        return [(piece, i % 2 == 1) for i, piece in enumerate(dialogue.pieces)]
    out: list[tuple[str, bool]] = []
    messages = dialogue.messages
    start = 0
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if dialogue.tools:
        lines = [TOOLS_HEAD, *(json.dumps(t, ensure_ascii=False) for t in dialogue.tools), TOOLS_TAIL]
        head = "" if system is None else system + "\n\n"
        out.append((f"{IM_START}system\n{head}" + "\n".join(lines) + f"{IM_END}\n", False))
        start = 1 if system is not None else 0
    for i in range(start, len(messages)):
        message = messages[i]
        out.append((f"{IM_START}{message['role']}\n", False))
        out.append((message["content"] + IM_END, i in dialogue.graded))
        out.append(("\n", False))
    return out
