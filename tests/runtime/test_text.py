"""Stop strings and incremental text, where mistakes hide at the seams between tokens."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import tracemalloc
from functools import cache
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_engine import slow_engine

from superinfer.embedded import model_path
from superinfer.errors import InvalidRequestError
from superinfer.runtime import stopping
from superinfer.runtime.protocol import RequestReport, SamplingParams, SequenceDelta, TokenLogprob
from superinfer.runtime.segments import Segments, segments_of
from superinfer.runtime.stopping import Stopper, split_at_stop
from superinfer.runtime.text import SequenceReader, TextClient, TextRequest, TextResult
from superinfer.runtime.tokenization import Tokenizer

letters = st.text("ab<>", max_size=30)
stops = st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3)


@given(letters, stops, st.data())
def test_streamed_text_ends_where_the_whole_text_would_be_cut(text, stop, data):
    cuts = [text.find(s) for s in stop if s in text]
    given_out, held, found = "", "", None
    at = 0
    while at < len(text) and found is None:
        size = data.draw(st.integers(1, 5))
        certain, held, found = split_at_stop(held + text[at : at + size], stop)
        given_out += certain
        at += size
    if found is None:
        assert given_out + held == text
        assert not cuts
    else:
        # In pieces the first match to be complete wins, which may be a shorter one within a longer.
        assert given_out + found == text[: len(given_out) + len(found)]
        assert not any(s in given_out for s in stop)


@given(letters, stops)
def test_what_is_held_back_could_still_become_a_stop(text, stop):
    _, held, found = split_at_stop(text, stop)
    if held:
        assert found is None
        assert any(s.startswith(held) for s in stop)


def test_the_earliest_stop_wins():
    assert split_at_stop("one. two\nthree", ["\n", ". "]) == ("one", "", ". ")


patterns = st.lists(st.sampled_from(["a+b", "<[ab]>", "aa|b<", r"(?<=a)<", "b$"]), min_size=1, max_size=3)


@given(letters, stops, patterns, st.data())
def test_stop_expressions_end_a_text_at_the_same_place_in_whatever_pieces_it_comes(text, stop, found, data):
    def end_of(sizes):
        stopper, out, at = Stopper(stop, found), "", 0
        while at < len(text):
            size = next(sizes)
            certain, stopped = stopper.push(text[at : at + size])
            out, at = out + certain, at + size
            if stopped is not None:
                return out, stopped
        return out + stopper.rest(), None

    whole = end_of(iter([len(text) or 1]))
    assert end_of(data.draw(st.integers(1, 5)) for _ in text) == whole
    out, stopped = whole
    if stopped is None:
        assert out == text
        assert not any(regex.search(p, text) for p in found) or "$" in "".join(found)
    else:
        assert text.startswith(out + stopped)
        assert stopped in stop or any(regex.fullmatch(p, stopped) for p in [*found, "<"])


def test_text_that_cannot_become_a_match_is_given_out_at_once():
    stopper = Stopper([], [r"\n\n+"])
    assert stopper.push("one\n") == ("one", None)  # the line's end may be the first of two
    assert stopper.push("two") == ("\ntwo", None)
    assert stopper.push("\n\n\nthree") == ("", "\n\n")


def test_an_expression_that_backtracks_for_ever_is_given_up():
    with pytest.raises(InvalidRequestError, match="takes more than 1 s"):
        Stopper([], ["(x|xx)+[^x]y"]).push("x" * 60 + "zz")


def test_so_is_one_that_takes_too_long_over_a_whole_text(monkeypatch):
    monkeypatch.setattr(stopping, "SEARCHES_S", 0.01)
    stopper = Stopper([], ["end$"])
    with pytest.raises(InvalidRequestError, match=r"stop_regex='end\$' .* 0.01 s in all"):
        for _ in range(100_000):
            stopper.push("to be and not to be; ")


def test_no_other_request_waits_for_a_search(tiny_engine, monkeypatch):
    other = threading.Event()

    class Slow:
        """An expression whose search ends once the event loop has done something else."""

        pattern = "slow"

        def search(self, *given, **named):
            assert other.wait(60), "the loop was held up"

    monkeypatch.setattr(stopping, "stop_pattern", lambda source: Slow())

    async def completed() -> TextResult:
        async with await TextClient.connect(tiny_engine.address) as text:
            sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            task = asyncio.create_task(text.complete(TextRequest(prompt="once", sampling=sampling, stop_regex=("x",))))
            await text.complete(TextRequest(prompt="another", sampling=sampling))
            other.set()
            (result,) = await task
            return result

    assert len(asyncio.run(completed()).token_ids) == 5


@given(letters, stops, st.data())
def test_stop_strings_are_found_as_if_each_was_looked_for(text, stop, data):
    stopper, held, at = Stopper(stop), "", 0
    while at < len(text):
        piece = text[at : at + data.draw(st.integers(1, 5))]
        certain, held, found = split_at_stop(held + piece, stop)
        assert stopper.push(piece) == (certain, found)
        if found is not None:
            return
        at += len(piece)
    assert stopper.rest() == held


def test_many_stop_strings_take_no_longer_than_one():
    draw = random.Random(0)
    many = ["".join(draw.choices("abcdefgh", k=12)) + "!" for _ in range(5_000)]
    text = "".join(draw.choices("abcdefgh", k=4_000))

    def seconds(stop: list[str]) -> float:
        stopper, began = Stopper(stop), time.thread_time()
        for at in range(0, len(text), 4):
            assert stopper.push(text[at : at + 4])[1] is None
        return time.thread_time() - began

    seconds(many)  # makes the automaton
    assert min(seconds(many) for _ in range(3)) < 50 * min(seconds(many[:1]) for _ in range(3))


def test_more_stop_strings_than_are_looked_for_are_refused():
    with pytest.raises(InvalidRequestError, match="70000 characters together; give at most 65536"):
        TextRequest(prompt="once", stop=("x" * 35_000, "y" * 35_000))


PIECES = st.lists(
    st.sampled_from(
        ["a", "l", "'", "ll", "'d", " ", "  ", "\n", "\n\n", "Zoé", "日", "😀", "7", "42", "{", '"', ":", "<|im_end|>"]
    ),
    max_size=60,
).map("".join)


@cache
def _embedded() -> Tokenizer:
    return Tokenizer(str(model_path()))


REPORT = RequestReport(
    prompt_tokens=1, cached_tokens=0, output_tokens=99, queue_s=0.0, prefill_s=0.0, decode_s=0.0, e2e_s=0.0
)


@given(
    st.lists(st.sampled_from(["a", "bc", " the", "abc", "é", "日", "\n"]), min_size=1, max_size=12),
    st.lists(st.sampled_from(["b", "abc", "c a", "the", "\n", "日"]), min_size=1, max_size=3),
    st.data(),
)
def test_how_tokens_come_together_changes_nothing_of_what_a_stop_string_ends(pieces, stop, data):
    ids = [token_id for piece in pieces for token_id in _embedded().encode(piece, special=False)]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=6)) | {0, len(ids)})

    def read(bounds: list[int]) -> TextResult:
        reader, result = SequenceReader(_embedded().detokenizer(), Stopper(stop)), TextResult(0)
        for begin, end in pairwise(bounds):
            logprobs = [TokenLogprob(token_id, -1.0) for token_id in ids[begin:end]]
            finish = "length" if end == len(ids) else None
            report = REPORT if finish else None
            delta = SequenceDelta(
                request_id="", token_ids=ids[begin:end], logprobs=logprobs, finish_reason=finish, report=report
            )
            out = reader.read(delta)
            if out is not None:
                result.add(out)
        return result

    result = read(cuts)
    assert result == read(list(range(len(ids) + 1)))
    assert [logprob.token_id for logprob in result.logprobs] == result.token_ids
    if result.stop is not None:
        assert result.report.output_tokens == len(result.token_ids)


def test_tokens_made_until_the_engine_hears_of_a_stop_are_not_counted(tiny_checkpoint):
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, logprobs=0)

    async def completed() -> TextResult:
        with slow_engine(tiny_checkpoint, step_s=0.03) as engine:
            async with await TextClient.connect(engine.address) as text:
                free = TextRequest(prompt="once", sampling=SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
                (whole,) = await text.complete(free)
                (result,) = await text.complete(TextRequest(prompt="once", sampling=sampling, stop=(whole.text[6:8],)))
                return result

    result = asyncio.run(completed())
    assert result.finish_reason == "stop" and len(result.token_ids) <= 8  # a token of this model is a character
    assert result.report.output_tokens == len(result.token_ids)


def test_a_long_prompt_is_not_tokenized_again_for_each_choice():
    tokenizer = _embedded()
    text = "Name the city. " * 40
    assert tokenizer._cut(tokenizer._backend.encode(text), text) is not None
    assert tokenizer._cut(tokenizer._backend.encode("short"), "short") is None


@settings(max_examples=400, deadline=None)
@given(PIECES, st.lists(PIECES, max_size=3))
def test_texts_that_share_a_beginning_are_tokenized_as_each_alone(text: str, ends: list[str]):
    tokenizer = _embedded()
    prompt, each = tokenizer.encode_each(text, ends)
    assert prompt == tokenizer.encode(text)
    assert each == [tokenizer.encode(text + end) for end in ends]


# Special tokens, their parts, and what tokenizers look at around them.
pieces = st.lists(
    st.sampled_from(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|im_",
            "end|>",
            "<",
            "user",
            "\n",
            " ",
            "  ",
            "It's",
            "é",
            "12",
            "a b",
        ]
    ),
    max_size=24,
).map("".join)


@given(st.lists(pieces, min_size=1, max_size=4))
def test_pieces_that_were_seen_before_are_tokenized_as_the_whole_text_is(texts):
    for text in [*texts, *texts]:  # the second time from what was kept
        whole = _embedded()._backend.encode(text, add_special_tokens=False).ids
        assert _embedded().encode(text, special=False) == whole


def test_a_message_that_was_seen_before_is_not_tokenized_again():
    asked = []

    def encode(text):
        asked.append(text)
        return [len(text)]

    kept = Segments({"<e>": True, "<e>!": False}, most=8192)
    assert kept.encode("ab<e>c<e>d", encode) == [5, 4, 1]
    assert kept.encode("ab<e>c<e>other", encode) == [5, 4, 5]
    assert asked == ["ab<e>", "c<e>", "d", "other"]
    assert kept.encode("x<e>!y<e>", encode) == [9], "the longer token stands there, and ends no piece"
    for number in range(100):
        kept.encode(f"ab<e>{number}<e>", encode)
    asked.clear()
    kept.encode("ab<e>99<e>c<e>", encode)
    assert asked == ["c<e>"], "what is used again stays, the others go"


def test_pieces_take_the_memory_that_they_are_given():
    """Of short ones there are many, and what each takes beside its text counts too."""
    most = 1 << 20
    tracemalloc.start()
    try:
        kept = Segments({"<e>": True}, most=most)
        for number in range(10_000):
            kept.encode(f"{number}<e>", lambda piece: [300 + ord(sign) for sign in piece])
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most / 2 < held < most


def test_pieces_that_may_depend_on_each_other_are_not_cut():
    import json

    class Told:
        def __init__(self, **changes):
            token = {"content": "<e>", "normalized": False, "single_word": False, "rstrip": False, "lstrip": False}
            self.told = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [token]} | changes

        def to_str(self):
            return json.dumps(self.told)

    assert segments_of(Told()) is not None
    assert segments_of(Told(pre_tokenizer={"type": "Metaspace"})) is None
    assert segments_of(Told(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})) is None
    assert segments_of(Told(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend"}]})) is None
    assert segments_of(Told(added_tokens=[])) is None
