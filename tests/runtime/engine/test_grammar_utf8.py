"""Whatever a grammar allows byte by byte is UTF-8, and JSON where it is to be JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.runtime.engine.grammar_utf8 import code_points
from superinfer.runtime.engine.grammar_worker import compile_grammar
from superinfer.runtime.protocol import Grammar

END = 256  # one token for each byte, and this one
CHARACTERS = ["\x80", "é", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff", " ", "~"]


def byte_compiler() -> Any:
    tokens = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


@pytest.fixture(scope="module")
def compiler() -> Any:
    return byte_compiler()


def takes(compiled: Any, text: bytes) -> bool:
    """Whether these bytes may come next, each a token."""
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text)


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def sequences() -> list[bytes]:
    """Of every byte that could begin one, with bytes behind it from both sides of every bound that UTF-8 has."""
    behind = [0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]
    found = [bytes([first]) for first in range(0x80, 0x100)]
    for first in range(0xC0, 0x100):
        length = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        found += [bytes([first, second] + [0x80] * (length - 2)) for second in behind]
        found += [bytes([first, second] + [0xBF] * (length - 2)) for second in behind]
    return found


FREE = [
    ("json_schema", {"type": "string"}, '"'),
    ("json_schema", {"type": "string", "maxLength": 5}, '"'),
    ("json_schema", {"type": "string", "minLength": 1}, '"'),
    ("json_schema", {"type": "string", "minLength": 3, "maxLength": 250}, '"'),
    ("json_schema", {"type": "string", "pattern": "^.*$"}, '"'),
    ("json_schema", {"type": "string", "pattern": r"^\S+\W\D[^a][^\s]$"}, '"'),
    ("json_schema", {"type": "string", "pattern": "^[^a]{1,3}$"}, '"'),
    ("json_schema", {"type": "string", "pattern": "^é[^a]*$"}, '"é'),
    ("json_schema", {"type": "string", "pattern": r"^[\u0020-\uffff\u{10000}-\u{10ffff}]*$"}, '"'),
    ("json_schema", {"type": "object", "additionalProperties": {"type": "integer"}}, '{"'),
    ("json_schema", {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}}, '{"a": "'),
    ("json_object", "", '{"'),
    ("json_object", "", '{"a": ["'),
    ("regex", ".*", ""),
    ("regex", r"é\S*", "é"),
    ("regex", "[^a]+", ""),
    ("ebnf", 'root ::= "[^a" [^a]*', "[^a"),
    ("ebnf", "root ::= [\\x20-\\U0010ffff]*", ""),
]


@pytest.mark.parametrize(("kind", "source", "before"), FREE)
def test_free_text_takes_every_character_and_no_bytes_that_are_none(compiler: Any, kind: Any, source: Any, before: str):
    compiled = compile_grammar(
        compiler, Grammar(kind=kind, source=source if kind != "json_schema" else json.dumps(source))
    )
    wrong = [text.hex(" ") for text in sequences() if takes(compiled, before.encode() + text) and len(text) > 1]
    wrong = [text for text in wrong if not is_utf8(bytes.fromhex(text))]
    assert not wrong
    refused = [one for one in CHARACTERS if not takes(compiled, before.encode() + one.encode())]
    assert refused in ([], [" "])  # where the text may not begin with one


@pytest.mark.parametrize(
    "pattern", ["^é[^a]*$", r"^é.*$", r"^é\S*$", r"^é\s*$", r"^é[a\"\\\n]*$", r"^é[\x00-\uffff]*$"]
)
@pytest.mark.parametrize("raw", ["\n", "\x01", "\\"])
def test_a_pattern_beyond_ascii_holds_nothing_that_json_must_escape(compiler: Any, pattern: str, raw: str):
    schema = Grammar(kind="json_schema", source=json.dumps({"type": "string", "pattern": pattern}))
    compiled = compile_grammar(compiler, schema)
    assert takes(compiled, '"é'.encode())
    assert not takes(compiled, f'"é{raw}'.encode())


@pytest.mark.parametrize(
    ("kind", "source", "before"), [("json_object", "", '{"'), ("json_schema", '{"type":"string"}', '"')]
)
def test_escapes_by_number_are_characters_too(compiler: Any, kind: Any, source: str, before: str):
    compiled = compile_grammar(compiler, Grammar(kind=kind, source=source))
    for good in (r"\u0041", r"\u00e9x", r"\ud7ff\n", r"\uD83D\uDE00", r"\udbff\udfff.", r"\uE000", r"\uffff"):
        assert takes(compiled, (before + good).encode()), good
    for wrong in (r"\ud800x", r"\ud800\n", r"\ud800\u0041", r"\ud800\ud800", r"\udc00", r"\uDFFF"):
        assert not takes(compiled, (before + wrong).encode()), wrong


@pytest.mark.parametrize(
    "written",
    [
        r"[a-c]",
        r"[^a-c]",
        r"[-a]",
        r"[a-]",
        r"[^\]\\\-]",
        r"[\d\-x]",
        r"[^\w]",
        r"[é-ÿ\u0400-\u04ff]",
        r"\D",
        r"\W",
        r"\d",
        r"[\x00-\x1f\n]",
        r"[+--]",
        r"[\^a]",
    ],
)
def test_classes_are_understood_as_regular_expressions_have_them(written: str):
    ranges = code_points(written)
    assert ranges is not None
    for code in range(0x500):
        expected = bool(re.fullmatch(written, chr(code), re.ASCII))
        assert any(low <= code <= high for low, high in ranges) == expected, hex(code)


def test_what_is_no_class_known_here_is_none():
    for written in (r"[\p{L}]", r"[a-\d]", r"[b-a]", r"\b"):
        assert code_points(written) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*CHARACTERS, "a", "1", '"', "\\", "x80", "]", "[^a]", "\n", "\0", "\x1f"]), min_size=1),
)
def test_what_a_grammar_says_besides_is_as_it_was(parts: list[str]):
    text = "".join(parts)
    spelled = "".join(f"\\U{ord(one):08x}" for one in text)
    compiled = compile_grammar(byte_compiler(), Grammar(kind="ebnf", source=f'root ::= "{spelled}" [{spelled}] [^a-z]'))
    for one in text:
        assert takes(compiled, f"{text}{one}É".encode())
        assert not takes(compiled, f"{text}{one}a".encode())
    assert not takes(compiled, f"{text}b".encode())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*CHARACTERS, "a", "1", '"', "\\", "x80", "]", "[^a]", "\n", "\0", "\x1f"]), min_size=1)
)
def test_what_a_schema_says_besides_is_as_it_was(parts: list[str]):
    schema = {
        "type": "object",
        "properties": {"".join(parts): {"enum": ["".join(parts), "b"]}},
        "required": ["".join(parts)],
    }
    compiled = compile_grammar(byte_compiler(), Grammar(kind="json_schema", source=json.dumps(schema)))
    for value in ("".join(parts), "b"):
        assert takes(compiled, json.dumps({"".join(parts): value}, ensure_ascii=False).encode())
    assert not takes(compiled, json.dumps({"".join(parts): "c"}, ensure_ascii=False).encode())
