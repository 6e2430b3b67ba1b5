"""Time per output token of a steady decode batch, through the engine's door, beside the roofline of the same run.

All requests of a batch are sent at once. What counts is the window in which all of them decode: from the last first
token to the first last token, seen by the client. Llama-3-8B's shape, random weights, bf16, 512-token prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

from gpu_common import ceilings, model_folder, random_prompt, tpot_floor_ms
from record import write

from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams


async def one_request(client: AsyncEngineClient, prompt: list[int], sampling: SamplingParams) -> list[float]:
    """When each token arrived."""
    request = Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling)
    times: list[float] = []
    async for delta in client.generate(request):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times


async def one_round(address: str, batch: int, prompt: int, output: int, sampling: SamplingParams, seed: int) -> dict:
    rng = random.Random(seed)
    prompts = [random_prompt(rng, prompt) for _ in range(batch)]
    async with await AsyncEngineClient.connect(address) as client:
        before = await client.stats()
        started = time.perf_counter()
        arrivals = await asyncio.gather(*[one_request(client, tokens, sampling) for tokens in prompts])
        after = await client.stats()
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    tpots = []
    for times in arrivals:
        inside = [t for t in times if begin <= t <= end]
        tpots.append((inside[-1] - inside[0]) / (len(inside) - 1))
    steps = after.steps - before.steps
    return {
        "tpot_ms": statistics.median(tpots) * 1e3,
        "window_s": end - begin,
        "window_tokens": len(inside),
        "ttft_s_last": begin - started,
        "steps": steps,
        "schedule_ms_per_step": (after.schedule_s_mean * after.steps - before.schedule_s_mean * before.steps)
        / steps
        * 1e3,
        "device_ms_per_step": (after.step_s_mean * after.steps - before.step_s_mean * before.steps) / steps * 1e3,
    }


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="gpu-latency")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    roof = ceilings()
    print(f"copy {roof['copy_tb_s']:.2f} TB/s, bf16 matmul {roof['matmul_tflop_s']:.0f} TFLOP/s", flush=True)
    sampling = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.new_tokens, ignore_eos=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=model_folder(Path(folder)),
            device="cuda",
            load_format="dummy",
            max_batch_size=max(arguments.batch),
            max_batch_tokens=8192,
            prefix_cache=False,
        )
        started = time.perf_counter()
        with launch_engine(config) as engine:
            start_s = time.perf_counter() - started
            print(f"engine ready after {start_s:.1f} s", flush=True)
            for batch in arguments.batch:
                settings = (engine.address, batch, arguments.prompt_tokens, arguments.new_tokens, sampling)
                asyncio.run(one_round(*settings, seed=batch))  # warm up
                rounds = [asyncio.run(one_round(*settings, seed=1000 * i + batch)) for i in range(arguments.rounds)]
                tpot = statistics.median(r["tpot_ms"] for r in rounds)
                context = arguments.prompt_tokens + arguments.new_tokens / 2
                floor = tpot_floor_ms(batch, context, roof)
                rows.append({"batch": batch, "tpot_ms": tpot, "floor_ms": floor, "rounds": rounds})
                print(
                    f"batch {batch:4d}: TPOT {tpot:6.2f} ms, floor {floor:6.2f} ms ({floor / tpot:.0%}), "
                    f"scheduling {rounds[-1]['schedule_ms_per_step']:.2f} ms a step",
                    flush=True,
                )
    measured = {
        "model": "Llama-3-8B shape, random weights, bfloat16",
        "settings": vars(arguments),
        "ceilings": roof,
        "floor": "weights but the embedding table, read at the copy's speed or multiplied at the matrix product's, "
        "whichever takes longer, and the KV of prompt + output / 2 tokens, read at the copy's speed",
        "engine_start_s": start_s,
        "results": rows,
    }
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_latency.py', measured)}")


if __name__ == "__main__":
    main()
