"""Reasoning as most open models mark it: `<think>...</think>` before the answer."""

from __future__ import annotations

from superinfer.runtime.server.parsing.pieces import Piece
from superinfer.runtime.text import split_at_stop

OPEN, CLOSE = "<think>", "</think>"


class ThinkReader:
    """Reasoning, then content. Only a `<think>` that opens the answer counts, or one that the prompt ended with."""

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the prompt already opened the reasoning."""
        self._state = "reasoning" if inside else "start"
        self._held = ""
        self._bare = True  # no text of the present part yet: its leading white space is left out

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        self._held += text
        out: list[Piece] = []
        if self._state == "start":
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self._state, self._held = "reasoning", start[len(OPEN) :]
            elif OPEN.startswith(start):
                return out
            else:
                self._state, self._bare = "content", False
        if self._state == "reasoning":
            before, tail, tag = split_at_stop(self._held, (CLOSE,))
            if tag is not None:
                self._give(out, "reasoning", before.rstrip())
                self._state, self._bare, self._held = "content", True, self._held[len(before) + len(CLOSE) :]
            else:
                kept = before.rstrip()  # white space may turn out to be the end of the reasoning
                self._held = before[len(kept) :] + tail
                self._give(out, "reasoning", kept)
        if self._state == "content":
            text, self._held = self._held, ""
            self._give(out, "content", text)
        return out

    def finish(self) -> list[Piece]:
        """See Reader."""
        out: list[Piece] = []
        kind = "reasoning" if self._state == "reasoning" else "content"
        self._give(out, kind, self._held)
        self._held = ""
        return out

    def _give(self, out: list[Piece], kind: str, text: str) -> None:
        if self._bare:
            text = text.lstrip()
        if text:
            self._bare = False
            out.append(Piece("reasoning" if kind == "reasoning" else "content", text))
