"""Requests that go on from others, and deltas that are kept back: a real engine process, through its door."""

from __future__ import annotations

import asyncio
import math

import pytest
from slow_engine import slow_engine

from superinfer.errors import InvalidRequestError, NothingToExtendError, QueueFullError
from superinfer.runtime.client import AsyncEngineClient, EngineClient, new_request_id
from superinfer.runtime.protocol import Generate, SamplingParams, SequenceDelta

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
PROMPT = list(range(10, 60))


def request(prompt, sampling=GREEDY, **kw) -> Generate:
    return Generate(request_id=new_request_id(), prompt=list(prompt), sampling=sampling, **kw)


def tokens(client: EngineClient, wanted: Generate) -> list[int]:
    return [token for delta in client.generate(wanted) for token in delta.token_ids]


def together(address: str, *requests: Generate) -> list[list[SequenceDelta] | Exception]:
    """All sent at once and in this order. The deltas of each, or its error. Who is followed must take long enough to be
    under way when the last has come: seven steps of a slow engine, which stands still when this process does."""

    async def sent() -> list[list[SequenceDelta] | Exception]:
        async with await AsyncEngineClient.connect(address) as client:
            arrived = [asyncio.Queue() for _ in requests]
            for wanted, queue in zip(requests, arrived, strict=True):
                client.open_soon(wanted, queue.put_nowait)
            return list(await asyncio.gather(*map(until_end, arrived)))

    return asyncio.run(sent())


async def until_end(queue: asyncio.Queue) -> list[SequenceDelta] | Exception:
    deltas: list[SequenceDelta] = []
    while not deltas or deltas[-1].finish_reason is None:
        item = await asyncio.wait_for(queue.get(), 30.0)
        if isinstance(item, Exception):
            return item
        deltas.append(item)
    return deltas


@pytest.fixture(scope="module")
def slow(tiny_checkpoint):
    """An engine on which a request of 900 tokens lasts for half a minute."""
    with slow_engine(tiny_checkpoint, step_s=0.03) as engine:
        yield engine


def told(deltas: list[SequenceDelta] | Exception) -> list[int]:
    assert not isinstance(deltas, Exception), deltas
    return [token for delta in deltas for token in delta.token_ids]


@pytest.fixture
def client(slow):
    """A connection of the test's own."""
    with EngineClient(slow.address) as connection:
        yield connection


def test_a_request_goes_on_from_the_tokens_of_another_and_others_from_it(slow, client):
    first = request(PROMPT)
    second = request([5, 6, 7], after=first.request_id)
    third = request([8], after=second.request_id)
    sibling = request([9, 9], after=second.request_id)
    made = list(map(told, together(slow.address, first, second, third, sibling)))
    one = tokens(client, request(PROMPT))
    two = tokens(client, request([*PROMPT, *one, 5, 6, 7]))
    whole = [*PROMPT, *one, 5, 6, 7, *two]
    assert made == [one, two, tokens(client, request([*whole, 8])), tokens(client, request([*whole, 9, 9]))]


def test_what_it_goes_on_from_is_in_the_cache(engine):
    first = request(PROMPT, LONG)
    second = request([5, 6, 7], after=first.request_id)
    one, two = together(engine.address, first, second)
    report = two[-1].report
    assert report.prompt_tokens == len(PROMPT) + 900 + 3
    assert report.cached_tokens >= (len(PROMPT) + 899) // 16 * 16
    with EngineClient(engine.address) as client:  # a real model's tokens, too
        assert told(two) == tokens(client, request([*PROMPT, *told(one), 5, 6, 7]))


def test_its_time_begins_when_it_can(slow, monkeypatch):
    slow.keep_time(monkeypatch, 1.0)
    first = request([5], SamplingParams(max_tokens=60, ignore_eos=True))
    second = request([6], after=first.request_id)
    one, two = (deltas[-1].report for deltas in together(slow.address, first, second))
    assert (one.e2e_s, two.e2e_s) == (60.0, 12.0)


def test_the_token_that_stopped_an_output_is_no_part_of_what_follows(slow, client):
    one = tokens(client, request(PROMPT))
    at = next(i for i in range(6, 12) if one[i] not in one[:i])
    first = request(PROMPT, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(one[at],)))
    second = request([5, 6, 7], after=first.request_id)
    stopped, followed = together(slow.address, first, second)
    assert told(stopped) == one[: at + 1]
    assert told(followed) == tokens(client, request([*PROMPT, *one[:at], 5, 6, 7]))


def test_what_cannot_be_gone_on_from_is_said(slow, client):
    several = request(PROMPT, SamplingParams(temperature=0, max_tokens=4, n=2))
    too_long = request([7] * 2000)
    follows = [request([5], after=one.request_id) for one in (several, too_long)]
    unknown = request([5], after="nobody")
    _, refused, _, late, lost = together(slow.address, several, follows[0], too_long, follows[1], unknown)
    assert isinstance(refused, InvalidRequestError) and "several continuations" in str(refused)
    for error in (late, lost):
        assert isinstance(error, NothingToExtendError) and "send the whole prompt" in str(error)


def test_one_of_several_continuations_cannot_be_gone_on_from_when_it_is_the_last_to_run(slow):
    several = request(PROMPT, SamplingParams(temperature=0, max_tokens=900, ignore_eos=True, n=2))

    async def followed() -> list[SequenceDelta] | Exception:
        first, second = asyncio.Queue(), asyncio.Queue()
        async with await AsyncEngineClient.connect(slow.address) as client:
            client.open_soon(several, first.put_nowait)
            client.cancel(several.request_id, 0)
            await until_end(first)
            client.open_soon(request([5], after=several.request_id), second.put_nowait)
            client.cancel(several.request_id)
            return await until_end(second)

    refused = asyncio.run(followed())
    assert isinstance(refused, InvalidRequestError) and "several continuations" in str(refused)


def test_one_that_cannot_begin_takes_with_it_those_that_follow(slow, client):
    first = request(PROMPT)
    second = request([7] * 2000, after=first.request_id)  # does not fit into the context
    third = request([8], after=second.request_id)
    made, wrong, lost = together(slow.address, first, second, third)
    assert told(made)
    assert isinstance(wrong, InvalidRequestError) and "context" in str(wrong)
    assert isinstance(lost, NothingToExtendError)
    assert client.health().waiting == 0


def test_cancelling_ends_a_request_that_is_held_and_those_that_follow_it(slow):
    async def cancelled(which: int) -> list[str]:
        first = request(PROMPT, LONG)
        second = request([5], after=first.request_id)
        third = request([6], after=second.request_id)
        ends: list[str] = []
        async with await AsyncEngineClient.connect(slow.address) as client:
            queues = [asyncio.Queue() for _ in range(3)]
            for wanted, queue in zip((first, second, third), queues, strict=True):
                client.open_soon(wanted, queue.put_nowait)
            await queues[0].get()
            client.cancel((first, second, third)[which].request_id)
            for queue in queues[which:]:
                while True:
                    item = await asyncio.wait_for(queue.get(), 30.0)
                    if isinstance(item, Exception):
                        ends.append(item.code)
                        break
                    if item.finish_reason is not None:
                        ends.append(item.finish_reason)
                        break
        return ends

    assert asyncio.run(cancelled(0)) == ["cancelled", "nothing_to_extend", "nothing_to_extend"]
    assert asyncio.run(cancelled(1)) == ["cancelled", "nothing_to_extend"]
    assert asyncio.run(cancelled(2)) == ["cancelled"]


def test_one_continuation_of_a_request_that_is_held_can_be_cancelled(slow, client):
    first = request(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    three = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=3)
    second, third = (request([5, 6, 7], three, after=first.request_id) for _ in range(2))

    async def made() -> dict[str, dict[int, tuple[list[int], str]]]:
        ends = {second.request_id: {}, third.request_id: {}}
        tokens = {name: {at: [] for at in range(3)} for name in ends}
        arrived: asyncio.Queue = asyncio.Queue()
        async with await AsyncEngineClient.connect(slow.address) as link:
            link.open_soon(first, lambda delta: None)
            for held in (second, third):
                link.open_soon(held, arrived.put_nowait)
            link.cancel(second.request_id, 1)
            link.cancel(second.request_id, 1)  # a second time, and one that there is not
            link.cancel(second.request_id, 7)
            for at in (2, 0, 1):
                link.cancel(third.request_id, at)
            while any(len(found) < 3 for found in ends.values()):
                delta = await asyncio.wait_for(arrived.get(), 30.0)
                tokens[delta.request_id][delta.index] += delta.token_ids
                if delta.finish_reason is not None:
                    assert delta.index not in ends[delta.request_id]
                    ends[delta.request_id][delta.index] = tokens[delta.request_id][delta.index], delta.finish_reason
        return ends

    ends = asyncio.run(made())
    assert ends[third.request_id] == dict.fromkeys(range(3), ([], "cancelled"))
    one = tokens(client, request(PROMPT, first.sampling))
    alone = tokens(client, request([*PROMPT, *one, 5, 6, 7]))
    assert ends[second.request_id] == {0: (alone, "length"), 1: ([], "cancelled"), 2: (alone, "length")}
    assert all(map(told, together(slow.address, *(request(PROMPT) for _ in range(4)))))  # none is held any more


def test_an_id_that_is_held_is_in_use(slow):
    first = request(PROMPT, LONG)
    second = request([5], after=first.request_id)

    async def twice() -> Exception:
        async with await AsyncEngineClient.connect(slow.address) as client:
            client.open_soon(first, lambda delta: None)
            client.open_soon(second, lambda delta: None)
            with pytest.raises(InvalidRequestError, match="already in use"):
                client.open_soon(second, lambda delta: None)
            del client._streams[second.request_id]
            answers: asyncio.Queue = asyncio.Queue()
            client.open_soon(second, answers.put_nowait)
            return await asyncio.wait_for(answers.get(), 30.0)

    assert "already in use" in str(asyncio.run(twice()))


def test_held_requests_count_as_unfinished(tiny_checkpoint):
    with slow_engine(tiny_checkpoint, step_s=0.03, max_queue=3) as small:
        first = request(PROMPT)
        chain = [first]
        for _ in range(3):
            chain.append(request([5], after=chain[-1].request_id))
        *_, last = together(small.address, *chain)
        assert isinstance(last, QueueFullError)
        assert all(map(told, together(small.address, *chain[:3])))  # all are let go of when their client goes


@pytest.mark.parametrize(("interval_s", "most"), [(math.inf, 1), (0.02, 13), (0.0, 13)])
def test_deltas_may_be_kept_back_and_lose_nothing(engine, interval_s, most):
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    with EngineClient(engine.address) as client:
        plain = list(client.generate(request(PROMPT, sampling)))
        kept = list(client.generate(request(PROMPT, sampling, interval_s=interval_s)))
    assert told(kept) == told(plain)
    assert len(kept) <= most
    assert [len(delta.token_ids) for delta in kept] == [len(delta.logprobs or []) for delta in kept]


def test_an_interval_must_be_one():
    for wrong in (-1.0, math.nan, "soon", True):
        with pytest.raises(InvalidRequestError, match="interval_s"):
            request(PROMPT, interval_s=wrong)
