"""What an output must look like, as a program says it: grammars for the engine, and how the text becomes a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import regex as regex_library

from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.protocol import Grammar

# Turns the whole text of a call into the variable's value. Raises ValueError (pydantic's and msgspec's are ones).
Reader = Callable[[str], Any]

REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""

# Of a tokenizer's numbers, many begin with a space: after "Answer:" the likeliest token is " 4".
_BY_NAME = {"int": f" ?{REGEX_INT}", "float": f" ?{REGEX_FLOAT}", "bool": REGEX_BOOL, "str": REGEX_STR}


def regex_grammar(pattern: object) -> Grammar:
    """Raises InvalidRequestError for what is no regular expression."""
    if not isinstance(pattern, str) or not pattern:
        raise InvalidRequestError(f"regex={pattern!r:.80} must be a text of at least one character")
    try:
        regex_library.compile(pattern)
    except regex_library.error as error:
        raise InvalidRequestError(f"regex={pattern!r:.80} is not a regular expression: {error}") from None
    return Grammar(kind="regex", source=pattern)


def json_grammar(schema: object) -> Grammar:
    """schema: a dict, JSON text, a pydantic model or a msgspec Struct. Raises InvalidRequestError."""
    if isinstance(schema, type):
        found = _schema_of(schema)
        if found is None:
            raise InvalidRequestError(f"json_schema={schema!r:.80} is neither a pydantic model nor a msgspec Struct")
        schema = found
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequestError(f"json_schema={schema!r:.80} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(f"json_schema={schema!r:.80} is not a schema; give an object, as a dict or as text")
    return Grammar(kind="json_schema", source=text)


def dtype_grammar(dtype: object) -> tuple[Grammar, Reader | None]:
    """The grammar of `gen(dtype=...)`, and what makes the value of the text; None where the text is the value.

    Raises UnsupportedError for a type that has none.
    """
    name = dtype.__name__ if dtype in (int, float, bool, str) and isinstance(dtype, type) else dtype
    if isinstance(name, str) and name in _BY_NAME:
        return Grammar(kind="regex", source=_BY_NAME[name]), None
    schema = _schema_of(dtype) if isinstance(dtype, type) else None
    if schema is None:
        raise UnsupportedError(
            f"dtype={dtype!r:.80} is not supported; use str, int, float, bool, a pydantic model or a msgspec Struct"
        )
    assert isinstance(dtype, type)
    return json_grammar(schema), _reader_of(dtype)


def _schema_of(cls: type) -> dict[str, Any] | None:
    if issubclass(cls, msgspec.Struct):
        try:
            return msgspec.json.schema(cls)
        except (TypeError, NameError) as error:
            raise InvalidRequestError(f"{cls.__name__} has no JSON schema: {error}") from None
    if callable(getattr(cls, "model_json_schema", None)) and callable(getattr(cls, "model_validate_json", None)):
        try:
            return dict(cls.model_json_schema())  # type: ignore[attr-defined]
        except Exception as error:  # pydantic's own errors, without importing pydantic
            raise InvalidRequestError(f"{cls.__name__} has no JSON schema: {error}") from None
    return None


def _reader_of(cls: type) -> Reader:
    if issubclass(cls, msgspec.Struct):
        return msgspec.json.Decoder(cls).decode
    reader: Reader = cls.model_validate_json  # type: ignore[attr-defined]
    return reader
