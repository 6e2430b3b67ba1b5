"""Experts and a sliding window through an engine's door: scheduler, prefix cache and chunks as they are in use."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from checkpoints import generate, make_checkpoint

from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams

TOKENS = 12


def test_a_mixture_with_a_window_answers_many_clients_as_transformers_would(tmp_path):
    model = make_checkpoint(tmp_path, "mixtral-tied-window")
    rng = random.Random(5)
    shared = [rng.randrange(211) for _ in range(40)]
    prompts = [shared[: 40 - 5 * i] + [rng.randrange(211) for _ in range(3 + 6 * i)] for i in range(6)]
    config = EngineConfig(
        model=str(tmp_path), device="cpu", page_size=4, kv_tokens=512, max_batch_tokens=24, max_batch_size=4, threads=1
    )
    with launch_engine(config) as engine, EngineClient(engine.address) as client:

        def ask(i: int) -> list[int]:
            request = Generate(
                request_id=str(i), prompt=prompts[i], sampling=SamplingParams(temperature=0, max_tokens=TOKENS)
            )
            return [token for delta in client.generate(request) for token in delta.token_ids]

        first = ask(0)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
    assert answers == [generate(model, prompt, TOKENS) for prompt in prompts]
    assert answers[0] == first  # the second time from cached blocks
