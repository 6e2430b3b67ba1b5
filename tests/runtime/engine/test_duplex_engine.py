"""The real CPU engine over two tiers: tokens are those of transformers, and stats tell what moved."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM

from superinfer.errors import InvalidRequestError
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine import model_executor
from superinfer.runtime.kv.pinned import RESERVE_BYTES
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams

TOKENS = 70
SETTINGS = dict(policy="lru", page_size=8, kv_tokens=256, dram_tokens=4096, max_batch_size=8, max_batch_tokens=64)
# Copies take what the link says, which is next to nothing. Without a link they take what the machine needs: one that
# stands still in a copy makes the engine believe, rightly, that computing twice is quicker.
INSTANT_GBPS = 100.0


@pytest.fixture(scope="module")
def reference(random_llama):
    model = LlamaForCausalLM.from_pretrained(random_llama).eval()

    def continue_greedily(prompt: list[int]) -> list[int]:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    return continue_greedily


def generate(client: EngineClient, prompt: list[int], **sampling):
    """Tokens and report."""
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **sampling})
    deltas = list(client.generate(Generate(request_id=new_request_id(), prompt=prompt, sampling=wanted)))
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].report


def all_at_once(client: EngineClient, prompts: list[list[int]]):
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda prompt: generate(client, prompt), prompts))


def prompts_of(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 500) for _ in range(40)]
    return [
        shared[: rng.choice([0, 8, 24, 40])] + [rng.randrange(3, 500) for _ in range(rng.randrange(1, 60))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("link_gbps", [INSTANT_GBPS, 0.05])
def test_greedy_tokens_are_those_of_transformers_however_often_requests_rotate(random_llama, reference, link_gbps):
    config = EngineConfig(model=str(random_llama), link_gbps=link_gbps, **SETTINGS)
    prompts = prompts_of(12, seed=4)
    expected = [reference(prompt) for prompt in prompts]
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        got = all_at_once(client, prompts)
        stats = client.stats()
        assert [tokens for tokens, _ in got] == expected
        tiers = stats.tiers
        assert tiers.rotations_out >= 1 and tiers.rotations_in >= 1
        assert tiers.rotations_out + stats.preemptions >= 10  # by what copies and computing have taken on this machine
        assert sum(report.rotations for _, report in got) == tiers.rotations_out
        if link_gbps == INSTANT_GBPS:  # on a slow link, computing twice may be the quicker way back
            assert stats.preemptions == 0, "room in DRAM, and yet something was computed twice"
        assert tiers.bytes_in > 0 and tiers.bytes_out > 0 and tiers.copies_failed == 0
        assert 0 < tiers.mirror_hit_rate <= 1
        assert tiers.gbps_in == pytest.approx(link_gbps, rel=0.3)


def test_a_finished_turn_waits_in_dram_and_is_loaded_for_the_next(random_llama, reference):
    config = EngineConfig(model=str(random_llama), link_gbps=INSTANT_GBPS, **(SETTINGS | {"policy": "fcfs"}))
    rng = random.Random(8)
    first = [rng.randrange(3, 500) for _ in range(120)]
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        answer, _ = generate(client, first)
        for _ in range(3):
            generate(client, [rng.randrange(3, 500) for _ in range(150)])  # takes all of HBM
        second = first + answer + [5, 6, 7]
        tokens, report = generate(client, second, max_tokens=20)
        assert tokens == reference(second)[:20]
        assert report.cached_tokens >= 184, "the turn before was not found again"
        assert client.stats().tiers.dram_hits >= 20


def test_a_request_larger_than_hbm_is_refused_however_much_dram_there_is_and_others_are_served(random_llama, reference):
    config = EngineConfig(model=str(random_llama), **{**SETTINGS, "kv_tokens": 64})
    fits = prompts_of(1, seed=1)[0][:8]
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        with pytest.raises(InvalidRequestError, match="64"):
            generate(client, [5] * 60)
        assert generate(client, fits, max_tokens=50)[0] == reference(fits)[:50]


def test_a_second_tier_beyond_what_memory_there_is_is_smaller_and_serves(random_llama, reference, capfd):
    config = EngineConfig(model=str(random_llama), **{**SETTINGS, "dram_tokens": 10**13})
    prompts = prompts_of(3, seed=2)
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        assert [tokens for tokens, _ in all_at_once(client, prompts)] == [reference(prompt) for prompt in prompts]
        assert 0 < client.stats().tiers.dram_blocks < 10**13 // config.page_size
    assert "the DRAM tier has" in capfd.readouterr().err


def test_where_memory_is_short_there_is_no_second_tier_and_the_engine_serves(random_llama, monkeypatch, caplog):
    monkeypatch.setattr(model_executor, "free_memory", lambda device: RESERVE_BYTES + (1 << 20))
    executor = model_executor.build_executor(EngineConfig(model=str(random_llama), **SETTINGS | {"kv_tokens": 8192}))
    assert (executor.duplex, executor.tier) == (None, None)
    assert "the DRAM tier has 0.0 GiB" in caplog.text
    executor.close()


def test_a_pool_beyond_what_memory_there_is_is_refused_with_what_would_do(random_llama):
    with pytest.raises(InvalidRequestError, match=r"kv_tokens=10000000000000 takes .* GiB of memory are free; lower"):
        launch_engine(EngineConfig(model=str(random_llama), kv_tokens=10**13))


def test_without_dram_nothing_is_said_of_it(client):
    assert client.stats().tiers is None


@pytest.mark.parametrize(
    ("setting", "says"), [({"dram_tokens": 3}, "no block of page_size"), ({"link_gbps": 0.0}, "link_gbps=0.0")]
)
def test_settings_that_cannot_work_are_refused(setting, says):
    with pytest.raises(InvalidRequestError, match=says):
        EngineConfig(**setting)
