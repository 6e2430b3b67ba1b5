"""What `superinfer bench constrained` has a model write: JSON of bounded length, so that random weights end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

if TYPE_CHECKING:
    from superinfer.runtime.tokenization import Tokenizer

Short = Annotated[str, msgspec.Meta(min_length=1, max_length=16)]


class Person(msgspec.Struct, forbid_unknown_fields=True):
    """Short texts, numbers, a choice: what extraction is mostly asked for."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=24)]
    age: Annotated[int, msgspec.Meta(ge=0, le=120)]
    role: Literal["engineer", "designer", "manager", "analyst"]
    tags: Annotated[list[Short], msgspec.Meta(min_length=2, max_length=2)]
    active: bool


class Team(msgspec.Struct, forbid_unknown_fields=True):
    """Some 300 tokens."""

    team: Short
    people: Annotated[list[Person], msgspec.Meta(min_length=6, max_length=6)]


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers mostly."""

    article: Short
    count: Annotated[int, msgspec.Meta(ge=1, le=999)]
    cents: Annotated[int, msgspec.Meta(ge=0, le=99999)]


class Invoice(msgspec.Struct, forbid_unknown_fields=True):
    """Some 300 tokens."""

    number: Annotated[int, msgspec.Meta(ge=1, le=999999)]
    currency: Literal["EUR", "USD", "JPY"]
    paid: bool
    lines: Annotated[list[Line], msgspec.Meta(min_length=10, max_length=10)]


SCHEMAS: tuple[type[msgspec.Struct], ...] = (Team, Invoice)


def wrong_outputs(tokenizer: Tokenizer, outputs: list[list[int]], ends: list[str]) -> list[str]:
    """Texts that their schema does not take, or that were cut off."""
    found = []
    for at, (ids, end) in enumerate(zip(outputs, ends, strict=True)):
        text = tokenizer.decode(ids)
        try:
            msgspec.json.decode(text, type=SCHEMAS[at % len(SCHEMAS)])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            found.append(f"{error}: {text}")
        else:
            if end != "stop":
                found.append(f"ended by {end}: {text}")
    return found
