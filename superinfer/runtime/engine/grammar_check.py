"""Which grammars an engine takes: bounds on their size, and JSON schemas and expressions of which all is honoured.

The library that compiles them passes over keywords it does not know, takes `\\Z` for the letter, and leaves out a
lookahead. An output that breaks `uniqueItems` is not what was asked for, so what would be passed over is refused here,
by name.
"""

from __future__ import annotations

import json
import re
from typing import Any

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.engine.structural_tag import Format, check_format
from superinfer.runtime.protocol import Grammar

MAX_SOURCE = 1 << 16  # characters
MAX_DEPTH = 64  # of brackets: parsers of grammars recurse
FORMATS = frozenset({"date", "time", "date-time", "uuid", "ipv4", "email"})

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
_COMBINERS = ("anyOf", "oneOf", "allOf", "$ref", "enum", "const")
_BY_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
# A class, an escaped character, or the beginning of a group.
_PIECE = re.compile(r"(?P<members>\[\^?(?:\\.|[^\]\\])*\])|\\(?P<escape>.)|(?P<group>\(\?.{0,2})", re.DOTALL)
_ESCAPES = "dDwWsSntrfv0xu"  # of letters and digits; in a class \b too
_KNOWN = {"type", *_COMBINERS, *_ANNOTATIONS, *(word for words in _BY_TYPE.values() for word in words)}


def check_grammar(grammar: Grammar) -> None:
    """Raises InvalidRequestError (malformed or too large), UnsupportedError (a keyword that would not be honoured)."""
    source = grammar.source
    if len(source) > MAX_SOURCE:
        raise InvalidRequestError(
            f"the {grammar.kind} has {len(source)} characters; at most {MAX_SOURCE} are taken: make it smaller"
        )
    depth = _depth(source)
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"the {grammar.kind} is nested {depth} deep; at most {MAX_DEPTH} levels are taken")
    if grammar.kind == "regex":
        _check_expression(source, "regex")
    if grammar.kind in ("json_schema", "structural_tag"):
        try:
            found = json.loads(source)
        except ValueError as error:
            raise InvalidRequestError(f"{grammar.kind}={source!r:.80} is not JSON: {error}") from None
        if grammar.kind == "json_schema":
            _check_schema(found, "json_schema", found)
        else:
            check_format(found, "structural_tag", _check_leaf)


def _check_leaf(given: Format, where: str) -> None:
    """A structural tag's format that holds no others."""
    if given["type"] == "regex":
        _check_expression(given["pattern"], f"{where}.pattern")
    if given["type"] == "json_schema":
        _check_schema(given["json_schema"], f"{where}.json_schema", given["json_schema"])


def _depth(source: str) -> int:
    """The deepest nesting of brackets, those in texts and character classes included."""
    depth = deepest = 0
    for character in source:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _check_schema(schema: Any, where: str, root: Any) -> None:
    if isinstance(schema, bool):
        if not schema:
            raise UnsupportedError(f"{where}=false allows nothing; leave it out")
        return
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{where}={schema!r:.80} is not a schema; give an object")
    for word in schema:
        if word not in _KNOWN:
            raise UnsupportedError(f"{where}: keyword {word!r} is not supported by this engine; leave it out")
    _check_combination(schema, where)
    _check_words(schema, where, root)
    for word in ("$defs", "definitions", "properties"):
        inner = schema.get(word, {})
        if not isinstance(inner, dict):
            raise InvalidRequestError(f"{where}.{word}={inner!r:.80} is not an object")
        for name, value in inner.items():
            _check_schema(value, f"{where}.{word}.{name}", root)
    for word in [word for word in ("anyOf", "oneOf", "allOf", "prefixItems") if word in schema]:
        inner = schema[word]
        if not isinstance(inner, list) or not inner:
            raise InvalidRequestError(f"{where}.{word}={inner!r:.80} is not a list of schemas")
        for at, value in enumerate(inner):
            _check_schema(value, f"{where}.{word}[{at}]", root)
    for word in ("items", "additionalProperties"):
        if not isinstance(schema.get(word, True), bool):
            _check_schema(schema[word], f"{where}.{word}", root)


def _check_combination(schema: dict[str, Any], where: str) -> None:
    """Words that the compiler would honour alone, but not together."""
    words = set(schema) - _ANNOTATIONS
    combiner = next((word for word in _COMBINERS if word in schema), None)
    if combiner is not None:
        others = words - {combiner}
        if combiner in ("enum", "const"):
            others -= {"type"}
        if others:
            raise UnsupportedError(
                f"{where}: {combiner!r} beside {sorted(others)[0]!r} is not supported; move one away"
            )
        return
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or any(name not in _BY_TYPE for name in types):
        raise InvalidRequestError(f"{where}.type={schema['type']!r:.80} is not one of {', '.join(sorted(_BY_TYPE))}")
    allowed = {"type"}.union(*(_BY_TYPE[name] for name in types))
    for word in sorted(words - allowed):
        raise UnsupportedError(f"{where}: {word!r} without the 'type' it belongs to is not supported; add the type")
    narrowed = [word for word in ("pattern", "format") if word in schema]
    if narrowed and len(words & _BY_TYPE["string"]) > 1:
        raise UnsupportedError(f"{where}: {narrowed[0]!r} beside another word on strings is not supported; give one")


def _check_words(schema: dict[str, Any], where: str, root: Any) -> None:
    if len(schema.get("allOf", ())) > 1:
        raise UnsupportedError(f"{where}.allOf with several schemas is not supported; write them as one")
    if "oneOf" in schema and "discriminator" not in schema:
        kinds = [branch.get("type") if isinstance(branch, dict) else None for branch in schema["oneOf"]]
        apart = all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds)
        if not apart or {"integer", "number"} <= set(kinds):
            raise UnsupportedError(f"{where}.oneOf with branches that may overlap is not supported; use anyOf")
    name = schema.get("format")
    if name is not None and name not in FORMATS:
        raise UnsupportedError(f"{where}.format={name!r:.80} is not supported; use one of {', '.join(sorted(FORMATS))}")
    if isinstance(pattern := schema.get("pattern"), str):
        _check_expression(pattern, f"{where}.pattern")
    reference = schema.get("$ref")
    if reference is not None:
        _resolve(reference, where, root)


def _check_expression(expression: str, where: str) -> None:
    for piece in _PIECE.finditer(expression):
        group = piece["group"]
        if group is not None and not group.startswith("(?:") and (group[2:3] != "<" or group[3:] in ("=", "!")):
            raise UnsupportedError(
                f"{where}: {group!r} in {expression!r:.80} is not supported: neither lookaround nor flags are; groups "
                "are (...), (?:...) and (?<name>...)"
            )
        known = _ESCAPES + "b" if piece["members"] else _ESCAPES
        escapes = re.findall(r"\\(.)", piece["members"], re.DOTALL) if piece["members"] else piece["escape"] or ""
        for letter in escapes:
            if letter.isascii() and letter.isalnum() and letter not in known:
                raise UnsupportedError(
                    f"{where}: \\{letter} in {expression!r:.80} is not supported; write the character by its number, "
                    "e.g. \\x07, or leave it out: an expression holds for the whole text, as with anchors around it"
                )


def _resolve(reference: Any, where: str, root: Any) -> None:
    found = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise UnsupportedError(f"{where}.$ref={reference!r:.80} is not supported: only '#/...' within the schema is")
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or part not in found:
            raise InvalidRequestError(f"{where}.$ref={reference!r:.80} points to nothing")
        found = found[part]
