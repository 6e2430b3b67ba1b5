"""One tool call as JSON, `{"name": ..., "arguments": {...}}`, whose arguments are given out while they come."""

from __future__ import annotations

import json
import re

from superinfer.runtime.server.parsing.pieces import Piece

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\s*\{\s*(?:"(\w*)"|[^\s"])')
_KEYS = ("name", "arguments", "parameters", "type")


class JsonObject:
    """Finds the end of a JSON object (or array) that comes bit by bit, without parsing it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def end(self, text: str) -> int:
        """How many characters of `text` belong to it; -1 where it goes on after them. Its first character opens it."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return -1


class JsonCall:
    """A call being read. `names`: the tools there are; a call to another one is none. None: any name will do.

    done: all of it was read, and `rest` follows it. hopeless: it is no call, and `rest` is all that was pushed.
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self._names = names
        self._arguments: JsonObject | None = None
        self._closing = False
        self.rest = ""
        self.done = self.hopeless = False

    @property
    def begun(self) -> bool:
        """Whether its name was given out: then it is a call whatever follows."""
        return self._arguments is not None or self.done

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""
        out: list[Piece] = []
        self.rest += text
        if self._arguments is None and not self._head(out, text):
            return out
        if not self._closing and self._arguments is not None:
            end = self._arguments.end(self.rest)
            given = self.rest if end < 0 else self.rest[:end]
            self.rest = self.rest[len(given) :]
            if given:
                out.append(Piece("arguments", given))
            self._closing = end >= 0
        if self._closing:
            after = self.rest.lstrip()
            if after:  # the brace that closes the call; other keys after the arguments do not occur
                self.rest = after[1:] if after[0] == "}" else after
                self.done = True
        return out

    def _head(self, out: list[Piece], new: str) -> bool:
        if head := _HEAD.match(self.rest):
            name = json.loads(head[1])
            if self._names is None or name in self._names:
                out.append(Piece("call", name))
                self._arguments = JsonObject()
                self.rest = self.rest[head.end() :]
                return True
            self.hopeless = True
        elif self._cannot_be():
            self.hopeless = True
        elif "}" in new:
            self._whole(out)
        return False

    def _cannot_be(self) -> bool:
        if (key := _FIRST_KEY.match(self.rest)) and key[1] not in _KEYS:
            return True
        return bool(self.rest.strip()) and not self.rest.lstrip().startswith("{")

    def _whole(self, out: list[Piece]) -> None:
        """Keys in another order, or no arguments: read at once when complete."""
        text = self.rest.lstrip()
        try:
            call, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return  # not complete yet, or never
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict) or (self._names and name not in self._names):
            self.hopeless = True
            return
        out += [Piece("call", name), Piece("arguments", json.dumps(arguments, ensure_ascii=False))]
        self.rest, self.done = text[end:], True


def _object(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
