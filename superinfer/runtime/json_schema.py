"""A JSON schema and the schemas within it. Pure Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAPS = ("$defs", "definitions", "properties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def with_inner(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy in which each schema directly within is what `change` makes of it; what is malformed stays as it is."""
    found = dict(schema)
    for word, value in schema.items():
        if word in _MAPS and isinstance(value, dict):
            found[word] = {name: change(one) for name, one in value.items()}
        elif word in _LISTS and isinstance(value, list):
            found[word] = [change(one) for one in value]
        elif word in _SINGLE:
            found[word] = change(value)
    return found


def standing_at(place: str, schema: Any) -> Any:
    """A schema that is part of another, there: its references to parts of itself are made to point to them.

    place: "#/...", where it stands.
    """
    if not isinstance(schema, dict):
        return schema
    found = with_inner(schema, lambda within: standing_at(place, within))
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = place + reference[1:]
    return found
