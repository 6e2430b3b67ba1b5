"""Work in slices: a generator that stops before each slice, says what it will be, and returns what came of all."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Slice(NamedTuple):
    """What is about to be done, and about how many microseconds of a core it takes: from counts alone, so that who
    stops at which slice repeats itself."""

    what: str
    us: float


def finish(slices: Generator[Slice, None, Result]) -> Result:
    """Do what is left of the slices at once."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value
