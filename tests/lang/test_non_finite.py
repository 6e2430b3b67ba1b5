"""What a program is told when the model computes no numbers for one of its calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from overflowing_checkpoint import SPOILS

import superinfer as si
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.runtime.launch import EngineProcess

WHAT = r"values that are not numbers"


@pytest.fixture(scope="module")
def backend(overflowing_engine: EngineProcess) -> Iterator[RuntimeEndpoint]:
    with si.RuntimeEndpoint(overflowing_engine.address) as endpoint:
        yield endpoint


@si.function
def asks(s, text):
    s += si.user(text) + si.assistant(si.gen("answer", max_tokens=8, temperature=0, ignore_eos=True))


@si.function
def chooses(s, text):
    s += text + " Which?" + si.select("choice", [" yes", " no"])


@si.function
def forks(s, text):
    s += "One of two is spoilt. "
    branches = s.fork(2)
    for branch, own in zip(branches, ("right", text), strict=True):
        branch += own + si.gen("note", max_tokens=8, temperature=0, ignore_eos=True)
    s += "Then " + branches[0]["note"] + si.gen("more", max_tokens=4, temperature=0, ignore_eos=True)


def test_a_call_that_fails_raises_where_its_value_is_read(backend):
    state = asks.run(f"not {SPOILS} right", backend=backend)
    assert isinstance(state.error(), si.NonFiniteError)
    with pytest.raises(si.NonFiniteError, match=WHAT):
        state["answer"]


def test_others_of_a_batch_are_answered(backend):
    alone = asks.run("all right", backend=backend)["answer"]
    states = asks.run_batch([{"text": t} for t in ("all right", SPOILS, "all right")], backend=backend)
    assert [state["answer"] for state in (states[0], states[2])] == [alone, alone]
    with pytest.raises(si.NonFiniteError, match=WHAT):
        states[1]["answer"]


def test_a_select_over_what_is_no_number_fails(backend):
    assert chooses.run("all right", backend=backend)["choice"] in (" yes", " no")
    with pytest.raises(si.NonFiniteError, match=WHAT):
        chooses.run(f"not {SPOILS} right", backend=backend)["choice"]


def test_a_branch_that_fails_leaves_the_others_alone(backend):
    state = forks.run(SPOILS, backend=backend)
    assert len(state["more"]) > 0


def test_a_stream_that_fails_raises(backend):
    state = asks.run(f"not {SPOILS} right", stream=True, backend=backend)
    with pytest.raises(si.NonFiniteError, match=WHAT):
        list(state.text_iter("answer"))
