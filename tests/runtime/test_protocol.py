"""The wire schema: what goes over comes back, and nothing else is accepted."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superinfer.errors import InvalidRequestError, ProtocolError, error_from_code
from superinfer.runtime import protocol
from superinfer.runtime.protocol import Generate, Hello, SamplingParams, SequenceDelta
from superinfer.runtime.slo import SLO

requests = st.builds(
    Generate,
    request_id=st.text(min_size=1),
    prompt=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50),
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.none() | st.integers(1, 10**6),
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        logprobs=st.none() | st.integers(0, 20),
    ),
    slo=st.none() | st.builds(SLO, ttft=st.none() | st.floats(1e-6, 1e6)),
)


@given(requests)
def test_a_message_comes_back_as_it_was_sent(request):
    assert protocol.decode_to_engine(protocol.encode(request)) == request


@given(requests, st.data())
def test_a_truncated_message_is_a_protocol_error(request, data):
    frame = protocol.encode(request)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ProtocolError):
        protocol.decode_to_engine(frame[:cut])


@given(st.binary(max_size=200))
def test_noise_is_a_protocol_error(frame):
    with pytest.raises((ProtocolError, InvalidRequestError)):
        protocol.decode_to_engine(frame)


def test_an_unknown_message_is_a_protocol_error_that_names_it():
    with pytest.raises(ProtocolError, match="Teleport"):
        protocol.decode_to_engine(msgspec.msgpack.encode({"type": "Teleport"}))


def test_a_client_message_is_not_an_engine_message():
    with pytest.raises(ProtocolError):
        protocol.decode_to_client(protocol.encode(Hello(version=1)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("frequency_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("seed", 2**64),
        ("temperature", "hot"),
        ("n", True),
    ],
)
def test_a_sampling_value_out_of_range_is_named(field, value):
    with pytest.raises(InvalidRequestError, match=f"{field}=.*{value!r}"):
        SamplingParams(**{field: value})


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequestError, match="lower min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_a_bad_value_in_a_known_request_belongs_to_that_request():
    raw = {"type": "Generate", "request_id": "r1", "prompt": [1], "slo": {"ttft": -1.0}}
    frame = msgspec.msgpack.encode(raw)
    with pytest.raises(InvalidRequestError, match="ttft"):
        protocol.decode_to_engine(frame)
    assert protocol.request_id_of(frame) == "r1"


def test_an_error_keeps_its_class_over_the_wire():
    error = error_from_code(InvalidRequestError.code, "no")
    assert type(error) is InvalidRequestError
    assert "weird" in str(error_from_code("weird", "no"))


def test_defaults_take_no_room_on_the_wire():
    assert len(protocol.encode(protocol.Deltas(deltas=[SequenceDelta(request_id="r", token_ids=[5])]))) < 60
