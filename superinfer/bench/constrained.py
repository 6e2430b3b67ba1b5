"""`superinfer bench constrained`: what a grammar costs a token, beside the same batch without one, in one run."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from superinfer.bench.constrained_schemas import SCHEMAS, wrong_outputs
from superinfer.cli.options import with_engine_options
from superinfer.errors import InvalidRequestError, SuperinferError
from superinfer.runtime.config import EngineConfig

if TYPE_CHECKING:
    from superinfer.runtime.client import AsyncEngineClient
    from superinfer.runtime.protocol import Grammar
    from superinfer.runtime.tokenization import Tokenizer

MAX_TOKENS = 1500  # of an output, which ends before: everything in it is bounded


@with_engine_options
def constrained(
    config: EngineConfig,
    batch: Annotated[str, typer.Option(help="Requests that decode together; several with commas.")] = "64",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of each of these, in tokens.")] = 128,
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures; several with commas.")] = "0,1",
    rounds: Annotated[int, typer.Option(help="Measurements of each, in turns; medians are shown.")] = 3,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the named shape has.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Time tokens that must follow a JSON schema, and tokens that need not, at the same batch. Every output is read by
    its schema. --model also takes llama-3-8b, qwen2.5-32b and mixtral-8x7b: their sizes, with random weights."""
    from superinfer.bench.engine import numbers, save, started_engine
    from superinfer.bench.shapes import engine_of_shape
    from superinfer.out_file import check_writable

    check_writable(json_path)
    batches = numbers("--batch", batch)
    if config.max_batch_size < max(batches):
        raise InvalidRequestError(
            f"--batch {max(batches)} is more than --max-batch-size {config.max_batch_size}; raise that"
        )
    if rounds < 1 or prompt_tokens < 1:
        raise InvalidRequestError(f"rounds={rounds} and prompt-tokens={prompt_tokens} must be at least 1")
    degrees = _floats("--temperatures", temperatures)
    with engine_of_shape(config, layers, tokenizer=True) as (settings, _), started_engine(settings) as (address, took):
        print(f"ready after {took:.1f} s", flush=True)
        found = asyncio.run(_measure(address, batches, degrees, prompt_tokens, rounds))
    asked = {"batch": batches, "temperatures": degrees, "prompt_tokens": prompt_tokens, "rounds": rounds}
    save(json_path, {"settings": asked | {"layers": layers}, "engine_start_s": took, **found})
    if wrong := [text for one in found["results"] for text in one["wrong"]]:
        raise SuperinferError(f"{len(wrong)} outputs do not follow their schema, such as {wrong[0]!r:.300}")


def _floats(name: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 0:
        raise InvalidRequestError(f"{name} {text!r} must be numbers of at least 0, several with commas")
    return values


async def _measure(
    address: str, batches: list[int], temperatures: list[float], prompt: int, rounds: int
) -> dict[str, Any]:
    from superinfer.bench.engine import info_of
    from superinfer.runtime.client import AsyncEngineClient
    from superinfer.runtime.tokenization import Tokenizer

    async with await AsyncEngineClient.connect(address) as client:
        tokenizer = await asyncio.to_thread(Tokenizer, client.info.path)
        results = []
        for temperature in temperatures:
            for batch in batches:
                one = await _compare(client, tokenizer, batch, temperature, prompt, rounds)
                results.append(one)
                print(
                    f"batch {batch:3d}, temperature {temperature:g}: {one['constrained_ms']:.2f} ms a token with a "
                    f"schema ({one['tokens_per_step']['constrained']:.2f} tokens a step), {one['free_ms']:.2f} "
                    f"without: {one['slower']:+.1%}; "
                    f"{one['outputs']} outputs, {len(one['wrong'])} of them wrong",
                    flush=True,
                )
        return {"engine": info_of(client.info), "results": results}


async def _compare(
    client: AsyncEngineClient, tokenizer: Tokenizer, batch: int, temperature: float, prompt: int, rounds: int
) -> dict[str, Any]:
    """Both arms in turns, after a round of each that is not counted. slower: of the medians of the rounds."""
    rng = random.Random(batch)
    free_tokens = 256
    arms: dict[str, list[dict[str, Any]]] = {"constrained": [], "free": []}
    wrong: list[str] = []
    outputs = 0
    for number in range(-1, rounds):
        names = list(arms) if number % 2 else list(arms)[::-1]
        if number < 0:
            names = list(arms)  # says how long the other arm's outputs are to be
        for name in names:
            one = await _round(client, batch, temperature, prompt, free_tokens, rng, constrained=name == "constrained")
            texts = one.pop("token_ids")
            if name == "constrained":
                outputs += batch
                wrong += wrong_outputs(tokenizer, texts, one["ends"])
                free_tokens = min(map(len, texts))  # so that in the stretch that counts contexts are as long
            if number >= 0:
                arms[name].append(one)
    constrained_ms, free_ms = (statistics.median(one["token_ms"] for one in arms[name]) for name in arms)
    return {
        "batch": batch,
        "temperature": temperature,
        "constrained_ms": constrained_ms,
        "free_ms": free_ms,
        "slower": constrained_ms / free_ms - 1,
        "tokens_per_step": {name: _per_step(arms[name]) for name in arms},
        "outputs": outputs,
        "wrong": wrong,
        "rounds": arms,
    }


def _per_step(rounds: list[dict[str, Any]]) -> float:
    """Of the request that takes longest: above 1 where forced text is not sampled."""
    return statistics.median(max(one["tokens"]) / one["steps"] for one in rounds)


async def _round(
    client: AsyncEngineClient,
    batch: int,
    temperature: float,
    prompt: int,
    free_tokens: int,
    rng: random.Random,
    *,
    constrained: bool,
) -> dict[str, Any]:
    """All requests of a batch at once. token_ms: time per token of a request in the stretch in which all of them
    decode, from the last first token to the first last one, as the client sees them."""
    from superinfer.bench.engine import between, random_prompt
    from superinfer.runtime.client import new_request_id
    from superinfer.runtime.protocol import Generate, SamplingParams

    asked = []
    for at in range(batch):
        if constrained:
            sampling = SamplingParams(
                temperature=temperature, max_tokens=MAX_TOKENS, seed=at, grammar=_grammar(SCHEMAS[at % len(SCHEMAS)])
            )
        else:
            sampling = SamplingParams(temperature=temperature, max_tokens=free_tokens, seed=at, ignore_eos=True)
        tokens = random_prompt(rng, prompt, client.info.vocab_size)
        asked.append(Generate(request_id=new_request_id(), prompt=tokens, sampling=sampling))
    before = await client.stats()
    answers = await asyncio.gather(*[_ask(client, request) for request in asked])
    after = await client.stats()
    begin, end = max(times[0] for times, _, _ in answers), min(times[-1] for times, _, _ in answers)
    inside = [[time for time in times if begin <= time <= end] for times, _, _ in answers]
    gaps = [(times[-1] - times[0]) / (len(times) - 1) * 1e3 for times in inside if len(times) > 1 and begin < end]
    if not gaps:
        raise InvalidRequestError(f"at batch {batch} the requests never all decode together; raise --max-batch-tokens")
    return {
        "token_ms": statistics.median(gaps),
        "window_s": end - begin,
        "tokens": [len(ids) for _, ids, _ in answers],
        "ends": [reason for _, _, reason in answers],
        "token_ids": [ids for _, ids, _ in answers],
        **between(before, after),
    }


async def _ask(client: AsyncEngineClient, request: Any) -> tuple[list[float], list[int], str]:
    """(when each token came, the tokens, why it ended)."""
    import time

    times: list[float] = []
    ids: list[int] = []
    reason = ""
    async for delta in client.generate(request):
        times += [time.perf_counter()] * len(delta.token_ids)
        ids += delta.token_ids
        reason = delta.finish_reason or reason
    return times, ids, reason


def _grammar(schema: type[msgspec.Struct]) -> Grammar:
    from superinfer.runtime.protocol import Grammar

    return Grammar(kind="json_schema", source=json.dumps(msgspec.json.schema(schema)))
