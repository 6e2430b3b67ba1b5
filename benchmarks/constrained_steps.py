"""Constrained output at a batch, with the host's real work and a GPU's measured step times: what a token takes.

The scheduler, matchers, masks, jumps and the encoding of deltas are the engine's, in the order of its loop with two
steps under way, and take the CPU time they take here. The device is a clock: a step of decodes takes what
`h200-constrained.json` has for tokens without a schema, a step with chunks longer by what its padded rows add to the
products and by its chunks' attention, both from `h200-mixed-steps.json`. What the executor itself takes of the host is
a constant, from the same files and `h200-host-time-before.json`. So the numbers are of no machine; those of one run,
with one thing changed, can be compared.

slower: the host takes so many times longer than here. late: forced texts are told with the step that found them, not
with the step before.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import xgrammar
from grammar_masks import EOS, VOCAB, compiled_by_the_engine
from record import RESULTS, write

from superinfer.bench.constrained_schemas import SCHEMAS
from superinfer.bench.shapes import write_tokenizer
from superinfer.runtime.engine.constraints import Constraints, split_forced
from superinfer.runtime.engine.cuda_mixed import graph_rows
from superinfer.runtime.engine.grammar_jump import Retokenizer
from superinfer.runtime.engine.grammar_worker import load_tokenizer_info
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import Deltas, Grammar, SamplingParams, SequenceDelta
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import SlotWork, StepPlan, StepResult
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence, Status

PROMPT, PAGE, LAYERS, HEADS, MULTIPROCESSORS = 128, 16, 32, 32, 132
PREFILL_S = 0.19  # of all prompts at once, before the stretch that counts


class Device(NamedTuple):
    """Seconds. decode: a step of decodes. products: of a forward pass, by rows. tile: attention of one tile of one
    chunk for one head in all layers. gap: what a step with chunks waits between kernels, beyond one without. sampling:
    logits copied, masked and searched. decode_host, mixed_host: what `submit` takes until the forward pass is enqueued,
    and sampling_host until the tokens are."""

    decode: float
    products: dict[int, float]
    tile: float
    decode_host: float
    mixed_host: float
    sampling_host: float
    gap: float = 0.3e-3
    sampling: float = 0.2e-3

    @classmethod
    def measured(cls) -> Device:
        """An H200 with Llama-3-8B's shape."""
        free = json.loads((RESULTS / "h200-constrained.json").read_text())["results"][0]["free_ms"]
        steps = json.loads((RESULTS / "h200-mixed-steps.json").read_text())["results"]
        products = {}
        for name, rows in (("64 decodes", 64), ("128 decodes", 128), ("0 + 256", 256), ("128 + 256", 384)):
            kernels = steps[name]["device"]
            skinny = sum(ms for kernel, ms in kernels["kernel_ms"].items() if kernel.endswith("_skinny"))
            products[rows] = (kernels["groups_ms"]["matmul"] + skinny) * 1e-3
        attention = steps["0 + 256"]["device"]["groups_ms"]["attention"] * 1e-3  # one wave of tiles in each layer
        submit = {name: steps[name]["host_ms"] for name in ("64 decodes", "128 + 256")}
        mixed = submit["128 + 256"]
        sampled = json.loads((RESULTS / "h200-host-time-before.json").read_text())["results"]
        by_case = {(one["batch"], one["temperature"]): one["median_ms"]["submit"] for one in sampled}
        return cls(
            free * 1e-3,
            products,
            attention,
            submit["64 decodes"]["submit"] * 1e-3,
            (mixed["submit"] - mixed["finish_mixed"]) * 1e-3,
            (mixed["finish_mixed"] + by_case[128, 0.8] - by_case[128, 0.0]) * 1e-3,
        )

    def forward_s(self, decodes: int, chunks: list[SlotWork]) -> float:
        """Until the logits are there."""
        if not chunks:
            return self.decode
        rows = decodes + sum(work.length for work in chunks)
        padded = next((size for size in graph_rows(2048) if size >= rows), rows)
        known = sorted(self.products)
        more = float(np.interp(padded, known, [self.products[size] for size in known])) - self.products[64]
        waves = -(-len(chunks) * HEADS // MULTIPROCESSORS)
        return self.decode + max(0.0, more) + waves * self.tile + self.gap


class Clock:
    """This thread's CPU time, and what it would have waited."""

    def __init__(self, slower: float) -> None:
        """slower: how many times longer the host takes than here."""
        self._slower, self._added, self._apart = slower, 0.0, 0.0

    def now(self) -> float:
        return (time.thread_time() - self._apart) * self._slower + self._added

    def spend(self, seconds: float) -> None:
        self._added += seconds

    def wait_until(self, when: float) -> None:
        self._added += max(0.0, when - self.now())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What an engine does not do."""
        began = time.thread_time()
        yield
        self._apart += time.thread_time() - began


@dataclass
class Step:
    """One under way. device_s: from its beginning to its end."""

    result: StepResult
    ended: float
    chunks: int
    begun: float
    masks_late_s: float = 0.0


class Grammars:
    """In place of the engine's compiler: both grammars, compiled before."""

    vocab_size = VOCAB

    def __init__(self, compiled: dict[str, Any], retokenizer: Retokenizer) -> None:
        self._compiled, self._retokenizer = compiled, retokenizer

    def matcher(self, grammar: Grammar, *_: Any) -> xgrammar.GrammarMatcher:
        return xgrammar.GrammarMatcher(self._compiled[grammar.source])

    def forced(self, matcher: xgrammar.GrammarMatcher, tail: Any) -> list[int]:
        return self._retokenizer.forced(matcher, tail)


@dataclass
class Executor:
    """Steps of two arms: with a grammar in every row, or in none."""

    device: Device
    clock: Clock
    constraints: Constraints | None
    jumps: bool
    late: bool
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    free_at: float = 0.0
    steps: deque[Step] = field(default_factory=deque)
    mask_s: list[float] = field(default_factory=list)

    def submit(self, plan: StepPlan) -> None:
        clock, constraints = self.clock, self.constraints
        if constraints is not None:
            for slot in plan.freed:
                constraints.release(slot)
            for init in plan.init:
                constraints.start(init, jumps=self.jumps)
        told = [work for work in plan.work if work.tokens]
        chunks = [work for work in told if not work.is_one_step]
        rows = [work for work in plan.work if work.is_one_step]
        begun = max(clock.now(), self.free_at)
        clock.spend(self.device.mixed_host if chunks else self.device.decode_host)
        forward_s = PREFILL_S if plan.init else self.device.forward_s(len(rows), chunks)
        logits_at = max(clock.now(), self.free_at) + forward_s
        sampled = rows + [work for work in chunks if work.sample]
        slots = np.array([work.slot for work in sampled], dtype=np.int64)
        result, late = StepResult(plan.step), 0.0
        if constraints is not None:
            for work in sampled:
                if work.tokens:
                    constraints.caught_up(work.slot)
            before = clock.now()
            every = np.arange(len(slots))
            constraints.mask(torch.empty(len(slots), 1), slots, every)
            waited = max(before, self.steps[-1].ended) if self.steps else before
            self.mask_s.append(clock.now() - waited)
            clock.spend(self.device.sampling_host)
            late = max(0.0, clock.now() - logits_at)
            logits_at = max(logits_at, clock.now()) + self.device.sampling
            uncollected = self.steps[-1].result if self.steps and not self.late else StepResult(0)
            given = {work.slot for work in told}
            result.forced, earlier = split_forced(constraints.forced, given, uncollected.tokens)
            uncollected.forced.update(earlier)
        self.free_at = ended = logits_at
        with clock.apart():
            tokens = self._pick(len(slots))
        result.tokens = dict(zip(slots.tolist(), tokens, strict=True))
        result.elapsed = ended - begun
        self.steps.append(Step(result, ended, len(chunks), begun, late))

        def read() -> list[int]:
            clock.wait_until(ended)
            return tokens

        if constraints is not None:
            constraints.sampled(slots, np.arange(len(slots)), read)

    def _pick(self, count: int) -> list[int]:
        if self.constraints is None:
            return [5] * count
        assert self.constraints._bitmask is not None
        found = []
        for row in self.constraints._bitmask.numpy()[:count].view(np.uint8):
            allowed = np.flatnonzero(np.unpackbits(row, bitorder="little")[:VOCAB])
            found.append(int(allowed[self.rng.randrange(len(allowed))]))
        return found

    def collect(self) -> Step:
        step = self.steps.popleft()
        self.clock.wait_until(step.ended)
        return step


def run(executor: Executor, batch: int, lengths: int | None) -> dict[str, Any]:
    """All requests of a batch at once; lengths: of outputs without a grammar. Times as `superinfer bench constrained`
    has them: of the stretch in which all of them decode."""
    clock = executor.clock
    scheduler = build_scheduler("fcfs", build_cache(batch * 128, 0, PAGE), SchedulerLimits(batch, 8192, 2048))
    sequences, times = [], {}
    for at in range(batch):
        schema = json.dumps(msgspec.json.schema(SCHEMAS[at % len(SCHEMAS)]))
        grammar = Grammar(kind="json_schema", source=schema) if lengths is None else None
        sampling = SamplingParams(grammar=grammar)
        prompt = [executor.rng.randrange(3, VOCAB) for _ in range(PROMPT)]
        stops = (EOS,) if lengths is None else ()
        sequence = Sequence(
            id=at, prompt=prompt, max_tokens=lengths or 1500, arrival=0.0, sampling=sampling, stop_ids=stops
        )
        sequences.append(sequence)
        times[sequence] = []
        scheduler.add(sequence)
    done: list[Step] = []
    host: list[float] = []
    while not all(sequence.status is Status.FINISHED for sequence in sequences):
        began = clock.now()
        while len(executor.steps) < 2:
            plan = scheduler.plan(clock.now())
            if plan is None:
                break
            executor.submit(plan)
        if not executor.steps:
            continue
        step = executor.collect()
        updates = scheduler.commit(step.result, clock.now())
        deltas = [SequenceDelta(request_id="request", token_ids=update.token_ids) for update in updates]
        msgspec.msgpack.encode(Deltas(deltas=deltas))
        with clock.apart():
            done.append(step)
            host.append(clock.now() - began)
            for update in updates:
                times[update.sequence] += [step.ended] * len(update.token_ids)
    begin, end = max(each[0] for each in times.values()), min(each[-1] for each in times.values())
    inside = [[when for when in each if begin <= when <= end] for each in times.values()]
    within = [step for step in done if begin < step.ended <= end]
    gaps = [(each[-1] - each[0]) / (len(each) - 1) * 1e3 for each in inside]
    return {
        "token_ms": statistics.median(gaps),
        "step_ms": (end - begin) / len(within) * 1e3,
        "device_step_ms": statistics.mean(step.result.elapsed for step in within) * 1e3,
        "masks_late_ms": statistics.mean(step.masks_late_s for step in within) * 1e3,
        "mask_host_ms": statistics.median(executor.mask_s) * 1e3 if executor.mask_s else 0.0,
        "tokens_per_step": statistics.mean(map(len, inside)) / len(within),
        "steps_with_chunks": sum(step.chunks > 0 for step in within) / len(within),
        "chunks_a_step": statistics.mean(step.chunks for step in within),
        "tokens": [len(each) for each in times.values()],
        "steps": len(done),
    }


def main() -> None:
    """Measure, print, write results/constrained-steps.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of each arm, in turns; medians are shown")
    parser.add_argument("--slower", type=float, nargs="+", default=[1.0, 2.15], help="see above; several")
    parser.add_argument("--name", default="constrained-steps", help="of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    xgrammar.apply_token_bitmask_inplace = lambda *_, **__: None
    device = Device.measured()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB)
        info = load_tokenizer_info(folder, VOCAB, (EOS,))
        retokenizer = Retokenizer(folder, info)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    schemas = {json.dumps(made): made for made in (msgspec.json.schema(schema) for schema in SCHEMAS)}
    compiled = {source: compiled_by_the_engine(compiler, made) for source, made in schemas.items()}
    grammars: Any = Grammars(compiled, retokenizer)
    results = [measure(device, grammars, slower, arguments.batch, arguments.rounds) for slower in arguments.slower]
    settings = vars(arguments) | {"device": device._asdict()}
    record = {"settings": settings, "results": results}
    print(f"written to {write(arguments.name, 'python benchmarks/constrained_steps.py', record)}")


def measure(device: Device, grammars: Any, slower: float, batch: int, count: int) -> dict[str, Any]:
    """Each arm by its name, medians of `count` rounds."""
    arms: dict[str, list[dict[str, Any]]] = {"jumps": [], "jumps, late": [], "no jumps": [], "free": []}
    for _ in range(count):
        for name, rounds in arms.items():
            constraints = None
            if name != "free":
                constraints = Constraints(batch, torch.device("cpu"), grammars, torch.from_numpy)
            executor = Executor(device, Clock(slower), constraints, name.startswith("jumps"), name.endswith("late"))
            rounds.append(run(executor, batch, 300 if name == "free" else None))
    found: dict[str, Any] = {"slower": slower}
    for name, rounds in arms.items():
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0] if key != "tokens"}
        found[name] = medians | {"rounds": rounds}
    for name in arms:
        one = found[name]
        one["slower"] = one["token_ms"] / found["free"]["token_ms"] - 1
        print(
            f"host x {slower:g}, {name:11}: {one['token_ms']:.2f} ms a token ({one['slower']:+.1%}), "
            f"{one['tokens_per_step']:.2f} tokens a step of {one['step_ms']:.2f} ms (device "
            f"{one['device_step_ms']:.2f}, of which late masks {one['masks_late_ms']:.2f}; masks take the host "
            f"{one['mask_host_ms']:.2f}); "
            f"{one['steps_with_chunks']:.0%} of steps have chunks, {one['chunks_a_step']:.1f} on average",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
