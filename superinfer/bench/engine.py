"""What measurements of an engine share: starting one, asking it through its door, its counters over a stretch."""

from __future__ import annotations

import contextlib
import random
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from superinfer.bench.record import write_record
from superinfer.bench.workload import FIRST_TOKEN
from superinfer.errors import InvalidRequestError
from superinfer.runtime.client import AsyncEngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, ModelInfo, RequestReport, SamplingParams, StatsReport

TIER_COUNTERS = (
    "rotations_out", "rotations_in", "bytes_in", "bytes_out", "both_s", "stall_s", "mirrored", "dram_hits",
    "copies_failed",
)  # fmt: skip
TIER_GAUGES = ("gbps_in", "gbps_out", "overlap", "mirror_hit_rate", "dram_blocks", "dram_free")  # since the start


@contextlib.contextmanager
def started_engine(config: EngineConfig) -> Iterator[tuple[str, float]]:
    """An engine's address, and the seconds it took to start."""
    from superinfer.cli.engines import start_progress

    began = time.perf_counter()
    with start_progress("starting the engine") as progress:
        process = launch_engine(config, on_progress=progress)
    took = time.perf_counter() - began
    with process:
        yield process.address, took


def random_prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Token ids, `length` of them."""
    return [rng.randrange(FIRST_TOKEN, vocab) for _ in range(length)]


class Answer(msgspec.Struct):
    """One request's tokens: when each arrived, on time.perf_counter, and the engine's own report."""

    times: list[float]
    report: RequestReport | None


async def ask(client: AsyncEngineClient, prompt: list[int], output: int, temperature: float = 0.0) -> Answer:
    """Generate exactly `output` tokens."""
    sampling = SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True)
    request = Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling)
    answer = Answer([], None)
    async for delta in client.generate(request):
        answer.times += [time.perf_counter()] * len(delta.token_ids)
        answer.report = delta.report or answer.report
    return answer


def between(before: StatsReport, after: StatsReport) -> dict[str, Any]:
    """What the engine counted in a stretch: steps, seconds of the device and of scheduling, and the second tier's."""
    steps = max(1, after.steps - before.steps)
    schedule_s = after.schedule_s_mean * after.steps - before.schedule_s_mean * before.steps
    device_s = after.step_s_mean * after.steps - before.step_s_mean * before.steps
    found: dict[str, Any] = {
        "steps": after.steps - before.steps,
        "preemptions": after.preemptions - before.preemptions,
        "schedule_s": schedule_s,
        "device_s": device_s,
        "schedule_ms_per_step": schedule_s / steps * 1e3,
        "device_ms_per_step": device_s / steps * 1e3,
    }
    if after.tiers is not None and before.tiers is not None:
        first, last = msgspec.to_builtins(before.tiers), msgspec.to_builtins(after.tiers)
        found["tiers"] = {name: last.get(name, 0) - first.get(name, 0) for name in TIER_COUNTERS}
        found["tiers"] |= {name: last.get(name, 0) for name in TIER_GAUGES}
    return found


def tier_line(tiers: dict[str, Any]) -> str:
    """The second tier in one line."""
    used = tiers["dram_blocks"] - tiers["dram_free"]
    parts = (
        f"second tier: {tiers['rotations_out']} rotations out, {tiers['rotations_in']} in",
        f"{tiers['bytes_out'] / 1e6:.0f} MB out at {tiers['gbps_out']:.2f} GB/s",
        f"{tiers['bytes_in'] / 1e6:.0f} MB in at {tiers['gbps_in']:.2f} GB/s",
        f"both ways at once {tiers['both_s']:.2f} s, stalled {tiers['stall_s']:.2f} s, overlap {tiers['overlap']:.0%}",
        f"mirrored before they rotated {tiers['mirror_hit_rate']:.0%}",
        f"{used} of {tiers['dram_blocks']} blocks in use",
    )
    return "; ".join(parts)


def info_of(info: ModelInfo) -> dict[str, Any]:
    """What a record says of the engine."""
    named = ("model", "architecture", "dtype", "device", "page_size", "num_blocks", "max_model_len", "policy")
    return {name: getattr(info, name) for name in named}


def numbers(name: str, text: str) -> list[int]:
    """Of "1,32,128". Raises InvalidRequestError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InvalidRequestError(f"{name} {text!r} must be whole numbers above 0, several with commas")
    return [int(part) for part in parts]


def save(path: Path | None, measured: dict[str, Any]) -> None:
    """Write a record of this command, if a path was given."""
    if path is not None:
        command = shlex.join(["superinfer", *sys.argv[1:]])
        print(f"written to {write_record(path, command, measured)}", file=sys.stderr)
