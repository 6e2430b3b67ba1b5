"""RotaSched in the real CPU engine: the same tokens as alone, attainment by class, and refusals that say so."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from superinfer.errors import InvalidRequestError, OverloadedError
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, Grammar, Hints, SamplingParams
from superinfer.runtime.slo import SLO

SMALL = dict(policy="rota", page_size=8, kv_tokens=256, dram_tokens=4096, max_batch_size=8, max_batch_tokens=64)
SLOS = {"chat": SLO(ttft=2.0, tbt=0.05), "late": SLO(ttft=1e-4), "batch": None}


def generate(
    client: EngineClient,
    prompt: list[int],
    slo: SLO | None,
    slo_class: str,
    tokens: int = 40,
    n: int = 1,
    grammar: Grammar | None = None,
):
    wanted = Generate(
        request_id=new_request_id(),
        prompt=prompt,
        sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=grammar is None, n=n, grammar=grammar),
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
    assert stats.tiers.rotations_out + stats.preemptions > 0  # which of them, a busy machine decides
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
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        with pytest.raises(OverloadedError, match="try again in"):
            generate(client, [5] * 60, SLO(deadline=1.0), "chat", tokens=150, n=120)  # 18,000 tokens in a second
        assert len(generate(client, [5] * 60, SLO(deadline=30.0), "chat")[0]) == 40
        assert len(generate(client, [5] * 60, None, "batch")[0]) == 40
        stats = client.stats()
    assert stats.classes["chat"].refused == 120
    assert stats.classes["chat"].met == 1
    assert stats.waiting == stats.running == 0


def test_what_must_follow_a_grammar_is_refused_like_others(tiny_checkpoint):
    config = EngineConfig(model=str(tiny_checkpoint), load_format="dummy", admission="refuse", **SMALL)
    letters = Grammar(kind="regex", source="[a-z]{150}")
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        generate(client, [5] * 60, None, "batch", tokens=1, grammar=letters)  # is compiled by now
        with pytest.raises(OverloadedError, match="try again in"):
            generate(client, [5] * 60, SLO(deadline=1.0), "chat", tokens=150, n=120, grammar=letters)
        assert len(generate(client, [5] * 60, SLO(deadline=30.0), "chat", grammar=letters)[0]) == 40
        stats = client.stats()
    assert (stats.classes["chat"].refused, stats.classes["chat"].requests) == (120, 121)
    assert stats.waiting == stats.running == 0


@pytest.mark.slow
def test_what_cannot_be_kept_runs_all_the_same_and_its_report_says_why_it_was_late(random_llama):
    config = EngineConfig(model=str(random_llama), admission="degrade", **SMALL)
    sampling = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, n=60)
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        asked = Generate(
            request_id=new_request_id(), prompt=[5] * 60, sampling=sampling, slo=SLO(deadline=0.05), slo_class="chat"
        )  # 9,000 tokens, 150 steps one after another, in 50 ms
        deltas = list(client.generate(asked))
        _, kept = generate(client, [6] * 60, SLO(deadline=30.0), "chat")
        stats = client.stats()
    reports = [delta.report for delta in deltas if delta.report is not None]
    assert sum(len(delta.token_ids) for delta in deltas) == 60 * 150
    late = [report for report in reports if not report.met]
    assert len(late) > 30
    assert {report.why for report in late} >= {"overload"}
    assert all(report.why == "" for report in reports if report.met)
    assert (kept.met, kept.why, kept.degraded) == (True, "", False)
    assert stats.classes["chat"].refused == 0
    assert stats.classes["chat"].degraded == sum(report.degraded for report in reports) >= len(late) / 2


def test_admission_needs_a_policy_that_foresees():
    with pytest.raises(InvalidRequestError, match="needs policy 'rota'"):
        EngineConfig(admission="refuse")
