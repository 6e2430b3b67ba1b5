"""The engine process on a GPU, through its door."""

from __future__ import annotations

from checkpoints import generate, make_checkpoint

from superinfer.runtime.client import EngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams


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
