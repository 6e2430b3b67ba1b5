"""The Responses API, through the real OpenAI client."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import openai
import pytest

from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.server.errors import ApiError
from superinfer.runtime.server.responses import ResponseStore

ASK: dict[str, Any] = {"model": "tiny", "input": "hello", "max_output_tokens": 12, "extra_body": {"ignore_eos": True}}


def ask(client: openai.OpenAI, **more: Any) -> Any:
    extra = {"ignore_eos": True, "seed": 7} | more.pop("extra_body", {})
    return client.responses.create(**(ASK | {"extra_body": extra} | more))


def test_an_answer_has_text_usage_and_a_status(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "response" and answer.id.startswith("resp_")
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert len(answer.output_text) == 12 and answer.usage.output_tokens == 12
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=12, seed=7,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]


def test_the_stream_is_what_openais_client_expects(client: openai.OpenAI) -> None:
    whole = ask(client).output_text
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole
    assert events[-1].response.output_text == whole and events[-1].response.usage.output_tokens == 12
    with client.responses.stream(model="tiny", input="hello", max_output_tokens=12, extra_body={"seed": 7}) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert whole.startswith("".join(deltas)[:4]) and deltas


def test_a_response_continues_an_earlier_one(client: openai.OpenAI) -> None:
    first = ask(client, instructions="be brief")
    second = ask(client, input="and then?", previous_response_id=first.id)
    by_hand = ask(
        client,
        input=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "and then?"},
        ],
        store=False,
    )
    assert second.usage.input_tokens == by_hand.usage.input_tokens  # instructions are not carried over, as at OpenAI
    assert second.output_text == by_hand.output_text
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert [item.content[0].text for item in client.responses.input_items.list(second.id)] == ["and then?"]  # type: ignore[union-attr]
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="not stored") as gone:
        ask(client, previous_response_id=first.id)
    assert gone.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_hand.id)  # store=False


def test_items_of_every_kind_are_rendered(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "how is Oslo?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    turns = ["system\nbe brief", "user\nhow is Oslo?", "assistant\nOslo", "tool\nrain"]
    expected = sum(1 + len(turn) + 2 for turn in turns) + 1 + len("assistant\n")
    assert ask(client, input=items).usage.input_tokens == expected


def test_the_items_of_a_stored_response_come_in_openais_shape_and_pages(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "user", "content": "how is Oslo?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}', "id": None},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"role": "assistant", "content": "wet"},
        {"role": "user", "content": [{"type": "input_text", "text": "and Rome?"}], "id": "mine"},
    ]
    listed = client.responses.input_items.list
    answer = ask(client, input=items)
    found: list[Any] = list(listed(answer.id, order="asc", limit=2))  # the client asks for page after page
    kinds = ["message", "function_call", "function_call_output", "message", "message"]
    assert [item.type for item in found] == kinds and len({item.id for item in found}) == 5
    assert [found[at].content[0].text for at in (0, 3, 4)] == ["how is Oslo?", "wet", "and Rome?"]
    assert [found[at].content[0].type for at in (0, 3)] == ["input_text", "output_text"] and found[4].id == "mine"
    assert list(listed(answer.id)) == found[::-1]  # OpenAI's order unless asked otherwise
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "nothing"}):
        with pytest.raises(openai.BadRequestError) as refused:
            listed(answer.id, **wrong)  # type: ignore[arg-type]
        assert refused.value.param == next(iter(wrong))


def test_a_stored_response_is_not_replayed_as_a_stream(client: openai.OpenAI) -> None:
    answer = ask(client)
    with pytest.raises(openai.BadRequestError, match="stream=true"):  # the client would see a stream without events
        client.responses.retrieve(answer.id, stream=True)
    assert client.responses.retrieve(answer.id, stream=False).id == answer.id


def test_what_is_to_be_included_is(client: openai.OpenAI) -> None:
    both: Any = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    for more in ({"include": both[1:]}, {"include": both}, {"include": both, "top_logprobs": 2}):
        scored = ask(client, **more).output[0].content[0].logprobs
        assert len(scored) == 12 and {len(one.top_logprobs) for one in scored} == {more.get("top_logprobs", 0)}
    assert ask(client, include=both[:1]).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "unsupported_content"),
        ({"input": [{"type": "function_call"}]}, "missing_parameter"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_type"),
        ({"input": []}, "invalid_request"),
        ({"tools": [{"type": "web_search"}]}, "invalid_request"),
        ({"background": True}, "unsupported_parameter"),
        ({"include": ["file_search_call.results"]}, "unsupported_parameter"),
        ({"truncation": "auto"}, "unsupported_parameter"),
        ({"max_output_tokens": 0}, "invalid_request"),
        ({"max_output_tokens": 5000}, "context_length_exceeded"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **change)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": "x" * 3000}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
    ],
)
def test_errors_name_the_fields_of_this_api(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **change)
    body: Any = refused.value.body
    assert refused.value.param == param and body["message"].startswith(param)


def test_the_slo_and_tier_are_reported(client: openai.OpenAI) -> None:
    answer = ask(client, extra_body={"slo": {"deadline_ms": 60_000}})
    assert answer.slo["met"] is True and answer.service_tier == "default"


def is_kept(store: ResponseStore, response_id: str) -> bool:
    try:
        store.get(response_id)
    except ApiError:
        return False
    return True


def test_stored_responses_are_bounded_in_bytes_and_the_oldest_goes() -> None:
    store = ResponseStore(10_000)
    for number in range(50):
        store.put(str(number), b"x" * 1000, [], [], [])
    kept = [number for number in range(50) if is_kept(store, str(number))]
    assert kept == list(range(44, 50))
    store.put("large", b"x" * 12_000, [], [], [])
    assert not is_kept(store, "large") and is_kept(store, "49")
    store.remove("49")
    store.put("another", b"x" * 1000, [], [], [])
    assert is_kept(store, "44") and is_kept(store, "another"), "what was removed takes no room"


def test_stored_responses_take_the_memory_that_they_are_given() -> None:
    """Of short ones there are many, and what each takes beside its JSON counts too."""
    most, message = 1 << 20, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    tracemalloc.start()
    try:
        store = ResponseStore(most)
        for number in range(5_000):
            store.put(f"resp_{number:032}", b"%5d" % number * 40, [message] * 3, [message], [message])
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert is_kept(store, f"resp_{4999:032}") and not is_kept(store, f"resp_{0:032}")
    assert most / 2 < held < most
    stored = store.get(f"resp_{4999:032}")
    assert stored.items == [message] * 5 and stored.input == [message]


def test_over_http_the_oldest_response_makes_room_for_the_newest(
    tiny_engine: EngineProcess, serving: Callable[..., Any]
) -> None:
    with serving(tiny_engine.address, responses_bytes=6000) as served, served.openai() as client:
        kept = [ask(client, input=f"number {at} " + "x" * 400).id for at in range(12)]
        assert client.responses.retrieve(kept[-1]).id == kept[-1]
        assert ask(client, input="and then?", previous_response_id=kept[-1]).status == "incomplete"
        with pytest.raises(openai.BadRequestError, match="newer ones took its place") as gone:
            ask(client, previous_response_id=kept[0])
        assert gone.value.code == "previous_response_not_found" and gone.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(kept[0])
    with serving(tiny_engine.address, responses_bytes=0) as served, served.openai() as client:
        answer = ask(client)
        assert answer.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer.id)
