"""`superinfer bench latency`: TPOT by batch, TTFT by prompt length, prefill throughput, each beside its ceiling."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superinfer.cli.options import with_engine_options
from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig

if TYPE_CHECKING:
    from superinfer.bench.ceilings import Ceilings
    from superinfer.runtime.client import AsyncEngineClient
    from superinfer.runtime.sim.shapes import ModelShape


@with_engine_options
def latency(
    config: EngineConfig,
    batch: Annotated[
        str, typer.Option(help="Requests that decode together, for TPOT; several with commas.")
    ] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of each of these, in tokens.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Answer of each of these, in tokens.")] = 160,
    ttft: Annotated[
        str, typer.Option(help="Prompt lengths, one request at a time, for TTFT; several with commas.")
    ] = "128,512,1024",
    prefill: Annotated[
        str, typer.Option(help="Prompts at once x their length, for prefill throughput; several with commas.")
    ] = "8x512",
    temperature: Annotated[float, typer.Option(help="Sampling temperature, for TPOT.")] = 0.0,
    rounds: Annotated[int, typer.Option(help="How often each is measured; medians are shown, all are written.")] = 3,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the named shape has.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Time tokens and prompts on an engine that has nothing else to do. --model also takes llama-3-8b, qwen2.5-32b and
    mixtral-8x7b: their sizes, with random weights."""
    from superinfer.bench.engine import numbers, save, started_engine
    from superinfer.bench.shapes import engine_of_shape
    from superinfer.out_file import check_writable

    check_writable(json_path)
    plan = _Plan(
        batches=numbers("--batch", batch),
        prompt=prompt_tokens,
        output=output_tokens,
        ttft=numbers("--ttft", ttft) if ttft else [],
        prefill=[_product(part) for part in prefill.split(",") if part.strip()],
        temperature=temperature,
        rounds=rounds,
    )
    if config.max_batch_size < max(plan.batches):
        raise InvalidRequestError(
            f"--batch {max(plan.batches)} is more than --max-batch-size {config.max_batch_size}; raise that"
        )
    with engine_of_shape(config, layers) as (settings, shape), started_engine(settings) as (address, start_s):
        print(f"ready after {start_s:.1f} s", flush=True)
        measured = asyncio.run(_measure(address, plan, shape, config.threads))
    save(
        json_path,
        {
            "settings": vars(plan) | {"shape": shape.name, "layers": shape.layers, "threads": config.threads},
            "engine_start_s": start_s,
            **measured,
        },
    )


class _Plan:
    """What to measure. prefill: (prompts at once, tokens of each)."""

    def __init__(
        self, batches: list[int], prompt: int, output: int, ttft: list[int], prefill: list[tuple[int, int]],
        temperature: float, rounds: int,
    ) -> None:  # fmt: skip
        if output < 8 or prompt < 1 or rounds < 1:
            raise InvalidRequestError(f"output-tokens={output} must be at least 8, prompt-tokens and rounds at least 1")
        self.batches, self.prompt, self.output = batches, prompt, output
        self.ttft, self.prefill, self.temperature, self.rounds = ttft, prefill, temperature, rounds

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.prompt + self.output, *(t + 1 for t in self.ttft), *(t + 1 for _, t in self.prefill), 0)


def _product(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise InvalidRequestError(f"--prefill {text!r} must be prompts x tokens, such as 16x2048")
    return int(found[1]), int(found[2])


async def _measure(address: str, plan: _Plan, shape: ModelShape, threads: int | None) -> dict[str, Any]:
    from superinfer.bench.ceilings import measure_ceilings
    from superinfer.bench.engine import info_of
    from superinfer.bench.progress import Bar
    from superinfer.runtime.client import AsyncEngineClient

    async with await AsyncEngineClient.connect(address) as client:
        info = client.info
        if plan.longest > info.max_model_len:
            raise InvalidRequestError(
                f"requests of {plan.longest} tokens exceed the engine's context of {info.max_model_len}; "
                "give shorter ones, or a model or a KV pool that takes them"
            )
        roof = await asyncio.to_thread(measure_ceilings, info.device, info.dtype, threads)
        print(f"ceilings: copy {roof.copy / 1e9:,.1f} GB/s, matrix product {roof.matmul / 1e12:,.3f} TFLOP/s")
        parts = (len(plan.batches) + len(plan.ttft) + len(plan.prefill)) * (plan.rounds + 1)
        with Bar("measuring", parts) as bar:
            tpot = [await _tpot(client, plan, size, shape, roof, bar) for size in plan.batches]
            first = [await _ttft(client, plan, length, shape, roof, bar) for length in plan.ttft]
            prefill = [await _prefill(client, plan, *sizes, shape, roof, bar) for sizes in plan.prefill]
        return {
            "engine": info_of(info),
            "ceilings": roof._asdict(),
            "tpot": tpot,
            "ttft": first,
            "prefill": prefill,
        }


async def _tpot(
    client: AsyncEngineClient, plan: _Plan, batch: int, shape: ModelShape, roof: Ceilings, bar: Any
) -> dict[str, Any]:
    """All requests of a batch at once; what counts is the stretch in which all of them decode: from the last first
    token to the first last token, as the client sees them."""
    from superinfer.bench.ceilings import decode_floor_s, in_dtype
    from superinfer.bench.engine import ask, between, random_prompt

    rounds: list[dict[str, Any]] = []
    for number in range(-1, plan.rounds):  # the first warms up
        rng = random.Random(1000 * number + batch)
        prompts = [random_prompt(rng, plan.prompt, client.info.vocab_size) for _ in range(batch)]
        before = await client.stats()
        answers = await asyncio.gather(*[ask(client, p, plan.output, plan.temperature) for p in prompts])
        after = await client.stats()
        begin, end = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
        inside = [[t for t in a.times if begin <= t <= end] for a in answers]
        tpots = [(times[-1] - times[0]) / (len(times) - 1) for times in inside if len(times) > 1]
        bar.advance()
        if not tpots:
            raise InvalidRequestError(
                f"at batch {batch} the requests never all decode together; raise --output-tokens or --max-batch-tokens"
            )
        if number >= 0:
            tpots_ms = [tpot * 1e3 for tpot in tpots]
            found: dict[str, Any] = {
                "tpot_ms": statistics.median(tpots_ms),
                "window_s": end - begin,
                "tpots_ms": tpots_ms,
            }
            rounds.append(found | between(before, after))
    tpot_ms = statistics.median(one["tpot_ms"] for one in rounds)
    context = plan.prompt + plan.output / 2
    floor_ms = decode_floor_s(in_dtype(shape, client.info.dtype), batch, context, roof) * 1e3
    print(
        f"TPOT at batch {batch:4d}: {tpot_ms:8.2f} ms; floor {floor_ms:8.2f} ms ({floor_ms / tpot_ms:.0%}); "
        f"scheduling {statistics.median(one['schedule_ms_per_step'] for one in rounds):.2f} ms a step",
        flush=True,
    )
    return {"batch": batch, "tpot_ms": tpot_ms, "floor_ms": floor_ms, "share": floor_ms / tpot_ms, "rounds": rounds}


async def _ttft(
    client: AsyncEngineClient, plan: _Plan, length: int, shape: ModelShape, roof: Ceilings, bar: Any
) -> dict[str, Any]:
    """One request at a time."""
    from superinfer.bench.ceilings import prefill_flops
    from superinfer.bench.engine import ask, random_prompt

    times = []
    for number in range(-1, plan.rounds):
        prompt = random_prompt(random.Random(1000 * number + length), length, client.info.vocab_size)
        started = time.perf_counter()
        answer = await ask(client, prompt, 1)
        bar.advance()
        if number >= 0:
            times.append((answer.times[0] - started) * 1e3)
    ttft_ms, floor_ms = statistics.median(times), prefill_flops(shape, length) / roof.matmul * 1e3
    print(f"TTFT of {length:6d} tokens: {ttft_ms:8.1f} ms; its arithmetic alone {floor_ms:.1f} ms", flush=True)
    return {"prompt_tokens": length, "ttft_ms": ttft_ms, "floor_ms": floor_ms, "rounds_ms": times}


async def _prefill(
    client: AsyncEngineClient, plan: _Plan, count: int, length: int, shape: ModelShape, roof: Ceilings, bar: Any
) -> dict[str, Any]:
    """Prompts at once, one token of output each: from the first sent to the last answered."""
    from superinfer.bench.ceilings import in_dtype, prefill_floor_s, prefill_flops
    from superinfer.bench.engine import ask, random_prompt

    rates = []
    for number in range(-1, plan.rounds):
        rng = random.Random(1000 * number + count)
        prompts = [random_prompt(rng, length, client.info.vocab_size) for _ in range(count)]
        started = time.perf_counter()
        await asyncio.gather(*[ask(client, prompt, 1) for prompt in prompts])
        took = time.perf_counter() - started
        bar.advance()
        if number >= 0:
            rates.append(count * length / took)
    rate = statistics.median(rates)
    tflops = rate / length * prefill_flops(shape, length) / 1e12
    share = prefill_floor_s(in_dtype(shape, client.info.dtype), count, length, roof) / (count * length / rate)
    print(
        f"prefill {count} x {length}: {rate:,.0f} tokens/s, {tflops:,.3f} TFLOP/s; {share:.0%} of its roofline",
        flush=True,
    )
    return {
        "prompts": count,
        "tokens": length,
        "tokens_per_s": rate,
        "tflop_s": tflops,
        "share": share,
        "rounds_tokens_per_s": rates,
    }
