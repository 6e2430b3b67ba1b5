"""Schemas are rewritten so that what the compiler makes of them is JSON, and means what they say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.embedded import model_path
from superinfer.runtime.engine.grammar_rewrite import escaped, rewrite
from superinfer.runtime.engine.grammar_worker import compile_grammar, load_tokenizer_info
from superinfer.runtime.protocol import Grammar

ANY = escaped(".")


@pytest.fixture(scope="module")
def compiler() -> Any:
    info = load_tokenizer_info(str(model_path()), 4096, (2, 0))
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def takes(compiler: Any, schema: dict[str, Any], text: str) -> bool:
    """Whether the grammar takes this JSON text, whole."""
    compiled = compile_grammar(compiler, Grammar(kind="json_schema", source=json.dumps(schema)))
    matcher = xgrammar.GrammarMatcher(compiled)
    return bool(matcher.accept_string(text)) and bool(matcher.is_completed())


@pytest.mark.parametrize(
    ("bounds", "lengths", "others"),
    [
        ({"maxLength": 0}, [0], [1]),
        ({"maxLength": 24}, [0, 1, 24], [25]),
        ({"minLength": 3}, [3, 4, 150], [0, 2]),
        ({"minLength": 2, "maxLength": 2}, [2], [1, 3]),
        ({"maxLength": 250}, [0, 99, 100, 101, 200, 250], [251, 400]),
        ({"minLength": 130, "maxLength": 231}, [130, 229, 230, 231], [129, 232]),
    ],
)
def test_a_text_is_as_long_as_the_schema_says(compiler: Any, bounds: dict[str, int], lengths: Any, others: Any):
    schema = {"type": "string", **bounds}
    for length in lengths:
        assert takes(compiler, schema, json.dumps("é" * length, ensure_ascii=False)), length
    for length in others:
        assert not takes(compiler, schema, json.dumps("a" * length)), length


@pytest.mark.parametrize("bounds", [{"maxLength": 5}, {"minLength": 1}, {"minLength": 1, "maxLength": 300}])
@pytest.mark.parametrize("raw", ["\t", "\x01", "\n", '"', "\\"])
def test_no_text_of_bounded_length_holds_what_json_must_escape(compiler: Any, bounds: dict[str, int], raw: str):
    assert not takes(compiler, {"type": "string", **bounds}, f'"a{raw}"')


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ('^say "x"$', 'say "x"'),
        (r"^a\\b$", "a\\b"),
        (r"^a\nb\t$", "a\nb\t"),
        (r"^\x22\u005c\x0b$", '"\\\x0b'),
        (r"^\"{2}$", '""'),
        (r"^[a-z]+\.[0-9]$", "ab.1"),
        (r'^[^"\\]*$', "plain"),
        (r"^\d+\s$", "12 "),
    ],
)
def test_what_a_pattern_demands_is_written_as_json(compiler: Any, pattern: str, value: str):
    assert re.search(pattern, value), "the test's own example"
    assert takes(compiler, {"type": "string", "pattern": pattern}, json.dumps(value))
    raw = f'"{value}"'
    assert raw == json.dumps(value) or not takes(compiler, {"type": "string", "pattern": pattern}, raw)


def test_classes_within_ascii_and_other_escapes_are_left_alone():
    for pattern in (r"^[\"\\\n]x$", r"^[]\\]$", r"^[a\-z]$", r"^\d\w\.\-\x41$", r"^(a|b){2,3}$", r"^[\p{L}]$"):
        assert escaped(pattern) == pattern


def test_words_are_rewritten_wherever_a_schema_may_stand_and_nowhere_else():
    text, done = {"type": "string", "maxLength": 3}, {"type": "string", "pattern": f"^{ANY}{{0,3}}$"}
    schema = {
        "$defs": {"a": text},
        "properties": {"maxLength": text, "b": {"type": "array", "items": text, "prefixItems": [text]}},
        "anyOf": [text],
        "additionalProperties": text,
        "enum": [{"maxLength": 3}],
        "default": {"maxLength": 3},
    }
    before = json.dumps(schema)
    assert rewrite(schema) == {
        "$defs": {"a": done},
        "properties": {"maxLength": done, "b": {"type": "array", "items": done, "prefixItems": [done]}},
        "anyOf": [done],
        "additionalProperties": done,
        "enum": [{"maxLength": 3}],
        "default": {"maxLength": 3},
    }
    assert json.dumps(schema) == before
    for strange in (True, {"type": "string", "maxLength": -1}, {"type": "string", "minLength": 4, "maxLength": 3}):
        assert rewrite(strange) == strange


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 350), st.integers(0, 350), st.integers(0, 400))
def test_lengths_are_counted_right(least: int, more: int, length: int):
    pattern = rewrite({"type": "string", "minLength": least, "maxLength": least + more})["pattern"].replace(ANY, ".")
    assert bool(re.search(pattern, "x" * length)) == (least <= length <= least + more)
