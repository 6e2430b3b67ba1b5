"""A request whose logits are no numbers gets an error, and nobody else notices: through the engine's door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from overflowing_checkpoint import SPOILS
from transformers import AutoTokenizer

from superinfer.errors import NonFiniteError
from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.protocol import Generate, Grammar, SamplingParams, Score, StatsReport

WHAT = r"values that are not numbers .* dtype bfloat16 or float32, or check the checkpoint"
GREEDY = dict(temperature=0.0)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "drawn": dict(temperature=0.8),
    "filtered": dict(temperature=0.8, top_p=0.9, top_k=40),
    "with logprobs": dict(temperature=0.0, logprobs=3),
    "drawn, with logprobs": dict(temperature=1.0, logprobs=0),
    "penalized": dict(temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.2),
    "constrained": dict(temperature=0.0, grammar=Grammar(kind="regex", source="[a-z~]{30}")),
    "constrained, drawn": dict(temperature=0.8, grammar=Grammar(kind="regex", source="[a-z~]{30}")),
    "limited": dict(temperature=0.0, bad_words=((5, 6),)),
}


@pytest.fixture(scope="module")
def encode(overflowing_checkpoint: Path) -> Callable[[str], list[int]]:
    return AutoTokenizer.from_pretrained(overflowing_checkpoint).encode


@pytest.fixture
def at_the_door(
    overflowing_engine: EngineProcess,
) -> Iterator[Callable[[Callable[..., Coroutine[Any, Any, Any]]], Any]]:
    """Runs a coroutine that takes a client."""

    def run(program: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
        async def connected() -> Any:
            async with await AsyncEngineClient.connect(overflowing_engine.address) as client:
                return await program(client)

        return asyncio.run(connected())

    yield run


async def generated(
    client: AsyncEngineClient, id: str, prompt: list[int], tokens: int = 24, stream: list[int] | None = None, **how: Any
) -> list[list[int]]:
    """The tokens of each continuation. stream: gets those of all as they come."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos="grammar" not in how, seed=5, **how)
    found: list[list[int]] = [[] for _ in range(sampling.n)]
    async for delta in client.generate(Generate(request_id=id, prompt=prompt, sampling=sampling)):
        found[delta.index] += delta.token_ids
        if stream is not None:
            stream += delta.token_ids
    return found


async def idle_stats(client: AsyncEngineClient) -> StatsReport:
    """When nothing runs any more."""
    for _ in range(2000):
        stats = await client.stats()
        if stats.running == stats.waiting == 0:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError("the engine does not come to rest")


def kept_right(encode: Callable[[str], list[int]], how: dict[str, Any]) -> dict[str, Any]:
    """So sampled that the token behind which all is NaN does not come."""
    return how | dict(logit_bias=((encode(SPOILS)[0], -100.0),)) if how["temperature"] or "grammar" in how else how


def spoilt_later(encode: Callable[[str], list[int]], how: dict[str, Any]) -> dict[str, Any]:
    """So sampled that the first token is the one behind which all is NaN."""
    return how | dict(logit_bias=((encode(SPOILS)[0], 100.0),))


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_spoils_the_logits_fails_alone(way, encode, at_the_door):
    how = WAYS[way]
    right = kept_right(encode, how)

    async def program(client: AsyncEngineClient) -> None:
        prompts = [encode(f"the {i}th prompt that is right") for i in range(3)]
        alone = [await generated(client, f"alone {i}", prompt, **right) for i, prompt in enumerate(prompts)]
        before = await idle_stats(client)
        bad = [
            generated(client, "first token", encode(f"its last is {SPOILS}"), **how),
            generated(client, "chunks", encode("x" * 90 + SPOILS + "y" * 90), **how),
        ]
        good = [generated(client, f"beside {i}", prompt, **right) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*bad, *good, return_exceptions=True)
        for error in answers[:2]:
            with pytest.raises(NonFiniteError, match=WHAT):
                raise error
        assert answers[2:] == alone
        after = await idle_stats(client)
        assert after.not_finite - before.not_finite == after.failed - before.failed == 2
        assert after.blocks_free + after.blocks_cached == after.blocks_total

    at_the_door(program)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_spoils_the_logits_ends_its_request_and_no_other(way, encode, at_the_door):
    how = WAYS[way]
    right = kept_right(encode, how)

    async def program(client: AsyncEngineClient) -> None:
        prompt = encode("a prompt that is right")
        alone = await generated(client, "alone", prompt, **right)
        before = await idle_stats(client)
        told: list[int] = []
        answers = await asyncio.gather(
            generated(client, "bad", prompt, stream=told, **spoilt_later(encode, how)),
            generated(client, "good", prompt, **right),
            return_exceptions=True,
        )
        with pytest.raises(NonFiniteError, match=WHAT):
            raise answers[0]
        assert told == encode(SPOILS)  # nothing was told of what came behind it
        assert answers[1] == alone
        after = await idle_stats(client)
        assert after.not_finite - before.not_finite == 1

    at_the_door(program)


def test_a_request_with_several_continuations_fails_as_one(encode, at_the_door):
    async def program(client: AsyncEngineClient) -> None:
        before = await idle_stats(client)
        with pytest.raises(NonFiniteError, match=WHAT):
            await generated(client, "three", encode(f"three of {SPOILS} these"), n=3, temperature=1.0)
        # Of these, some will draw the token sooner than others.
        bias = ((encode(SPOILS)[0], 3.0),)
        with pytest.raises(NonFiniteError, match=WHAT):
            await generated(client, "some", encode("three more"), 200, n=3, temperature=1.0, logit_bias=bias)
        after = await idle_stats(client)
        assert after.failed - before.failed >= 4  # continuations that had ended before are not among them
        assert 2 <= after.not_finite - before.not_finite <= after.failed - before.failed
        assert after.blocks_free + after.blocks_cached == after.blocks_total

    at_the_door(program)


def test_one_of_many_that_decode_together_fails_alone(encode, at_the_door):
    """So many that they are one array to the scheduler."""

    async def program(client: AsyncEngineClient) -> None:
        prompts = [encode(f"prompt {i}") for i in range(40)]
        right = kept_right(encode, dict(temperature=0.9))
        alone = [await generated(client, f"alone {i}", prompt, 40, **right) for i, prompt in enumerate(prompts[:3])]
        spoils = encode(SPOILS)[0]
        # Not before all of them decode: the more likely it is, the sooner it comes.
        bad = generated(client, "bad", encode("one that fails"), 200, temperature=1.0, logit_bias=((spoils, 2.0),))
        good = [generated(client, f"beside {i}", prompt, 40, **right) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(bad, *good, return_exceptions=True)
        with pytest.raises(NonFiniteError, match=WHAT):
            raise answers[0]
        assert answers[1:4] == alone
        assert all(len(answer[0]) == 40 for answer in answers[1:])

    at_the_door(program)


def test_scores_of_a_prompt_that_spoils_the_logits_are_an_error(encode, at_the_door):
    async def program(client: AsyncEngineClient) -> None:
        good = encode("a prompt of many tokens that are all right" * 3)
        alone, _ = await client.score(Score(request_id="alone", prompt=good, start=1))
        before = await idle_stats(client)
        bad = Score(request_id="bad", prompt=encode("x" * 100 + SPOILS + "yz"), start=1)
        error, (beside, _) = await asyncio.gather(
            client.score(bad), client.score(Score(request_id="beside", prompt=good, start=1)), return_exceptions=True
        )
        with pytest.raises(NonFiniteError, match=WHAT):
            raise error
        assert [(s.token_id, round(s.logprob, 4)) for s in beside] == [(s.token_id, round(s.logprob, 4)) for s in alone]
        assert (await idle_stats(client)).not_finite - before.not_finite == 1

    at_the_door(program)


def test_what_was_cached_before_a_request_failed_is_still_found(encode, at_the_door):
    async def program(client: AsyncEngineClient) -> None:
        prefix = "a beginning that several requests share, and that is known to be right. "

        async def cached(id: str, text: str) -> int:
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            request = Generate(request_id=id, prompt=encode(prefix + text), sampling=sampling)
            reports = [delta.report async for delta in client.generate(request) if delta.report is not None]
            return int(reports[0].cached_tokens)

        await cached("first", "right")
        before = await cached("again", "right")
        for i in range(2):
            with pytest.raises(NonFiniteError):
                await cached(f"spoilt {i}", SPOILS * 40)
        assert await cached("once more", "right") == before >= len(prefix) // 2

    at_the_door(program)
