"""Output tokens per second of many requests sent at once, through the engine's door.

1,024 requests, prompts and outputs of 100 to 1,024 tokens each, uniform, seed 0. Llama-3-8B's shape, random weights,
bf16.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from gpu_common import KV_BYTES_PER_TOKEN, WEIGHT_BYTES, ceilings, model_folder, random_prompt
from record import write

from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams


def workload(requests: int, low: int, high: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt, output tokens) of every request."""
    rng = random.Random(seed)
    return [(random_prompt(rng, rng.randint(low, high)), rng.randint(low, high)) for _ in range(requests)]


async def serve(address: str, work: list[tuple[list[int], int]]) -> dict[str, float]:
    """Send everything, wait for everything."""
    async with await AsyncEngineClient.connect(address) as client:

        async def one(prompt: list[int], output: int) -> int:
            sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
            request = Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling)
            return sum([len(delta.token_ids) async for delta in client.generate(request)])

        before = await client.stats()
        started = time.perf_counter()
        counts = await asyncio.gather(*[one(*item) for item in work])
        seconds = time.perf_counter() - started
        after = await client.stats()
    assert counts == [output for _, output in work]
    steps = after.steps - before.steps
    return {
        "seconds": seconds,
        "output_tokens": sum(counts),
        "prompt_tokens": sum(len(prompt) for prompt, _ in work),
        "output_tokens_per_s": sum(counts) / seconds,
        "steps": steps,
        "preemptions": after.preemptions - before.preemptions,
        "schedule_s": after.schedule_s_mean * after.steps - before.schedule_s_mean * before.steps,
        "device_s": after.step_s_mean * after.steps - before.step_s_mean * before.steps,
    }


def floor_s(work: list[tuple[list[int], int]], steps: int, roof: dict[str, float]) -> float:
    """Weights once a step, every KV read of every decode, and the products of every token, each at its ceiling."""
    kv_reads = sum(output * (len(prompt) + output / 2) for prompt, output in work) * KV_BYTES_PER_TOKEN
    memory = (steps * WEIGHT_BYTES + kv_reads) / roof["copy_tb_s"] / 1e12
    prompt_tokens = sum(len(prompt) for prompt, _ in work)
    return memory + prompt_tokens * WEIGHT_BYTES / roof["matmul_tflop_s"] / 1e12  # 2 flop per weight of 2 bytes


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-offline")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--max-batch-size", type=int, default=512)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    roof = ceilings()
    work = workload(arguments.requests, 100, 1024, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=model_folder(Path(folder)),
            device="cuda",
            load_format="dummy",
            max_batch_size=arguments.max_batch_size,
            max_batch_tokens=arguments.max_batch_tokens,
            prefix_cache=False,
        )
        started = time.perf_counter()
        with launch_engine(config) as engine:
            start_s = time.perf_counter() - started
            asyncio.run(serve(engine.address, workload(32, 20, 40, seed=1)))  # warm up
            measured = asyncio.run(serve(engine.address, work))
    floor = floor_s(work, int(measured["steps"]), roof)
    print(
        f"{measured['output_tokens_per_s']:.0f} output tokens/s, {measured['seconds']:.1f} s for {len(work)} requests; "
        f"floor {floor:.1f} s; device busy {measured['device_s']:.1f} s, scheduling {measured['schedule_s']:.1f} s"
    )
    record = {
        "model": "Llama-3-8B shape, random weights, bfloat16",
        "settings": vars(arguments),
        "ceilings": roof,
        "floor_s": floor,
        "engine_start_s": start_s,
        "result": measured,
    }
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_offline.py', record)}")


if __name__ == "__main__":
    main()
