"""Structural tags, xgrammar's way to compose what an output may be: those of their formats that are taken here, and the
JSON schemas within. Pure Python.

A format is a JSON object with a `type`: `const_string`, `token` (one token by its id), `json_schema`, `regex`,
`grammar` (EBNF), or one made of others: `sequence`, `or`, `optional`, `plus`, `tag` (begin, content, end),
`tags_with_separator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from superinfer.errors import InvalidRequestError, UnsupportedError

Format = dict[str, Any]

# What each kind must, and may, have beside its type, with what Python type of value.
_Fields = dict[str, type | tuple[type, ...]]
_FIELDS: dict[str, tuple[_Fields, _Fields]] = {
    "const_string": ({"value": str}, {}),
    "token": ({"token": int}, {}),
    "json_schema": ({"json_schema": (dict, bool)}, {}),
    "regex": ({"pattern": str}, {}),
    "grammar": ({"grammar": str}, {}),
    "sequence": ({"elements": list}, {}),
    "or": ({"elements": list}, {}),
    "optional": ({"content": dict}, {}),
    "plus": ({"content": dict}, {}),
    "tag": ({"begin": str, "content": dict, "end": str}, {}),
    "tags_with_separator": ({"tags": list, "separator": str}, {"at_least_one": bool, "stop_after_first": bool}),
}


def check_format(given: Any, where: str, leaf: Callable[[Format, str], None]) -> None:
    """Raises InvalidRequestError (malformed), UnsupportedError (a kind or field that is not taken), and what `leaf`
    raises, which is called with each format that holds no others, and its place."""
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise InvalidRequestError(f"{where}={given!r:.80} is no format; give an object with a type")
    kind = given["type"]
    if kind not in _FIELDS:
        raise UnsupportedError(f"{where}.type={kind!r:.80} is not supported; use one of {', '.join(_FIELDS)}")
    must, may = _FIELDS[kind]
    for name in given.keys() - must.keys() - may.keys() - {"type"}:
        raise UnsupportedError(f"{where}.{name} is not supported in a {kind}; leave it out")
    for name, wanted in (must | may).items():
        value = given.get(name)
        if name in must and name not in given:
            raise InvalidRequestError(f"{where}.{name} is missing; add it")
        if name in given and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            raise InvalidRequestError(f"{where}.{name}={value!r:.80} is of the wrong type")
    inner = list(_inner(given, where))
    if given.get("elements", given.get("tags")) == []:
        raise InvalidRequestError(f"{where} of type {kind!r} is empty; give at least one")
    for one, place in inner:
        check_format(one, place, leaf)
        if kind == "tags_with_separator" and one["type"] != "tag":
            raise InvalidRequestError(f"{place}.type={one['type']!r} is not 'tag'")
    if not inner:
        leaf(given, where)


def with_leaves(given: Format, change: Callable[[Format], Format]) -> Format:
    """A copy in which each format that holds no others is what `change` makes of it."""
    found = dict(given)
    for name in ("elements", "tags"):
        if name in given:
            found[name] = [with_leaves(one, change) for one in given[name]]
    if "content" in given:
        found["content"] = with_leaves(given["content"], change)
    return found if _has_inner(given) else change(found)


class Placed(NamedTuple):
    """A JSON schema, and a text that tells what stands before it."""

    before: str
    schema: Any


def schemas_of(given: Format, before: str = "") -> list[Placed]:
    """The JSON schemas of a checked format, in order."""
    match given["type"]:
        case "json_schema":
            return [Placed(before, given["json_schema"])]
        case "sequence":
            found: list[Placed] = []
            for one in given["elements"]:
                found += schemas_of(one, before)
                before += _fixed(one)
            return found
        case "tag":
            return schemas_of(given["content"], before + given["begin"])
        case _:
            return [placed for one, _ in _inner(given, "") for placed in schemas_of(one, before)]


def _fixed(given: Format) -> str:
    """A fixed text, with signs for a token and for anything else."""
    match given["type"]:
        case "const_string":
            return str(given["value"])
        case "token":
            return f"\0{given['token']}\0"
        case "sequence":
            return "".join(map(_fixed, given["elements"]))
        case _:
            return "\1"


def _has_inner(given: Format) -> bool:
    return not {"elements", "tags", "content"}.isdisjoint(given)


def _inner(given: Format, where: str) -> Iterator[tuple[Any, str]]:
    """The formats directly within, each with its place."""
    for name in ("elements", "tags"):
        for at, one in enumerate(given.get(name, ())):
            yield one, f"{where}.{name}[{at}]"
    if "content" in given:
        yield given["content"], f"{where}.content"
