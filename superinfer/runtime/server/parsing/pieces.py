"""The pieces an answer is made of, and the chain of readers that finds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from superinfer.runtime.text import split_at_stop

Kind = Literal["reasoning", "content", "call", "arguments"]


class Piece(NamedTuple):
    """A part of an answer. "call" begins a tool call and holds its name; "arguments" holds more of its JSON."""

    kind: Kind
    text: str


class Reader(Protocol):
    """Finds pieces in text that comes bit by bit. What it gives out is certain: nothing is taken back."""

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""

    def finish(self) -> list[Piece]:
        """What was held back when the text ended."""


class PlainReader:
    """All is content."""

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        """See Reader."""
        return []


class OpeningReader:
    """For an answer that is calls from its beginning on, or none, whatever its text holds further on."""

    def __init__(self, marker: str, calls: Reader) -> None:
        """`marker`: what `calls` begin with."""
        self._marker, self._calls = marker, calls
        self._held = ""
        self._chosen: Reader | None = None

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        if self._chosen is None:
            text = self._held = self._held + text
            if len(text) < len(self._marker) and self._marker.startswith(text):
                return []
            self._chosen = self._calls if text.startswith(self._marker) else PlainReader()
        return self._chosen.push(text)

    def finish(self) -> list[Piece]:
        """See Reader."""
        if self._chosen is None:
            return PlainReader().push(self._held)
        return self._chosen.finish()


class SpecialFilter:
    """Leaves special tokens' text out, for formats whose markers are special tokens and must be seen."""

    def __init__(self, drop: tuple[str, ...]) -> None:
        self._drop = drop
        self._held = ""

    def push(self, text: str) -> str:
        """The text without them; an end that may become one is held."""
        self._held += text
        out = []
        while self._held:
            before, tail, found = split_at_stop(self._held, self._drop)
            out.append(before)
            self._held = self._held[len(before) + len(found) :] if found else tail
            if not found:
                break
        return "".join(out)

    def finish(self) -> str:
        """What was held."""
        text, self._held = self._held, ""
        return text


class AnswerReader:
    """Special tokens out, then reasoning, then tool calls; neighbouring pieces of one kind are joined."""

    def __init__(
        self, special: SpecialFilter | None, reasoning: Reader | None, tools: Reader, *, one_call: bool
    ) -> None:
        """`one_call`: what follows the first tool call is left out.

        thought: the reasoning found so far; None where none is looked for.
        """
        self._special, self._reasoning, self._tools, self._one_call = special, reasoning, tools, one_call
        self.calls = 0
        self.thought: list[str] | None = [] if reasoning is not None else None

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        if self._special is not None:
            text = self._special.push(text)
        return self._joined(self._read(text))

    def finish(self) -> list[Piece]:
        """See Reader."""
        pieces = self._read(self._special.finish()) if self._special is not None else []
        if self._reasoning is not None:
            pieces += self._route(self._reasoning.finish())
        return self._joined(pieces + self._tools.finish())

    def _read(self, text: str) -> list[Piece]:
        if self._reasoning is None:
            return self._tools.push(text)
        return self._route(self._reasoning.push(text))

    def _route(self, pieces: Iterable[Piece]) -> list[Piece]:
        out = []
        for piece in pieces:
            if piece.kind == "reasoning" and self.thought is not None:
                self.thought.append(piece.text)
            out += [piece] if piece.kind == "reasoning" else self._tools.push(piece.text)
        return out

    def _joined(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            self.calls += piece.kind == "call"
            if self._one_call and (self.calls > 1 or (self.calls == 1 and piece.kind == "content")):
                continue
            if out and piece.kind == out[-1].kind and piece.kind != "call":
                out[-1] = Piece(piece.kind, out[-1].text + piece.text)
            else:
                out.append(piece)
        return out
