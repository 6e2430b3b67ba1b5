"""Tool calls between OpenAI's API, where they have fields of their own, and the text of a program, where they are
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in an answer (see `tool_calls`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from superinfer.errors import OutputError
from superinfer.lang.tools import split_tool_calls


def wire_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the API takes them: calls out of the answers' text, and each result with the id of its call.

    A result that answers no call that can be read goes out as a user's message: the API refuses it otherwise.
    """
    wired: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            if open_ids:
                wired.append({**message, "tool_call_id": open_ids.pop(0)})
            else:
                wired.append({"role": "user", "content": message["content"]})
            continue
        open_ids = []
        if message["role"] == "assistant" and (split := _split(message["content"])) is not None:
            words, calls = split
            open_ids = [f"call_{at}_{number}" for number in range(len(calls))]
            told = [
                {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                for id_, (name, arguments) in zip(open_ids, calls, strict=True)
            ]
            wired.append({"role": "assistant", "content": words or None, "tool_calls": told})
        else:
            wired.append(message)
    return wired


def _split(text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]] | None:
    """The words and the calls of an answer; None where it has no calls, or none that can be read."""
    try:
        words, calls = split_tool_calls(text)
    except OutputError:
        return None
    return (words, [(call.name, call.arguments) for call in calls]) if calls else None


@dataclass
class CallDeltas:
    """Collects the tool calls of one choice of a stream."""

    names: dict[int, str] = field(default_factory=dict)
    arguments: dict[int, list[str]] = field(default_factory=dict)

    def add(self, deltas: Sequence[Any]) -> None:
        """Of one chunk."""
        for delta in deltas:
            if delta.function is None:
                continue
            if delta.function.name:
                self.names[delta.index] = self.names.get(delta.index, "") + delta.function.name
            self.arguments.setdefault(delta.index, []).append(delta.function.arguments or "")

    def text(self) -> str:
        """All calls, as a program reads them."""
        shown = []
        for index in sorted(self.arguments):
            name, arguments = json.dumps(self.names.get(index, "")), "".join(self.arguments[index]) or "{}"
            shown.append(f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>')
        return "".join(shown)
