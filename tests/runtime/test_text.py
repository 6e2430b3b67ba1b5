"""Stop strings and incremental text, where mistakes hide at the seams between tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from superinfer.runtime.text import split_at_stop

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
