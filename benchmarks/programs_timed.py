"""Where the time of a program's call goes on a GPU, without one: whole programs at a device that only takes time.

    python benchmarks/programs_timed.py --shapes react,chat --programs 8

The real loop, scheduler, sockets, HTTP server and language run around a device whose steps take as long as the
simulator's profile of an H200 says for Llama-3-8B, two of them under way. The programs of `superinfer bench programs`,
all at once, by two ways in turns: `zmq`, the language at the engine itself, and `http`, at `superinfer serve`. Of each
call, ms: `away`, from the last token's leaving the engine to the next call's coming to it, without what the tool takes;
`queue`, until a step is planned that has it; `prefill`, until its first token; `decode`, until its last. idle: the
device's, for each call of a program. rows: prompt tokens that it computed, for each call.

The device samples words, which are the same tokens whoever reads them. --ids 300-120000: as random weights do, some
are parts of words, whose text the tokenizer may cut otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from programs_overhead import started
from record import write
from timed_device import TimedDevice

from superinfer.bench.program_texts import SIZES, TOOL_S, Texts
from superinfer.bench.shapes import write_shape
from superinfer.runtime.collector import spare_the_collector
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.loop import EngineLoop
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import Deltas, Generate, Message, ModelInfo, ToEngine
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.scheduler.plan import StepResult
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import SHAPES

WAYS = ("zmq", "http")
CHAINS = ("react", "chat")  # each call waits for the one before
MODEL = "llama-3-8b"
LIMITS = ExecutorLimits(num_blocks=30_000, page_size=16, num_slots=256, max_model_len=8192, vocab_size=128_256)
WORDS = "10000-100000"  # ids that are words of the benchmarks' tokenizer, whatever stands around them
# What chunks cost beside few decodes: 256 prompt tokens alone take the device 7.8 ms (results/h200-mixed-steps.json).
RATES = StepRates.seed(profile_of("h200-pcie5"), SHAPES[MODEL])._replace(pieces_s=1.3e-3)


class Device(TimedDevice):
    """Samples by chance. busy_s: its time so far."""

    def __init__(self, ids: str) -> None:
        super().__init__(RATES, LIMITS, spread=0.01)
        self.busy_s = 0.0
        self._ids = [int(end) for end in ids.split("-")]
        self._rng = np.random.default_rng(1)

    def collect(self) -> StepResult:
        """See Executor."""
        result = super().collect()
        self.busy_s += self.last.compute_s
        for slot in result.tokens:
            result.tokens[slot] = int(self._rng.integers(*self._ids))
        return result


class Door(FrontDoor):
    """Notes of each request when it came and, once it has ended, when its last token left."""

    def __init__(self, info: ModelInfo, device: Device, notes: TextIO) -> None:
        super().__init__("tcp://127.0.0.1:0", info)
        self._device, self._notes = device, notes
        self._came: dict[str, tuple[str, float, float]] = {}

    def receive(self, timeout_ms: int, seconds: float = 0.0) -> Iterator[tuple[bytes, ToEngine]]:
        """See FrontDoor."""
        for client, message in super().receive(timeout_ms, seconds):
            if isinstance(message, Generate):
                self._came[message.request_id] = message.program, time.monotonic(), self._device.busy_s
            yield client, message

    def send(self, client: bytes, message: Message) -> None:
        """See FrontDoor."""
        super().send(client, message)
        if isinstance(message, Deltas):
            for delta in message.deltas:
                if (report := delta.report) is not None:
                    program, came, busy_s = self._came.pop(delta.request_id)
                    note = {"program": program, "came": came, "left": time.monotonic(), "busy_from_s": busy_s}
                    note |= {"busy_to_s": self._device.busy_s, "rows": report.prompt_tokens - report.cached_tokens}
                    note |= {f"{name}_s": getattr(report, f"{name}_s") for name in ("queue", "prefill", "decode")}
                    self._notes.write(json.dumps(note) + "\n")
            self._notes.flush()


def engine(checkpoint: str, notes: str, policy: str, ids: str) -> None:
    """Serve until told to end."""
    info = ModelInfo(
        model="timed", path=checkpoint, architecture="none", vocab_size=LIMITS.vocab_size,
        max_model_len=LIMITS.max_model_len, eos_token_ids=(2,), dtype="none", device="none",
        page_size=LIMITS.page_size, num_blocks=LIMITS.num_blocks, policy=policy, pid=0,
    )  # fmt: skip
    kv = build_cache(LIMITS.num_blocks, 0, LIMITS.page_size, prefix_cache=True)
    scheduler = build_scheduler(policy, kv, SchedulerLimits(256, 8192, LIMITS.max_model_len), StepCost(RATES))
    device = Device(ids)
    with open(notes, "w") as file:
        door = Door(info, device, file)
        loop = EngineLoop(door, Intake(info), scheduler, device, 4096)  # type: ignore[arg-type]
        print(door.address, flush=True)
        spare_the_collector()
        loop.run()


async def batch(backend: Any, shape: str, programs: int, seed: str) -> float:
    """Seconds until all of these programs have ended."""
    from superinfer.bench.programs_lang import PROGRAMS

    texts = [Texts(shape, SIZES[shape], f"{seed} {at}") for at in range(programs)]
    began = time.perf_counter()
    await asyncio.gather(*(PROGRAMS[shape].arun(text, backend=backend) for text in texts))
    return time.perf_counter() - began


def account(notes: list[dict[str, Any]], tool_s: float) -> dict[str, float]:
    """Means over the calls of one batch, ms. tool_s: between two calls of a program."""
    by_program: dict[str, list[dict[str, Any]]] = {}
    for note in sorted(notes, key=lambda note: note["came"]):
        by_program.setdefault(note["program"], []).append(note)
    away = [
        after["came"] - before["left"] - tool_s
        for calls in by_program.values()
        for before, after in itertools.pairwise(calls)
    ]
    begins, ends = min(note["came"] for note in notes), max(note["left"] for note in notes)
    busy_s = max(note["busy_to_s"] for note in notes) - min(note["busy_from_s"] for note in notes)
    found = {"away": statistics.mean(away)}
    found |= {name: statistics.mean(note[f"{name}_s"] for note in notes) for name in ("queue", "prefill", "decode")}
    found["idle"] = (ends - begins - busy_s) / len(notes) * len(by_program)
    found = {name: seconds * 1e3 for name, seconds in found.items()}
    return found | {"rows": statistics.mean(note["rows"] for note in notes)}


def main() -> None:
    """Measure, print, write results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(CHAINS))
    parser.add_argument("--programs", type=int, default=8, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--ids", default=WORDS, help="that the device samples, FROM-BELOW")
    parser.add_argument("--name", default="programs-timed", help="of the result file; empty: write none")
    parser.add_argument("--engine", nargs=2, metavar=("CHECKPOINT", "NOTES"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        engine(*chosen.engine, chosen.policy, chosen.ids)
        return
    import superinfer as si

    ways, shapes = chosen.ways.split(","), chosen.shapes.split(",")
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {shape: {way: [] for way in ways} for shape in shapes}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_shape(MODEL, folder, tokenizer=True)
        notes = folder / "notes"
        command = [__file__, "--policy", chosen.policy, "--ids", chosen.ids, "--engine", str(folder), str(notes)]
        address, _ = started(stack, command, "^")
        url, _ = started(
            stack, ["-m", "superinfer", "serve", "--engine", address, "--port", "0", "--model-name", "timed"],
            "serving at ",
        )  # fmt: skip
        backends = {"zmq": si.RuntimeEndpoint(address), "http": si.RuntimeEndpoint(url.removesuffix("/v1"))}
        for backend in backends.values():
            stack.callback(backend.close)
        for round_ in range(-1, chosen.rounds):
            for shape in shapes:
                for way in random.Random(round_).sample(ways, len(ways)):
                    seen = len(notes.read_text().splitlines())
                    seconds = asyncio.run(batch(backends[way], shape, chosen.programs, f"{way} {round_}"))
                    found = [json.loads(line) for line in notes.read_text().splitlines()[seen:]]
                    if round_ >= 0:
                        tool_s = TOOL_S if shape == "react" else 0.0
                        rounds[shape][way].append({"seconds": seconds, **account(found, tool_s)})
    medians = {
        shape: {way: {name: statistics.median(one[name] for one in of) for name in of[0]} for way, of in by.items()}
        for shape, by in rounds.items()
    }
    for shape, by in medians.items():
        for way, median in by.items():
            print(f"{shape:6} {way:5} " + "  ".join(f"{name} {value:.2f}" for name, value in median.items()))
    settings = {name: value for name, value in vars(chosen).items() if name not in ("name", "engine")}
    if chosen.name:
        record = {"settings": settings, "rates": RATES._asdict(), "medians": medians, "rounds": rounds}
        command_line = " ".join(["python benchmarks/programs_timed.py", *sys.argv[1:]])
        print(f"written to {write(chosen.name, command_line, record)}")


if __name__ == "__main__":
    main()
