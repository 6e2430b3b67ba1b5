"""The engine process on a GPU, through its door."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from checkpoints import generate, make_checkpoint
from overflowing_checkpoint import SPOILS, write_overflowing_checkpoint
from transformers import AutoTokenizer

from superinfer.errors import NonFiniteError
from superinfer.runtime.client import AsyncEngineClient, EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, Grammar, SamplingParams, Score


def test_tokens_through_the_door_equal_transformers(tmp_path):
    model = make_checkpoint(tmp_path)
    prompt = list(range(1, 40))
    stages = set()
    config = EngineConfig(model=str(tmp_path), device="cuda", dtype="float32", kv_tokens=4096, max_batch_size=8)
    with (
        launch_engine(config, on_progress=lambda stage, _: stages.add(stage)) as engine,
        EngineClient(engine.address) as client,
    ):
        sampling = SamplingParams(temperature=0, max_tokens=16)
        request = Generate(request_id="one", prompt=prompt, sampling=sampling)
        tokens = [token for delta in client.generate(request) for token in delta.token_ids]
        assert client.info.device.startswith("cuda")
    assert tokens == generate(model, prompt, 16)
    assert "capturing CUDA graphs" in stages


HEADS_OF_128 = dict(hidden_size=512, num_attention_heads=4, num_key_value_heads=1, head_dim=128)
SAMPLINGS: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.9),
    dict(temperature=0.9, top_p=0.9, top_k=30),
    dict(temperature=0.0, logprobs=2),
    dict(temperature=0.9, repetition_penalty=1.2),
    dict(temperature=0.8, grammar=Grammar(kind="regex", source="[a-z~]{30}")),
]


@pytest.mark.parametrize(("dtype", "changes"), [("float32", {}), ("bfloat16", HEADS_OF_128)])
def test_requests_that_compute_no_numbers_fail_alone(tmp_path, dtype, changes):
    """Prompts that spoil the logits, and tokens: beside others of every kind of sampling, in graphs and overlapped."""
    folder = write_overflowing_checkpoint(tmp_path / "model", **changes)
    encode = AutoTokenizer.from_pretrained(folder).encode
    spoils = encode(SPOILS)[0]
    config = EngineConfig(model=str(folder), device="cuda", dtype=dtype, kv_tokens=16384, max_batch_size=64)

    async def tokens(client, id: str, text: str, bias: float, **how: Any) -> list[int]:
        params = SamplingParams(
            max_tokens=24, seed=7, ignore_eos="grammar" not in how, logit_bias=((spoils, bias),) if bias else (), **how
        )
        request = Generate(request_id=id, prompt=encode(text), sampling=params)
        return [token async for delta in client.generate(request) for token in delta.token_ids]

    async def program(address: str) -> None:
        async with await AsyncEngineClient.connect(address) as client:
            for at, how in enumerate(SAMPLINGS):
                good = await asyncio.gather(
                    *(tokens(client, f"alone {at} {i}", f"prompt {i} is right", -100.0, **how) for i in range(3))
                )
                assert all(len(found) == 24 for found in good)
            calls = []
            for at, how in enumerate(SAMPLINGS):
                calls.append(tokens(client, f"prompted {at}", f"this is {SPOILS} not", 0.0, **how))
                calls.append(tokens(client, f"generated {at}", "this is right so far", 100.0, **how))
                calls += [tokens(client, f"beside {at} {i}", f"prompt {i} is right", -100.0, **how) for i in range(3)]
            bad_score = client.score(Score(request_id="score", prompt=encode(f"this is {SPOILS} not"), start=1))
            found = await asyncio.gather(*calls, bad_score, return_exceptions=True)
            assert isinstance(found.pop(), NonFiniteError)
            for at in range(len(SAMPLINGS)):
                first, second, *good = found[5 * at : 5 * at + 5]
                assert isinstance(first, NonFiniteError) and isinstance(second, NonFiniteError), (at, first, second)
                assert all(len(answer) == 24 for answer in good), (at, good)
            stats = await client.stats()
            assert stats.not_finite == 2 * len(SAMPLINGS) + 1 == stats.failed
            with pytest.raises(NonFiniteError):  # nobody else is in its step: drawn by a kernel of its own
                await tokens(client, "drawn", f"this is {SPOILS} not", 0.0, temperature=0.9)
            # Freed blocks hold NaN; whoever gets them next writes them before reading.
            again = [tokens(client, f"again {i}", f"{i} " + "x" * 300, -100.0, temperature=0.0) for i in range(40)]
            assert all(len(answer) == 24 for answer in await asyncio.gather(*again))

    with launch_engine(config) as engine:
        asyncio.run(program(engine.address))
