"""`superinfer bench offline`: output tokens per second of many requests sent at once, through the engine's door."""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superinfer.cli.options import with_engine_options
from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig

if TYPE_CHECKING:
    from superinfer.bench.ceilings import Ceilings
    from superinfer.bench.workload import Span
    from superinfer.runtime.sim.shapes import ModelShape

Work = list[tuple[list[int], int]]


@with_engine_options
def offline(
    config: EngineConfig,
    requests: Annotated[int, typer.Option(help="How many requests.")] = 1024,
    prompt_tokens: Annotated[str, typer.Option(help="Prompts' lengths: 512, or 100:1024, uniform.")] = "100:1024",
    output_tokens: Annotated[str, typer.Option(help="The same, of outputs.")] = "100:1024",
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often all are sent, each time with other prompts.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the named shape has.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Send many requests at once and count tokens per second. --model also takes llama-3-8b, qwen2.5-32b and
    mixtral-8x7b: their sizes, with random weights."""
    from superinfer.bench.ceilings import measure_ceilings
    from superinfer.bench.engine import save, started_engine
    from superinfer.bench.progress import Bar
    from superinfer.bench.shapes import engine_of_shape
    from superinfer.bench.workload import Span
    from superinfer.out_file import check_writable

    check_writable(json_path)
    if requests < 1 or rounds < 1:
        raise InvalidRequestError(f"requests={requests} and rounds={rounds} must be at least 1")
    prompts, outputs = Span.parse("--prompt-tokens", prompt_tokens), Span.parse("--output-tokens", output_tokens)
    with engine_of_shape(config, layers) as (settings, shape):
        found = []
        with started_engine(settings) as (address, start_s):
            info = asyncio.run(_warm_up(address))
            for number in range(rounds):
                work = _work(requests, prompts, outputs, seed + number, info["vocab_size"], info["max_model_len"])
                with Bar(f"round {number + 1} of {rounds}", requests) as bar:
                    found.append(asyncio.run(_serve(address, work, bar)))
                _show(found[-1], requests)
        roof = measure_ceilings(info["device"], info["dtype"], config.threads)
        floors = [_floor_s(shape, one, roof, info) for one in found]
    rate = statistics.median(one["output_tokens_per_s"] for one in found)
    share = statistics.median(floor / one["seconds"] for floor, one in zip(floors, found, strict=True))
    print(f"median {rate:,.0f} output tokens/s; at the ceilings of memory and arithmetic: {share:.0%} of the time")
    save(
        json_path,
        {
            "engine": info,
            "settings": {
                "requests": requests,
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "seed": seed,
                "layers": shape.layers,
                "max_batch_size": config.max_batch_size,
                "max_batch_tokens": config.max_batch_tokens,
                "threads": config.threads,
            },
            "ceilings": roof._asdict(),
            "engine_start_s": start_s,
            "output_tokens_per_s": rate,
            "floor_s": floors,
            "rounds": found,
        },
    )


def _show(found: dict[str, Any], requests: int) -> None:
    """A round, as `_serve` measured it."""
    from superinfer.bench.engine import tier_line

    print(
        f"{found['output_tokens_per_s']:,.0f} output tokens/s, {requests} requests in {found['seconds']:.1f} s; "
        f"steps took {found['device_s']:.1f} s, scheduling {found['schedule_s']:.1f} s, "
        f"{found['preemptions']} preemptions"
    )
    if "tiers" in found:
        print(tier_line(found["tiers"]))


def _work(requests: int, prompts: Span, outputs: Span, seed: int, vocab: int, room: int) -> Work:
    """(prompt, output tokens) of each request. Raises InvalidRequestError where they are longer than the engine's."""
    from superinfer.bench.engine import random_prompt

    if prompts.high + outputs.high > room:
        raise InvalidRequestError(
            f"prompts of {prompts.high} and outputs of {outputs.high} tokens exceed the engine's context of {room}; "
            "lower --prompt-tokens or --output-tokens"
        )
    rng = random.Random(seed)
    return [
        (random_prompt(rng, rng.randint(*prompts), vocab), rng.randint(*outputs)) for _ in range(requests)
    ]  # fmt: skip


async def _warm_up(address: str) -> dict[str, Any]:
    """Returns what the engine says of itself."""
    from superinfer.bench.engine import ask, info_of, random_prompt
    from superinfer.runtime.client import AsyncEngineClient

    rng = random.Random(-1)
    async with await AsyncEngineClient.connect(address) as client:
        lengths = [min(20 + at, client.info.max_model_len // 2) for at in range(16)]
        vocab = client.info.vocab_size
        await asyncio.gather(*[ask(client, random_prompt(rng, length, vocab), 8) for length in lengths])
        return {**info_of(client.info), "vocab_size": vocab}


async def _serve(address: str, work: Work, bar: Any) -> dict[str, Any]:
    """Send everything, wait for everything."""
    import time

    from superinfer.bench.engine import ask, between
    from superinfer.runtime.client import AsyncEngineClient

    async with await AsyncEngineClient.connect(address) as client:

        async def one(prompt: list[int], output: int) -> int:
            count = len((await ask(client, prompt, output)).times)
            bar.advance()
            return count

        before = await client.stats()
        started = time.perf_counter()
        counts = await asyncio.gather(*[one(*item) for item in work])
        seconds = time.perf_counter() - started
        after = await client.stats(timeout=30)
    assert counts == [output for _, output in work], "the engine stopped early"
    return {
        "seconds": seconds,
        "output_tokens": sum(counts),
        "prompt_tokens": sum(len(prompt) for prompt, _ in work),
        "output_tokens_per_s": sum(counts) / seconds,
        "kv_reads": sum(output * (len(prompt) + output / 2) for prompt, output in work),
        **between(before, after),
    }


def _floor_s(shape: ModelShape, one: dict[str, Any], roof: Ceilings, info: dict[str, Any]) -> float:
    """Weights once a step, every KV read of every decode, and the products of every token, each at its ceiling."""
    from superinfer.bench.ceilings import in_dtype

    shape = in_dtype(shape, info["dtype"])
    weights = one["steps"] * shape.read_bytes(one["output_tokens"] / max(1, one["steps"]))
    memory_s = (weights + one["kv_reads"] * shape.kv_bytes_per_token) / roof.copy
    return float(memory_s + one["prompt_tokens"] * shape.flops_per_token / roof.matmul)
