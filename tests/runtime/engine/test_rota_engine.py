"""RotaSched in the real CPU engine: the same tokens as alone, attainment by class, and refusals that say so."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from superinfer.errors import InvalidRequestError, OverloadedError
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, Hints, SamplingParams
from superinfer.runtime.slo import SLO

SMALL = dict(policy="rota", page_size=8, kv_tokens=256, dram_tokens=4096, max_batch_size=8, max_batch_tokens=64)
SLOS = {"chat": SLO(ttft=2.0, tbt=0.05), "late": SLO(ttft=1e-4), "batch": None}


def generate(client: EngineClient, prompt: list[int], slo: SLO | None, slo_class: str, tokens: int = 40):
    wanted = Generate(
        request_id=new_request_id(),
        prompt=prompt,
        sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        slo=slo,
        slo_class=slo_class,
        hints=Hints(expected_tokens=30.0),
    )
    deltas = list(client.generate(wanted))
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].report


def test_tokens_are_those_of_a_request_alone_and_attainment_is_counted_by_class(random_llama):
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 500) for _ in range(rng.randrange(10, 90))] for _ in range(18)]
    classes = [("chat", "late", "batch")[at % 3] for at in range(18)]
    with (
        launch_engine(EngineConfig(model=str(random_llama), **SMALL)) as engine,
        EngineClient(engine.address) as client,
    ):
        alone = [generate(client, prompt, None, "alone")[0] for prompt in prompts]
        with ThreadPoolExecutor(18) as threads:
            together = list(threads.map(lambda p, c: generate(client, p, SLOS[c], c), prompts, classes))
        stats = client.stats()
    assert [tokens for tokens, _ in together] == alone
    assert stats.tiers.rotations_out > 0
    counted = stats.classes
    assert {name: counts.requests for name, counts in counted.items()} == {
        "alone": 18,
        "chat": 6,
        "late": 6,
        "batch": 6,
    }
    assert (counted["late"].met, counted["late"].missed) == (0, 6)
    assert counted["chat"].met + counted["chat"].missed == 6
    assert counted["batch"].met == counted["batch"].missed == 0
    assert 0.0 < stats.cost_error_p50 <= stats.cost_error_p90


def test_what_cannot_be_kept_is_refused_with_a_time_to_come_back(random_llama):
    config = EngineConfig(model=str(random_llama), admission="refuse", **SMALL)
    slo = SLO(ttft=0.05, tbt=0.0005)  # 2,000 tokens/s each, 60 at once

    def ask(seed: int, slo: SLO | None = slo):
        prompt = [3 + (seed * 37 + at) % 490 for at in range(60)]
        try:
            return generate(client, prompt, slo, "chat" if slo else "batch", tokens=60)[1]
        except OverloadedError as error:
            return error

    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        with ThreadPoolExecutor(60) as threads:
            outcomes = list(threads.map(ask, range(60)))
            unpromised = [ask(seed, None) for seed in range(3)]
        stats = client.stats()
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert refused
    assert not any(isinstance(outcome, OverloadedError) for outcome in unpromised)
    assert "try again in" in str(refused[0])
    assert stats.classes["chat"].refused == len(refused)
    assert stats.waiting == stats.running == 0


def test_admission_needs_a_policy_that_foresees():
    with pytest.raises(InvalidRequestError, match="needs policy 'rota'"):
        EngineConfig(admission="refuse")
