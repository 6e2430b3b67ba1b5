"""Long texts of bounded length: compiled quickly whatever the bound, and held to it, to the character."""

from __future__ import annotations

import json
import random
import time
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar
from hypothesis import example, given, settings
from hypothesis import strategies as st

from superinfer.embedded import model_path
from superinfer.runtime.engine.grammar_lengths import LONG, Bound, TokenLengths, without_long
from superinfer.runtime.engine.grammar_worker import CompiledFrame, answer, load_tokenizer_info, new_matcher
from superinfer.runtime.protocol import Grammar

VOCAB, EOS = 4096, (2, 0)


class Vocabulary:
    """The embedded model's, with what follows from it."""

    def __init__(self) -> None:
        self.info = load_tokenizer_info(str(model_path()), VOCAB, EOS)
        self.tokens: list[bytes] = self.info.decoded_vocab
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.lengths = TokenLengths(self.tokens)

    def compile(self, schema: Any) -> CompiledFrame:
        return self.compiled(Grammar(kind="json_schema", source=json.dumps(schema)))

    def compiled(self, grammar: Grammar) -> CompiledFrame:
        return answer(self.compiler, grammar, VOCAB, EOS, lambda: self.lengths)

    def matcher(self, frame: CompiledFrame) -> Any:
        assert not frame.error
        compiled = xgrammar.CompiledGrammar.deserialize_json(frame.compiled, self.info)
        return new_matcher(compiled, frame.bounds, self.lengths, EOS)

    def allowed(self, matcher: Any) -> np.ndarray:
        """Token ids that may come next."""
        mask = np.full((1, VOCAB // 32), -1, dtype=np.int32)
        matcher.fill_next_token_bitmask(mask, 0)
        if hasattr(matcher, "narrow"):
            matcher.narrow(mask[0].view(np.uint32))
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@cache
def embedded() -> Vocabulary:
    return Vocabulary()


@cache
def team() -> CompiledFrame:
    return embedded().compile(TEAM)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return embedded()


def written(vocabulary: Vocabulary, matcher: Any, rng: random.Random, keen: float) -> str:
    """A text of random allowed tokens. keen: how often one that ends a text is passed over while others are there."""
    out = b""
    for _ in range(6000):
        allowed = vocabulary.allowed(matcher)
        if rng.random() < keen:
            inner = [token for token in allowed if token not in EOS and b'"' not in vocabulary.tokens[token]]
            allowed = inner or allowed
        token = int(rng.choice(allowed))
        assert matcher.accept_token(token)
        if token in EOS:
            return out.decode()
        out += vocabulary.tokens[token]
    raise AssertionError(f"it does not end: {out[-80:]!r}")


def texts(**bounds: int) -> dict[str, Any]:
    return {"type": "string", **bounds}


OPTIONAL = {"anyOf": [texts(maxLength=120), {"type": "null"}]}
TEAM = {
    "type": "object",
    "properties": {
        "title": texts(minLength=3, maxLength=30),
        "story": texts(maxLength=700),
        "note": OPTIONAL,
        "tags": {"type": "array", "items": texts(minLength=101, maxLength=130), "minItems": 1, "maxItems": 3},
        "kind": {"enum": ['says "a"', 'says "b", "c"']},
    },
    "required": ["title", "story", "tags"],
    "additionalProperties": False,
}


def action(do: str, **bounds: int) -> dict[str, Any]:
    properties = {"do": {"const": do}, "with": texts(**bounds)}
    return {"type": "object", "properties": properties, "required": ["do", "with"], "additionalProperties": False}


ACTIONS = {
    "type": "array",
    "items": {
        "anyOf": [action("search", maxLength=150), action("say", minLength=140, maxLength=210), {"type": "null"}]
    },
    "minItems": 1,
    "maxItems": 3,
}


@cache
def actions() -> CompiledFrame:
    return embedded().compile(ACTIONS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([0.0, 0.9, 1.0]))
@example(1, 1.0)
def test_actions_told_apart_by_their_first_key_follow_the_schema(seed: int, keen: float):
    vocabulary = embedded()
    assert without_long(Grammar(kind="json_schema", source=json.dumps(ACTIONS)))[1] == [Bound(0, 150), Bound(140, 210)]
    text = written(vocabulary, vocabulary.matcher(actions()), random.Random(seed), keen)
    jsonschema.validate(json.loads(text), ACTIONS)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([0.0, 0.9, 1.0]))
@example(1, 1.0)
def test_what_is_written_follows_the_schema(seed: int, keen: float):
    vocabulary = embedded()
    text = written(vocabulary, vocabulary.matcher(team()), random.Random(seed), keen)
    jsonschema.validate(json.loads(text), TEAM)
    if keen == 1.0:
        assert len(json.loads(text)["story"]) == 700  # to the last character


@pytest.mark.parametrize("least", [0, 130, 240])
@pytest.mark.parametrize("most", [240, 500])
def test_a_text_may_have_each_length_within_its_bounds_and_no_other(vocabulary: Vocabulary, least: int, most: int):
    frame = vocabulary.compile(texts(minLength=least, maxLength=most))
    quote, letter = (vocabulary.tokens.index(text) for text in (b'"', b"a"))
    two = [at for at, token in enumerate(vocabulary.tokens) if token.isalpha() and len(token) == 2]
    matcher = vocabulary.matcher(frame)
    assert matcher.accept_token(quote)
    for count in range(most + 1):
        allowed = set(vocabulary.allowed(matcher).tolist())
        assert (quote in allowed) == (least <= count), count
        assert (letter in allowed) == (count < most), count
        assert set(two) <= allowed if count <= most - 2 else not set(two) & allowed, count
        if count < most:
            assert matcher.accept_token(letter)
    assert matcher.accept_token(quote) and set(vocabulary.allowed(matcher).tolist()) == set(EOS)


def test_characters_of_several_bytes_count_once_also_where_tokens_part_them(vocabulary: Vocabulary):
    matcher = vocabulary.matcher(vocabulary.compile(texts(maxLength=LONG + 1)))
    single = {token: at for at, token in enumerate(vocabulary.tokens) if len(token) == 1}
    assert matcher.accept_token(single[b'"'])
    for byte in "€".encode() * (LONG + 1):
        token = single[bytes([byte])]
        assert token in vocabulary.allowed(matcher)
        assert matcher.accept_token(token)
    assert all(vocabulary.tokens[token].startswith(b'"') for token in vocabulary.allowed(matcher))


@pytest.mark.parametrize("escape", [r"\n", r"\"", r"\\", r"\/"])
def test_an_escape_is_one_character_and_may_be_the_last(vocabulary: Vocabulary, escape: str):
    matcher = vocabulary.matcher(vocabulary.compile(texts(minLength=LONG + 1, maxLength=LONG + 1)))
    single = {token: at for at, token in enumerate(vocabulary.tokens) if len(token) == 1}
    assert matcher.accept_token(single[b'"'])
    for _ in range(LONG + 1):
        for byte in escape.encode():
            token = single[bytes([byte])]
            assert token in vocabulary.allowed(matcher)
            assert matcher.accept_token(token)
    assert {vocabulary.tokens[token] for token in vocabulary.allowed(matcher)} == {b'"'}
    assert matcher.accept_token(single[b'"']) and matcher.is_completed()


def test_tokens_that_are_taken_back_do_not_count(vocabulary: Vocabulary):
    matcher = vocabulary.matcher(vocabulary.compile({"type": "array", "items": texts(maxLength=LONG + 1)}))
    bracket, quote = (vocabulary.tokens.index(text) for text in (b"[", b'"'))
    text = [vocabulary.tokens.index(bytes([letter])) for letter in b"abc"]
    assert matcher.accept_token(bracket) and matcher.accept_token(quote)
    for _ in range(3):
        assert all(matcher.accept_token(token) for token in text)
        matcher.rollback(3)
    matcher.rollback(1)
    assert vocabulary.tokens.index(b"]") in vocabulary.allowed(matcher)
    assert all(matcher.accept_token(token) for token in (quote, *text))
    for _ in range(LONG + 1 - 3):
        assert matcher.accept_token(text[0])
    assert text[0] not in vocabulary.allowed(matcher)


def test_forced_text_ends_where_a_long_text_begins(vocabulary: Vocabulary):
    matcher = vocabulary.matcher(
        vocabulary.compile(TEAM | {"properties": {"story": texts(maxLength=900)}, "required": ["story"]})
    )
    assert matcher.find_jump_forward_string() == '{"story": "'


def test_the_bound_costs_no_time_to_compile(vocabulary: Vocabulary):
    took = []
    for most in (LONG + 1, 10_000, 1_000_000):
        began = time.thread_time()
        assert not vocabulary.compile(texts(maxLength=most)).error
        took.append(time.thread_time() - began)
    assert took[2] < 1.5 and took[1] < 1.5, took  # most of it are the walks


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [texts(maxLength=500), {"enum": ["a", "b"]}]},
        {"anyOf": [{"type": "object", "properties": {"a": texts(maxLength=500)}}, {"type": "object"}]},
        {"anyOf": [{"$ref": "#/$defs/s"}, texts(maxLength=200)], "$defs": {"s": texts(maxLength=300)}},
        {"anyOf": [action("go", maxLength=500), action("go", maxLength=200)]},
        {"anyOf": [action("go", maxLength=500), {"type": "object", "properties": {"do": {}}, "required": ["do"]}]},
        {"type": "object", "properties": {"a": texts(maxLength=500)}, "additionalProperties": texts(maxLength=3)},
        {"type": "string", "maxLength": LONG},
        {"type": "object", "properties": {"@@long text 0@@": texts(maxLength=500)}},
    ],
)
def test_what_could_be_read_in_two_ways_is_left_to_the_compiler(schema: Any):
    grammar = Grammar(kind="json_schema", source=json.dumps(schema))
    assert without_long(grammar) == (grammar, [])


def one_of(*formats: Any) -> Grammar:
    return Grammar(kind="structural_tag", source=json.dumps({"type": "or", "elements": formats}))


def json_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def behind(text: str, *formats: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": [{"type": "const_string", "value": text}, *formats]}


def test_the_bounds_of_a_structural_tags_schemas_are_counted_together():
    grammar = one_of(json_of(texts(maxLength=400)), behind("<", json_of(action("go", minLength=200, maxLength=300))))
    marked, bounds = without_long(grammar)
    assert bounds == [Bound(0, 400), Bound(200, 300)] and marked.kind == "structural_tag"


@pytest.mark.parametrize(
    "formats",
    [
        (json_of(texts(maxLength=400)), json_of({"type": "string"})),
        (json_of(action("go", maxLength=400)), json_of({"type": "object", "properties": {}})),
        (behind("<", json_of(texts(maxLength=400))), behind("<", json_of(texts(maxLength=300)))),
        (behind("<", json_of({"type": "null"}), json_of({"anyOf": [texts(maxLength=400), texts()]})),),
    ],
)
def test_nor_are_those_of_schemas_behind_the_same_text(formats: Any):
    assert without_long(one_of(*formats)) == (one_of(*formats), [])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([0.0, 0.9, 1.0]))
@example(1, 1.0)
def test_texts_of_a_structural_tag_keep_their_bounds(seed: int, keen: float):
    vocabulary = embedded()
    grammar = one_of(
        json_of(texts(minLength=120, maxLength=150)),
        behind("<call>", json_of(action("say", minLength=140, maxLength=210)), {"type": "regex", "pattern": "</call>"}),
    )
    text = written(vocabulary, vocabulary.matcher(tagged_frame(grammar)), random.Random(seed), keen)
    if text.startswith("<call>"):
        assert text.endswith("</call>")
        assert 140 <= len(json.loads(text[6:-7])["with"]) <= 210
    else:
        assert 120 <= len(json.loads(text)) <= 150


@cache
def tagged_frame(grammar: Grammar) -> CompiledFrame:
    return embedded().compiled(grammar)


def test_as_many_bounds_as_there_are_signs_are_counted():
    schema = {"type": "array", "prefixItems": [texts(maxLength=LONG + 1 + at) for at in range(40)]}
    marked, bounds = without_long(Grammar(kind="json_schema", source=json.dumps(schema)))
    assert bounds == [Bound(0, LONG + 1 + at) for at in range(28)]
    assert json.loads(marked.source)["prefixItems"][28:] == schema["prefixItems"][28:]


def test_a_vocabulary_that_could_step_over_a_sign_is_known():
    assert not TokenLengths([b'"', b"\x01", b"a\x01", b'", "']).meet_signs
    assert TokenLengths([b'a"\x02']).meet_signs


def test_a_reference_is_followed_once_however_often_it_is_named():
    """Each of 40 definitions names the next twice: followed each time, they would be followed 2^40 times."""
    defs = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(40)}
    text = {"type": "string", "maxLength": 400}
    for last, bounds in (({"type": "integer"}, [Bound(0, 400)]), ({"type": "string"}, [])):
        schema = {"$defs": {**defs, "d40": last}, "anyOf": [{"$ref": "#/$defs/d0"}, text]}
        assert without_long(Grammar(kind="json_schema", source=json.dumps(schema)))[1] == bounds


def test_a_definition_that_comes_back_to_itself_may_be_anything():
    schema = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}]}}, "anyOf": [{"$ref": "#/$defs/a"}]}
    schema["anyOf"].append({"type": "string", "maxLength": 400})
    assert without_long(Grammar(kind="json_schema", source=json.dumps(schema)))[1] == []
