"""What a program's author sees: every public name is annotated and documented, and type checkers may look."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import superinfer as si


def public_callables() -> Iterator[tuple[str, Any]]:
    """All public functions, and public methods of public classes, that are ours, by name."""
    for name in si.__all__:
        found = getattr(si, name)
        if not getattr(found, "__module__", "").startswith("superinfer"):
            continue
        if inspect.isclass(found):
            for inner, value in vars(found).items():
                plain = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                if inspect.isfunction(plain) and not inner.startswith("_"):
                    yield f"{name}.{inner}", plain
        elif inspect.isfunction(found):
            yield name, found


def test_every_argument_and_result_of_the_public_api_is_annotated():
    missing = []
    for name, found in public_callables():
        signature = inspect.signature(found)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        if bare or signature.return_annotation is signature.empty:
            missing.append((name, bare))
    assert missing == []


def test_every_public_name_says_what_it_is():
    named = [(name, getattr(si, name)) for name in si.__all__]
    described = [(n, f) for n, f in named if inspect.isclass(f) or inspect.isfunction(f)]
    assert [name for name, found in described if not inspect.getdoc(found)] == []
    assert len(described) > 30 and len(list(public_callables())) > 60


def test_type_checkers_are_told_that_there_are_annotations():
    assert (Path(si.__file__).parent / "py.typed").is_file()
