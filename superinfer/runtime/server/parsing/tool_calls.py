"""Tool calls as the model families write them, found in text that comes piece by piece.

What only looked like a call is given out as text. White space around calls is left out.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import ClassVar

from superinfer.runtime.server.parsing.json_call import JsonCall, JsonObject
from superinfer.runtime.server.parsing.pieces import Piece
from superinfer.runtime.text import split_at_stop


class _Spaces:
    """Holds white space after a call until text follows it."""

    def __init__(self) -> None:
        self._after_call = False
        self._held = ""

    def content(self, text: str) -> list[Piece]:
        if self._after_call and not text.strip():
            self._held += text
            return []
        text, self._held, self._after_call = self._held + text, "", False
        return [Piece("content", text)] if text else []

    def call(self) -> None:
        self._after_call, self._held = True, ""


class TaggedReader:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen and many others."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: frozenset[str]) -> None:
        self._held = ""
        self._call: JsonCall | None = None
        self._spaces = _Spaces()

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        self._held += text
        out: list[Piece] = []
        while self._held:
            if self._call is not None:
                if not self._inside(out):
                    break
                continue
            before, tail, tag = split_at_stop(self._held, (self.OPEN,))
            self._held = self._held[len(before) + len(self.OPEN) :] if tag else tail
            out += self._spaces.content(before)
            if tag is None:
                break
            self._call = JsonCall()
        return out

    def _inside(self, out: list[Piece]) -> bool:
        """Reads on in a call; False where more text is needed."""
        call = self._call
        assert call is not None
        if not call.done and not call.hopeless:
            text, self._held = self._held, ""
            out += call.push(text)
            if call.begun:
                self._spaces.call()
            if not call.done and not call.hopeless and (call.begun or self.CLOSE not in call.rest):
                return False
        self._held, call.rest = call.rest + self._held, ""
        body, closed, rest = self._held.partition(self.CLOSE)
        if not closed:
            if call.done and not self.CLOSE.startswith(body.strip()[: len(self.CLOSE)]):
                self._call = None  # the closing tag was forgotten
                return True
            call.rest, self._held = self._held, ""
            if not call.done:
                call.hopeless = True  # wait for the tag, to give all of it out as text
            return False
        if not call.done:
            out += self._spaces.content(f"{self.OPEN}{body}{self.CLOSE}")
        self._call, self._held = None, rest
        return True

    def finish(self) -> list[Piece]:
        """See Reader."""
        call, self._call = self._call, None
        held = self._held
        if call is not None:
            held = "" if call.begun else self.OPEN + call.rest + self._held
        self._held = ""
        return self._spaces.content(held) if held else []


class JsonReader:
    """The whole answer is calls, `{"name": ..., "parameters": {...}}`, several joined by `;` or in a list: Llama 3."""

    TAG = "<|python_tag|>"

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._before = ""  # what stood before a call that may be none
        self._call: JsonCall | None = None
        self._plain = self._called = False

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        if self._plain:
            return [Piece("content", text)] if text else []
        self._held += text
        out: list[Piece] = []
        while self._held and not self._plain:
            if self._call is None and not self._begin():
                break
            if self._call is None:
                continue
            text, self._held = self._held, ""
            out += self._call.push(text)
            if self._call.done:
                self._held, self._call, self._called = self._call.rest, None, True
            elif self._call.hopeless:
                self._held, self._call, self._plain = self._before + self._call.rest, None, True
        if self._plain and self._held:
            out.append(Piece("content", self._held))
            self._held = ""
        return out

    def _begin(self) -> bool:
        """Whether the held text begins a call, or is known to be none; False where more text is needed."""
        start = self._held.lstrip()
        if not self._called and self.TAG.startswith(start[: len(self.TAG)]) and len(start) < len(self.TAG):
            return False
        text = start.removeprefix(self.TAG) if start.startswith(self.TAG) else self._held
        start = text.lstrip(" \n\t;,[]") if self._called else text.lstrip()
        if not start:
            return False
        if start[0] != "{" and not (self._called or start[0] == "["):
            self._plain = True
            return True
        if start[0] == "[":
            start = start[1:].lstrip()
            if not start:
                return False
            if start[0] != "{":
                self._plain = True
                return True
        self._held, self._before = start, "" if self._called else text[: len(text) - len(start)]
        self._call = JsonCall(self._names)
        return True

    def finish(self) -> list[Piece]:
        """See Reader."""
        call, self._call = self._call, None
        # What was cut off in the head of a call behind others is no text of the answer.
        held = ("" if call.begun or self._called else self._before + call.rest) if call is not None else self._held
        self._held = ""
        return [Piece("content", held)] if held.strip() and not (self._called and not held.strip(" \n\t;,[]")) else []


class MistralReader:
    """`[TOOL_CALLS]` and then a list of `{"name", "arguments"}`, or `name[ARGS]{...}` for each: Mistral and Mixtral."""

    TAG = "[TOOL_CALLS]"
    _NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]+)?\[ARGS\]\s*(?=\{)")

    def __init__(self, names: frozenset[str]) -> None:
        self._held = ""
        self._list: JsonReader | None = None
        self._arguments: JsonObject | None = None
        self._inside = False
        self._spaces = _Spaces()

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        self._held += text
        out: list[Piece] = []
        while self._held:
            if self._arguments is not None:
                end = self._arguments.end(self._held)
                given = self._held if end < 0 else self._held[:end]
                self._held = self._held[len(given) :]
                out.append(Piece("arguments", given))
                if end >= 0:
                    self._arguments, self._inside = None, False
            elif self._list is not None:
                text, self._held = self._held, ""
                out += self._list.push(text)
            elif self._inside:
                if not self._begin(out):
                    break
            else:
                before, tail, tag = split_at_stop(self._held, (self.TAG,))
                self._held = self._held[len(before) + len(self.TAG) :] if tag else tail
                self._inside = tag is not None
                out += self._spaces.content(before)
                if tag is None:
                    break
        return out

    def _begin(self, out: list[Piece]) -> bool:
        if self._held.lstrip()[:1] in ("[", "{"):
            self._list = JsonReader(_ANY)
            return True
        if name := self._NAME.match(self._held):
            out.append(Piece("call", name[1]))
            self._spaces.call()
            self._held, self._arguments = self._held[name.end() :], JsonObject()
            return True
        return False

    def finish(self) -> list[Piece]:
        """See Reader."""
        held, self._held = (self.TAG if self._inside and self._list is None else "") + self._held, ""
        out = self._list.finish() if self._list is not None else []
        return out + (self._spaces.content(held) if held and self._arguments is None else [])


class _Any(frozenset[str]):
    """Any name is one of the tools'."""

    def __contains__(self, name: object) -> bool:
        return True


_ANY = _Any()


class PythonicReader:
    """The whole answer is a list of Python calls with literal arguments, `[f(a=1), g()]`: Llama 3.2 and 4. Literals
    may be JSON's: `true`, and escapes that Python does not have.

    Held until it is complete: Python's literals become JSON only as a whole.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._plain = False

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        self._held += text
        start = self._held.lstrip()
        if not self._plain and (not start or start[0] == "["):
            return []
        self._plain = True
        text, self._held = self._held, ""
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        """See Reader."""
        held, self._held = self._held, ""
        if self._plain or not held.strip():
            return []
        try:
            calls = [self._call(node, held.strip()) for node in _elements(held)]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [Piece("content", held)]
        return [piece for call in calls for piece in call]

    def _call(self, node: ast.expr, source: str) -> tuple[Piece, Piece]:
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("not a call with named arguments")
        name = ast.unparse(node.func)
        if name not in self._names:
            raise ValueError("not one of the tools")
        literals = _JsonLiterals(source)
        arguments = {str(k.arg): ast.literal_eval(literals.visit(k.value)) for k in node.keywords}
        try:
            return Piece("call", name), Piece("arguments", json.dumps(arguments, ensure_ascii=False))
        except TypeError as error:
            raise ValueError("a literal that JSON does not have") from error


class _JsonLiterals(ast.NodeTransformer):
    """Literals that are JSON's become Python's."""

    _NAMES: ClassVar = {"true": True, "false": False, "null": None}

    def __init__(self, source: str) -> None:
        self._source = source

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._NAMES[node.id]) if node.id in self._NAMES else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str) or "\\" not in self._source:
            return node
        try:
            value = json.loads(ast.get_source_segment(self._source, node) or "")
        except ValueError:
            return node
        return ast.Constant(value) if isinstance(value, str) else node


def _elements(text: str) -> list[ast.expr]:
    with warnings.catch_warnings():  # of escapes that are JSON's
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(text.strip(), mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("not a list")
    return tree.elts


class NamedReader:
    """The whole answer is the arguments of one call: how a named tool_choice is constrained."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[Piece]:
        """See Reader."""
        if not text:
            return []
        begun, self._begun = self._begun, True
        return [*([] if begun else [Piece("call", self._name)]), Piece("arguments", text)]

    def finish(self) -> list[Piece]:
        """See Reader."""
        return []
