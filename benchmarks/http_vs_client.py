"""What HTTP costs on a real engine: the same load through the ZMQ client and through `superinfer serve`, in turns.

    python benchmarks/http_vs_client.py --model llama-3-8b --batch 128 --json results/h200-http-vs-client.json
    python benchmarks/http_vs_client.py --model embedded --batch 8 --prompt 64 --output 16

One engine, and a server before it; this process is the client of both. `--batch` clients each send a request, read it
to its end and send the next (closed loop), `--requests` of them; lengths of outputs differ, so that prompts come one by
one between decodes. Prompts are token ids both ways; the server also makes text of the answers, the client does not.
Goals: HTTP keeps 97 % of the client's tokens/s, and adds at most 2 ms to the median time to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import http_load
import msgspec
from http_load import Answer, Direct, quantile

from superinfer.bench.engine import info_of, random_prompt, started_engine
from superinfer.bench.record import write_record
from superinfer.bench.shapes import CONFIGS, engine_of_shape
from superinfer.out_file import check_writable
from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.slo import SLO

THROUGHPUT_GOAL, TTFT_GOAL_MS = 0.97, 2.0
LONE_REQUESTS, LONE_TOKENS = 16, 4
NO_HURRY_S = 600.0  # a promise, so that every answer says when the engine itself had the first token


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: list[int]
    output: int


@dataclass
class Seen:
    """What was seen of one way to the engine. Seconds; first: only of requests sent while others decoded."""

    took: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)  # to the engine's own time to the first token

    def figures(self) -> dict[str, float]:
        """For the record."""
        return {
            "tokens_per_s": self.tokens / self.took,
            "ttft_ms_p50": 1e3 * statistics.median(self.first),
            "ttft_ms_p99": 1e3 * quantile(self.first, 0.99),
            "outside_engine_ms_p50": 1e3 * statistics.median(self.added),
            "outside_engine_ms_p99": 1e3 * quantile(self.added, 0.99),
        }


class Ways:
    """Both ways to one engine."""

    def __init__(self, client: AsyncEngineClient, port: int, model: str) -> None:
        self._client, self._port, self._model = client, port, model

    async def direct(self, job: Job) -> tuple[int, float, float]:
        """(tokens, seconds to the first one, the engine's own)."""
        sampling = SamplingParams(temperature=0, max_tokens=job.output, ignore_eos=True)
        request = Generate(request_id=new_request_id(), prompt=job.prompt, sampling=sampling, slo=SLO(ttft=NO_HURRY_S))
        asked = await Direct(request).run(self._client)
        return len(asked.arrivals), asked.arrivals[0] - asked.began, asked.report.ttft_s

    async def http(self, job: Job) -> tuple[int, float, float]:
        """The same over HTTP; the connection is made anew for each request."""
        body = {
            "model": self._model, "prompt": job.prompt, "max_tokens": job.output, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, "slo": {"ttft_ms": 1e3 * NO_HURRY_S},
        }  # fmt: skip
        asked = await Answer(msgspec.json.encode(body)).run(self._port)
        read = asked.read()
        if read.status != 200 or not read.complete:
            raise RuntimeError(
                f"HTTP {read.status} {asked.error}: {b''.join(data for _, data in asked.reads)[-500:]!r}"
            )
        # The status line comes with the first token, not before.
        return read.tokens, asked.reads[0][0] - asked.began, read.slo["ttft_ms"] / 1e3

    async def loop(self, way: str, jobs: list[list[Job]]) -> Seen:
        """One client for each list of jobs, all at once."""
        ask, seen = getattr(self, way), Seen()

        async def work(mine: list[Job]) -> None:
            for at, job in enumerate(mine):
                tokens, first, engines = await ask(job)
                assert tokens == job.output, f"{tokens} tokens came of {job.output}"
                seen.tokens += tokens
                if at or len(mine) == 1 or len(jobs) == 1:  # the first ones all come at once, and wait for each other
                    seen.first.append(first)
                    seen.added.append(first - engines)

        began = time.perf_counter()
        await asyncio.gather(*(work(mine) for mine in jobs))
        seen.took = time.perf_counter() - began
        return seen


def make_jobs(chosen: argparse.Namespace, round: int, way: str, vocab: int) -> list[list[Job]]:
    """A list for each client. In a round both ways have the same lengths, outputs of half to one and a half of
    `--output`, and other prompts, or one way would find the other's in the cache."""
    lengths, prompts = random.Random(f"lengths {round}"), random.Random(f"{way} {round}")
    half, requests = chosen.output // 2, chosen.requests if round >= 0 else 1
    return [
        [
            Job(
                random_prompt(prompts, chosen.prompt, vocab),
                lengths.randint(chosen.output - half, chosen.output + half),
            )
            for _ in range(requests)
        ]
        for _ in range(chosen.batch)
    ]


def make_lone_jobs(chosen: argparse.Namespace, round: int, way: str, vocab: int) -> list[list[Job]]:
    """One client's short requests, one after another."""
    prompts = random.Random(f"alone {way} {round}")
    return [[Job(random_prompt(prompts, chosen.prompt, vocab), LONE_TOKENS) for _ in range(LONE_REQUESTS)]]


def measure(chosen: argparse.Namespace, address: str, port: int, model: str) -> dict[str, Any]:
    """Rounds both ways, in turns, with the same lengths."""
    rounds: dict[str, list[dict[str, float]]] = {"direct": [], "http": []}
    single: dict[str, list[dict[str, float]]] = {"direct": [], "http": []}

    async def one(way: str, make: Callable[..., list[list[Job]]], round: int) -> Seen:
        async with await AsyncEngineClient.connect(address) as client:
            jobs = make(chosen, round, way, min(client.info.vocab_size, 128_000))
            return await Ways(client, port, model).loop(way, jobs)

    for round in range(-1, chosen.rounds):  # the first is to warm up
        for way in ("direct", "http") if round % 2 else ("http", "direct"):
            found = http_load.run(one(way, make_jobs, round)).figures()
            alone = http_load.run(one(way, make_lone_jobs, round)).figures()
            if round >= 0:
                rounds[way].append(found)
                single[way].append(alone)
            print(f"{'warm-up' if round < 0 else f'round {round + 1}'}, {way}: {_line(found)}", flush=True)
    medians = {way: _medians(found) for way, found in rounds.items()}
    alone = {way: _medians(found) for way, found in single.items()}
    ratios = [h["tokens_per_s"] / d["tokens_per_s"] for h, d in zip(rounds["http"], rounds["direct"], strict=True)]
    added = [h["ttft_ms_p50"] - d["ttft_ms_p50"] for h, d in zip(rounds["http"], rounds["direct"], strict=True)]
    outside = [
        h["outside_engine_ms_p50"] - d["outside_engine_ms_p50"]
        for h, d in zip(rounds["http"], rounds["direct"], strict=True)
    ]
    return {
        "throughput_ratio": statistics.median(ratios),
        "ttft_p50_added_ms": statistics.median(added),
        "outside_engine_p50_added_ms": statistics.median(outside),
        "batch_1_ttft_p50_added_ms": alone["http"]["ttft_ms_p50"] - alone["direct"]["ttft_ms_p50"],
        "throughput_ratio_of_rounds": ratios,
        "ttft_p50_added_ms_of_rounds": added,
        "outside_engine_p50_added_ms_of_rounds": outside,
        "medians": medians,
        "batch_1": alone,
        "rounds": rounds,
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _line(found: dict[str, float]) -> str:
    return (
        f"{found['tokens_per_s']:8.0f} tokens/s, TTFT p50 {found['ttft_ms_p50']:7.2f} ms, "
        f"of it outside the engine {found['outside_engine_ms_p50']:.2f} ms"
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of made-up words for a shape that has none, so that the server can make text of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + at for at, letter in enumerate(letters)}
    while len(vocab) < vocab_size:
        at = len(vocab)
        vocab["Ġ" + "".join(chr(97 + at // 26**k % 26) for k in range(4))] = at
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))


def main() -> None:
    """Measure, print, and write where asked to. Exit status 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b", help=f"{', '.join(CONFIGS)}, or what superinfer serves")
    parser.add_argument("--layers", type=int, help="fewer than the named shape has")
    parser.add_argument("--batch", type=int, default=128, help="clients at a time")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an output, on average")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write everything here")
    chosen = parser.parse_args()
    check_writable(chosen.json)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the server needs {', '.join(missing)}, which are not installed")
    slower = [name for name in ("uvloop", "httptools") if importlib.util.find_spec(name) is None]
    if slower:
        print(f"without {' and '.join(slower)} the server is slower than it need be", flush=True)
    config = EngineConfig(
        model=chosen.model, device=chosen.device, kv_tokens=chosen.kv_tokens, max_batch_size=chosen.batch,
        max_batch_tokens=max(chosen.max_batch_tokens, chosen.batch), address="tcp://127.0.0.1:0",
    )  # fmt: skip
    with engine_of_shape(config, chosen.layers) as (settings, shape):
        if settings.load_format == "dummy":
            write_tokenizer(Path(settings.model), CONFIGS[chosen.model]["vocab_size"])
        with started_engine(settings) as (address, start_s):
            print(f"engine ready after {start_s:.1f} s", flush=True)
            began = time.perf_counter()
            with http_load.server_before(address, "--model-name", "m", "--no-page") as (port, _):
                print(f"server ready after {time.perf_counter() - began:.1f} s", flush=True)
                info = asyncio.run(_info(address))
                measured = measure(chosen, address, port, "m")
            took = time.perf_counter() - began
    ratio, added = measured["throughput_ratio"], measured["ttft_p50_added_ms"]
    print(
        f"HTTP: {ratio:.1%} of the client's tokens/s (goal: at least {THROUGHPUT_GOAL:.0%}); TTFT p50 {added:+.2f} ms, "
        f"outside the engine {measured['outside_engine_p50_added_ms']:+.2f} ms, alone "
        f"{measured['batch_1_ttft_p50_added_ms']:+.2f} ms (goal: at most {TTFT_GOAL_MS:g} ms); took {took:.0f} s"
    )
    if chosen.json is not None:
        settings_shown = {name: str(value) for name, value in vars(chosen).items() if value is not None}
        head = {"settings": settings_shown, "layers": shape.layers, "engine": info, "load_average": os.getloadavg()}
        command = " ".join(["python", "benchmarks/http_vs_client.py", *sys.argv[1:]])
        print(f"written to {write_record(chosen.json, command, head | measured)}")


async def _info(address: str) -> dict[str, Any]:
    async with await AsyncEngineClient.connect(address) as client:
        return info_of(client.info)


if __name__ == "__main__":
    main()
