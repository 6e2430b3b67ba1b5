"""Requests of every kind at once, on an engine with room for few: each gets what it gets alone where there is room."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from superinfer.errors import NothingToExtendError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Grammar, Hints, SamplingParams
from superinfer.runtime.slo import SLO
from superinfer.runtime.text import Begun, TextClient, TextRequest, TextResult

CONTEXT = 160
MOST_NEW = 8  # tokens of a prompt that no other has
SMALL: dict[str, Any] = dict(page_size=4, kv_tokens=CONTEXT + 80, max_model_len=CONTEXT, max_batch_size=6)
GRAMMARS = (
    Grammar(kind="regex", source="(one two three|six seven), and then it was over [a-f]{2,9}"),
    Grammar(
        kind="json_schema", source='{"type": "object", "properties": {"shipping": {"enum": ["by air", "by sea"]}}}'
    ),
    Grammar(kind="ebnf", source='root ::= "yes, of course: " [a-m]+ | "no"'),
)


LIMITS: list[dict[str, Any]] = [
    {"allowed_token_ids": tuple(range(5, 45))},
    {"bad_words": ((20,), (30, 31), (5, 6, 7, 8))},
]


@dataclass(frozen=True)
class Asked:
    """after: which of those before it goes on. cancelled_at: tokens after which its client gives it up."""

    request: TextRequest
    after: int | None = None
    cancelled_at: int | None = None


def mixture(rng: random.Random, vocab: int, count: int) -> list[Asked]:
    """What many clients might ask for at once."""
    shared = [[rng.randrange(3, vocab) for _ in range(50)] for _ in range(2)]
    asked: list[Asked] = []
    reaches: list[int] = []  # tokens of each at most, with those that it goes on from
    for at in range(count):
        more: dict[str, Any] = {"temperature": rng.choice([0.0, 0.8]), "seed": at, "max_tokens": rng.randrange(1, 90)}
        if rng.random() < 0.3:
            more["grammar"] = rng.choice(GRAMMARS)
        else:
            more |= {"ignore_eos": True, "min_tokens": rng.choice([0, 1])}
        for likely, options in (
            (0.2, {"n": 3}),
            (0.3, {"logprobs": 2}),
            (0.2, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}),
            (0.2, {"logit_bias": ((20, 2.0), (30, -100.0))}),
            (0.0 if "grammar" in more else 0.2, rng.choice(LIMITS)),
            (0.2, {"stop_token_ids": (rng.randrange(3, vocab), rng.randrange(3, vocab))}),
        ):
            more |= options if rng.random() < likely else {}
        before = [
            i
            for i, other in enumerate(asked)
            if other.request.sampling.n == 1 and other.cancelled_at is None
            if reaches[i] + MOST_NEW + more["max_tokens"] <= CONTEXT
        ]
        after = rng.choice(before) if before and rng.random() < 0.25 else None
        prompt = rng.choice(shared)[: rng.randrange(0, 50)] if after is None else []
        new = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, MOST_NEW + 1))]
        reaches.append((len(prompt) if after is None else reaches[after]) + len(new) + more["max_tokens"])
        asked.append(
            Asked(
                TextRequest(
                    prompt=[*prompt, *new],
                    sampling=SamplingParams(**more),
                    stop=rng.choice([(), (), (), ("e", "ab")]),
                    slo=rng.choice([None, SLO(ttft=0.01, tbt=0.001), SLO(deadline=20.0, weight=3.0)]),
                    cache_salt=rng.choice(["", "", "apart"]),
                    hints=rng.choice([None, Hints(group="g", keep_s=1.0)]),
                    interval_s=rng.choice([0.0, 0.0, 0.02]),
                ),
                after=after,
                cancelled_at=rng.choice([None, None, None, None, 0, 5]),
            )
        )
    return asked


async def all_at_once(text: TextClient, asked: list[Asked]) -> tuple[list[Begun], list[list[TextResult] | None]]:
    """What was sent, and what has come of it; None of one that came when what it was to go on from had ended."""
    begun: list[Begun] = []
    for one in asked:
        after = begun[one.after].request_id if one.after is not None else ""
        begun.append(text.begin(replace(one.request, after=after)))

    async def read(one: Asked, sent: Begun) -> list[TextResult] | None:
        results = [TextResult(index) for index in range(one.request.sampling.n)]
        if one.cancelled_at == 0:
            text.client.cancel(sent.request_id)
        try:
            async for delta in sent.deltas():
                results[delta.index].add(delta)
                if one.cancelled_at and sum(len(result.token_ids) for result in results) >= one.cancelled_at:
                    text.client.cancel(sent.request_id)
        except NothingToExtendError:
            assert one.after is not None
            return None
        return results

    return begun, await asyncio.wait_for(asyncio.gather(*map(read, asked, begun)), 60)


async def check(text: TextClient, ample: TextClient, asked: list[Asked]) -> int:
    """Returns how many tokens were compared."""
    for at, one in enumerate(asked):  # whose text a stop string ends, nothing goes on from
        if one.after is not None and asked[one.after].request.stop:
            asked[at] = replace(one, after=None)
    begun, results = await all_at_once(text, asked)
    prompts: list[list[int]] = []
    compared = 0
    for one, sent, got in zip(asked, begun, results, strict=True):
        prompt = list(sent.prompt)
        if got is None:
            prompts.append(prompt)
            continue
        if one.after is not None:
            (followed,) = results[one.after] or ()
            kept = followed.token_ids[:-1] if followed.finish_reason == "stop" else followed.token_ids
            prompt = [*prompts[one.after], *kept, *prompt]
        prompts.append(prompt)
        alone = await ample.complete(replace(one.request, prompt=prompt, slo=None, hints=None))
        for result, wanted in zip(got, alone, strict=True):
            if result.finish_reason == "cancelled":
                assert one.cancelled_at is not None
                wanted.token_ids = wanted.token_ids[: len(result.token_ids)]
                wanted.logprobs = (wanted.logprobs or [])[: len(result.token_ids)]
                assert (wanted.text + (wanted.stop or "")).startswith(result.text)
            else:
                assert (result.text, result.finish_reason, result.stop) == (
                    wanted.text,
                    wanted.finish_reason,
                    wanted.stop,
                )
                assert result.report is not None and result.report.prompt_tokens == len(prompt)
                assert result.report.output_tokens == len(result.token_ids)
            assert result.token_ids == wanted.token_ids
            told = [logprob.logprob for logprob in result.logprobs or []]
            assert told == pytest.approx([logprob.logprob for logprob in wanted.logprobs or []], abs=1e-4)
            compared += len(result.token_ids)
    return compared


@pytest.fixture(scope="module")
def roomy(tiny_checkpoint) -> Iterator[str]:
    """Address of an engine that has one request at a time, and room for many."""
    config = EngineConfig(
        model=str(tiny_checkpoint), load_format="dummy", threads=1, max_model_len=CONTEXT, prefix_cache=False
    )
    with launch_engine(config) as engine:
        yield engine.address


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(policy="rota", dram_tokens=2000, max_batch_tokens=12),
        dict(policy="lru", dram_tokens=80, link_gbps=0.05, max_batch_tokens=32),
    ],
    ids=lambda settings: settings["policy"],
)
def test_each_of_many_kinds_of_requests_gets_what_it_gets_alone(tiny_checkpoint, roomy, settings):
    async def run(address: str) -> None:
        async with await TextClient.connect(address) as text, await TextClient.connect(roomy) as ample:
            rng, compared = random.Random(7), 0
            for _ in range(2):
                compared += await check(text, ample, mixture(rng, text.info.vocab_size, 20))
            assert compared > 4 * SMALL["kv_tokens"]
            stats, live = await text.client.stats(), await text.client.live()
        assert not live.requests and (stats.running, stats.waiting, stats.failed) == (0, 0, 0)
        assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
        assert stats.tiers is not None and stats.tiers.dram_pinned == 0
        assert stats.preemptions + stats.tiers.rotations_out > 0

    config = EngineConfig(model=str(tiny_checkpoint), load_format="dummy", threads=1, **SMALL, **settings)
    with launch_engine(config) as engine:
        asyncio.run(run(engine.address))
