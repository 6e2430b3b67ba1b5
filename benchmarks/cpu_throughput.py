"""Output tokens/s of the CPU engine on the embedded model against `transformers` `generate`, in one run.

The engine is measured through its door: a process of its own, ZMQ, one client. transformers runs the same prompts one
after another, greedy, the same number of new tokens. Both use all cores. Rounds alternate, so that a change of the
machine's speed meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import torch
from record import write
from transformers import AutoModelForCausalLM

from superinfer.embedded import model_path
from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.tokenization import Tokenizer


def prompts(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Different prompts of about `length` tokens: nothing is shared but the template's first words."""
    texts = []
    for at in range(count):
        facts = " ".join(f"Shelf {at}{i} holds {7 * i + at} boxes." for i in range(length // 12))
        texts.append(tokenizer.render_chat([{"role": "user", "content": f"{facts} How many boxes are there?"}]))
    return [tokenizer.encode(text, special=False)[:length] for text in texts]


async def engine_tokens_per_s(address: str, batch: list[list[int]], new_tokens: int) -> float:
    """All prompts at once. The cache is salted anew, so no round profits from the one before."""
    salt = new_request_id()
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    async with await AsyncEngineClient.connect(address) as client:

        async def one(prompt: list[int]) -> int:
            wanted = Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling, cache_salt=salt)
            return sum([len(delta.token_ids) async for delta in client.generate(wanted)])

        started = time.perf_counter()
        done = await asyncio.gather(*[one(prompt) for prompt in batch])
        took = time.perf_counter() - started
    assert sum(done) == new_tokens * len(batch)
    return sum(done) / took


def transformers_tokens_per_s(model: torch.nn.Module, batch: list[list[int]], new_tokens: int) -> float:
    """One prompt after another."""
    started = time.perf_counter()
    for prompt in batch:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        assert out.shape[1] == len(prompt) + new_tokens
    return new_tokens * len(batch) / (time.perf_counter() - started)


def main() -> None:
    """Measure, print, write results/cpu-throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    path = str(model_path())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    batch = prompts(Tokenizer(path), 16, arguments.prompt_tokens)
    samples: dict[str, list[float]] = {"engine_16": [], "engine_1": [], "transformers": []}
    with launch_engine(EngineConfig()) as engine:
        asyncio.run(engine_tokens_per_s(engine.address, batch, 8))  # warm up both
        transformers_tokens_per_s(model, batch[:1], 8)
        for _ in range(arguments.rounds):
            samples["transformers"].append(transformers_tokens_per_s(model, batch, arguments.new_tokens))
            samples["engine_16"].append(asyncio.run(engine_tokens_per_s(engine.address, batch, arguments.new_tokens)))
            samples["engine_1"].append(
                asyncio.run(engine_tokens_per_s(engine.address, batch[:1], arguments.new_tokens))
            )
    median = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {name: median[name] / median["transformers"] for name in ("engine_16", "engine_1")}
    print(f"transformers, one after another   {median['transformers']:8.1f} tok/s")
    print(f"superinfer, 16 concurrent         {median['engine_16']:8.1f} tok/s   {ratios['engine_16']:.2f} x")
    print(f"superinfer, 1 request             {median['engine_1']:8.1f} tok/s   {ratios['engine_1']:.2f} x")
    out = write(
        "cpu-throughput",
        "python benchmarks/cpu_throughput.py",
        {
            "model": "embedded, float32",
            "threads": torch.get_num_threads(),
            "settings": vars(arguments),
            "tokens_per_s": samples,
            "median": median,
            "ratio_to_transformers": ratios,
        },
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
