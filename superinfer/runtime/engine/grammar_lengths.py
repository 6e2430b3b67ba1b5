"""Long texts of bounded length in JSON schemas: compiled without their bound, which is kept by counting.

A bound that the compiler unfolds costs it time for each character. Here the grammar has a text of any length instead,
behind a sign that says which bound it has: a control character, which JSON never has. Whoever follows the grammar takes
the sign in as soon as a text has begun (`grammar_matcher`), counts from there, and near the end forbids the tokens that
are too long. So the time to compile does not depend on the bound, and it is kept to the character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from superinfer.runtime.engine.grammar_rewrite import are_lengths
from superinfer.runtime.engine.structural_tag import Format, Placed, schemas_of, with_leaves
from superinfer.runtime.json_schema import with_inner
from superinfer.runtime.protocol import Grammar

LONG = 100  # characters; shorter bounds are unfolded

_SIGNS = "".join(chr(code) for code in range(1, 0x20) if chr(code) not in "\t\n\r")  # one for each bound of a grammar
_MARK = "@@long text {}@@"  # stands for the sign and the text in a schema, where no sign can
_MARKED = re.compile(r'Regex\("\^@@long text (\d+)@@\$", json_string=true\)')
# What JSON has in a text, each one character, but for characters by their number: those need no escape.
_TEXT = r'([ -!#-[\]-\ud7ff\ue000-\U0010ffff] | "\\" ["\\/bfnrt])*'
_WITH_TEXTS = {"object", "array", "string"}


class Bound(NamedTuple):
    """Characters of a text; most: None for no limit."""

    least: int
    most: int | None


def without_long(grammar: Grammar) -> tuple[Grammar, list[Bound]]:
    """The grammar with marks in place of its long bounded texts, and their bounds in the marks' order.

    None are replaced where a text may be read in two ways, only one of which has the bound: the grammar's own branches
    could not be told apart by a sign.
    """
    if grammar.kind not in ("json_schema", "structural_tag") or "@@long text" in grammar.source:
        return grammar, []
    found = json.loads(grammar.source)
    tag: Format = {"type": "json_schema", "json_schema": found} if grammar.kind == "json_schema" else found
    if _may_be_confused(schemas_of(tag)):
        return grammar, []
    bounds: list[Bound] = []

    def leaf(given: Format) -> Format:
        is_schema = given["type"] == "json_schema"
        return given | {"json_schema": _marked(given["json_schema"], bounds)} if is_schema else given

    tag = with_leaves(tag, leaf)
    source = json.dumps(tag["json_schema"] if grammar.kind == "json_schema" else tag)
    return (Grammar(kind=grammar.kind, source=source), bounds) if bounds else (grammar, [])


def _may_be_confused(schemas: list[Placed]) -> bool:
    """Whether what has been written may leave open which of several schemas it follows, of one of these or of two
    behind the same text."""
    seen: list[tuple[str, set[_Kind]]] = []
    for before, schema in schemas:
        beginnings = _Beginnings(schema)
        if beginnings.may_be_two(schema):
            return True
        kinds = beginnings.of(schema)
        if any(before == other and _overlap(kinds, theirs) for other, theirs in seen):
            return True
        seen.append((before, kinds))
    return False


def _overlap(some: set[_Kind], others: set[_Kind]) -> bool:
    return any(one.may_be(other) for one in some for other in others)


def with_signs(ebnf: str) -> str:
    """A grammar as the compiler prints it, with signs and texts in place of marks."""
    return _MARKED.sub(lambda mark: f'"\\u{ord(sign_of(int(mark[1]))):04x}" {_TEXT}', ebnf)


def sign_of(number: int) -> str:
    """What stands before the texts of bound `number`."""
    return _SIGNS[number]


class Piece(NamedTuple):
    """What bytes add to a text. characters: that begin in them; an escape is one, which begins with its backslash.
    ends: whether a quote ends the text in them. escapes: whether they end behind a backslash."""

    characters: int
    ends: bool
    escapes: bool


def piece_of(written: bytes, escaped: bool) -> Piece:
    """escaped: a backslash stands before them."""
    count = 0
    for byte in written:
        if escaped:
            escaped = False
        elif byte == 0x22:
            return Piece(count, True, False)
        else:
            escaped = byte == 0x5C
            count += byte & 0xC0 != 0x80
    return Piece(count, False, escaped)


class TokenLengths:
    """How many characters of a text each token of a vocabulary has: up to the quote that ends it, if one does."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        """vocabulary: the bytes of each token id."""
        self.vocabulary = vocabulary
        pieces = [[piece_of(token, escaped) for token in vocabulary] for escaped in (False, True)]
        self._characters = np.array([[piece.characters for piece in each] for each in pieces])
        self._ends = np.array([[piece.ends for piece in each] for each in pieces])
        self._longest = int(self._characters.max(initial=0))
        self._at_most: dict[tuple[bool, int], np.ndarray] = {}
        self._at_least: dict[tuple[bool, int], np.ndarray] = {}
        # A token that ends within a sign would step over it.
        self.meet_signs = any(b'"' + sign.encode() in token for token in vocabulary for sign in _SIGNS)

    def narrow(self, bits: np.ndarray, escaped: bool, least: int, most: int | None) -> None:
        """Forbid what would make a text too long, or end it too early. bits: [vocab / 32] uint32, of a mask.
        escaped: the text ends behind a backslash. least, most: characters that must, and may, still come."""
        characters, ends = self._characters[int(escaped)], self._ends[int(escaped)]
        if most is not None and most < self._longest:
            key = escaped, most
            if key not in self._at_most:
                self._at_most[key] = self._packed(characters <= most, len(bits))
            bits &= self._at_most[key]
        if least > 0:
            key = escaped, min(least, self._longest + 1)
            if key not in self._at_least:
                self._at_least[key] = self._packed(~ends | (characters >= key[1]), len(bits))
            bits &= self._at_least[key]

    def _packed(self, allowed: np.ndarray, words: int) -> np.ndarray:
        found = np.zeros(words * 32, dtype=bool)
        found[: len(allowed)] = allowed
        return np.packbits(found, bitorder="little").view(np.uint32)


def _marked(schema: Any, bounds: list[Bound]) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = with_inner(schema, lambda within: _marked(within, bounds))
    least, most = found.get("minLength", 0), found.get("maxLength")
    if ("minLength" in found or "maxLength" in found) and are_lengths(least, most) and max(least, most or 0) > LONG:
        bound = Bound(least, most)
        if bound not in bounds:
            if len(bounds) == len(_SIGNS):
                return found  # unfolded, as a short one
            bounds.append(bound)
        found.pop("minLength", None)
        found.pop("maxLength", None)
        found["pattern"] = f"^{_MARK.format(bounds.index(bound))}$"
    return found


class _Kind(NamedTuple):
    """What values begin like. name: JSON schema's. key, value: an object's first; None: any."""

    name: str
    key: str | None = None
    value: str | None = None

    def may_be(self, other: _Kind) -> bool:
        """Whether a value may begin like both, and hold texts."""
        if self.name != other.name or self.name not in _WITH_TEXTS:
            return False
        return all(None in pair or pair[0] == pair[1] for pair in zip(self[1:], other[1:], strict=True))


_ANY = {_Kind(name) for name in _WITH_TEXTS}


class _Beginnings:
    """How the values of a schema, and of what it refers to, may begin."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[str, set[_Kind]] = {}  # by reference; each is followed once, however often it is named

    def may_be_two(self, schema: Any) -> bool:
        """Whether what has been written of a value may leave open which of several schemas it follows."""
        if not isinstance(schema, dict):
            return False
        for word in ("anyOf", "oneOf"):
            seen: set[_Kind] = set()
            for kinds in map(self.of, schema.get(word, ())):
                if _overlap(kinds, seen):
                    return True
                seen |= kinds
        if schema.get("properties") and schema.get("additionalProperties", False) is not False:
            return True  # a key may be a property's or another's
        within: list[Any] = []
        with_inner(schema, within.append)
        return any(map(self.may_be_two, within))

    def of(self, schema: Any) -> set[_Kind]:
        """In all ways that matter, where it is not certain."""
        if not isinstance(schema, dict):
            return _ANY
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema:
                return set().union(*map(self.of, schema[word]))
        if "enum" in schema or "const" in schema:
            known: dict[type, str] = {str: "string", dict: "object", list: "array"}
            return {_Kind(known.get(type(value), "other")) for value in _values(schema)}
        names = schema.get("type", sorted(_WITH_TEXTS))
        names = {names} if isinstance(names, str) else set(names)
        found = {_Kind(name) for name in names - {"object"}}
        return found | _objects(schema) if "object" in names else found

    def _referred(self, reference: str) -> set[_Kind]:
        if reference not in self._known:
            self._known[reference] = _ANY  # of one that comes back to itself before anything is written
            found = self._root
            for part in reference[1:].split("/")[1:]:
                found = found[part.replace("~1", "/").replace("~0", "~")]
            self._known[reference] = self.of(found)
        return self._known[reference]


def _objects(schema: dict[str, Any]) -> set[_Kind]:
    """How objects of a schema may begin: with their first property, where they must have it, and its constant."""
    first = next(iter(schema.get("properties", ())), None)
    if first is None or first not in schema.get("required", ()):
        return {_Kind("object")}
    inner = schema["properties"][first]
    constant = isinstance(inner, dict) and ("enum" in inner or "const" in inner)
    return (
        {_Kind("object", first, json.dumps(value)) for value in _values(inner)}
        if constant
        else {_Kind("object", first)}
    )


def _values(schema: dict[str, Any]) -> list[Any]:
    found: list[Any] = schema.get("enum", [schema.get("const")])
    return found
