"""Tool calls as most open chat models write them, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, found in
text that comes piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator

from superinfer.runtime.server.schema import FunctionCall
from superinfer.runtime.text import split_at_stop

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCallReader:
    """Separates tool calls from the text around them. What only looked like a call is given out as text."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self.found = 0

    def push(self, text: str) -> Iterator[str | FunctionCall]:
        """Text and calls that are certain after `text`."""
        self._held += text
        while self._held:
            if self._inside:
                body, closed, rest = self._held.partition(CLOSE)
                if not closed:
                    return
                self._inside, self._held = False, rest
                yield self._call_or_text(body)
            else:
                before, tail, tag = split_at_stop(self._held, (OPEN,))
                self._held = self._held[len(before) + len(OPEN) :] if tag else tail
                self._inside = tag is not None
                if before:
                    yield before
                if tag is None:
                    return

    def flush(self) -> str:
        """What is held at the end of the answer: an unfinished call, as text."""
        text = (OPEN if self._inside else "") + self._held
        self._held, self._inside = "", False
        return text

    def _call_or_text(self, body: str) -> str | FunctionCall:
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{OPEN}{body}{CLOSE}"
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return f"{OPEN}{body}{CLOSE}"
        self.found += 1
        return FunctionCall(name, json.dumps(arguments, ensure_ascii=False))
