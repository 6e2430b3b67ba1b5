"""What steps that mix decodes and prefill chunks cost, and where it goes: device, gaps between kernels, the host.

Llama-3-8B's shape, random weights, bf16, decodes of 1,100 tokens of context. For decodes alone, decodes beside chunks,
chunks alone, and steps of both kinds in turn, as an engine has them, with two steps under way:

rows: asked for, and with the padding of the graph that is replayed. step: device time between the step's marks.
eager: that where no step with chunks is captured. queued: that where the host was so far ahead that the device never
waited for it. kernels: what kernels take, the profiler says, overlaps counted once; launches: how many there are.
gaps: by the kernel in front, where the profiled device had nothing to do. host: what `submit` takes, and its parts (a
part may hold others).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from gpu_common import GREEDY, MODEL, PAGE, gpu_executor, random_prompt
from gpu_profile import group_of
from record import write
from torch.profiler import ProfilerActivity, profile

from superinfer.kernels import host_memory
from superinfer.runtime.engine import cuda_executor
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

DECODES, PROMPTS = 256, 16  # slots for decodes, slots for chunks
CONTEXT, LONGEST = 1100, 8192
AHEAD_CYCLES = 120_000_000  # 60 ms and more: no step takes the host as long
STEPS = 12
# Chunks of a step by their rows: one prompt's, or several's.
CHUNKS: dict[str, tuple[int, ...]] = {
    "256": (256,),
    "512": (512,),
    "4 x 128": (128,) * 4,
    "896": (896,),
    "1200": (1200,),
    "3 x 400": (400,) * 3,
    "2000": (2000,),
    "4000": (4000,),
    "8 x 1000": (1000,) * 8,
}


class Steps:
    """An executor with decodes and prompts in place, and the plans of steps over them."""

    def __init__(self, executor: CudaExecutor) -> None:
        self.executor = executor
        executor.cache.normal_()  # zeros would draw less power than keys and values do
        rng = random.Random(0)
        blocks = iter(range(executor.limits.num_blocks))
        inits = [SlotInit(slot, GREEDY, 0, (1,)) for slot in range(DECODES + PROMPTS)]
        works = []
        for slot in range(DECODES):
            held = tuple(islice(blocks, (CONTEXT + PAGE) // PAGE + 1))
            works.append(SlotWork(slot, CONTEXT, 1, (), held, True))
        self._prompts = [tuple(random_prompt(rng, LONGEST)) for _ in range(PROMPTS)]
        for i, prompt in enumerate(self._prompts):
            held = tuple(islice(blocks, LONGEST // PAGE if i == 0 else LONGEST // 8 // PAGE))
            works.append(SlotWork(DECODES + i, 0, PAGE, prompt[:PAGE], held, True))
        self.run([StepPlan(0, tuple(works), tuple(inits))])

    def plan(self, decodes: int, chunks: Sequence[int] = ()) -> StepPlan:
        """Decodes, and one prompt's first tokens for each of `chunks`."""
        work = [SlotWork(slot, CONTEXT, 1, sample=True) for slot in range(decodes)]
        for i, length in enumerate(chunks):
            work.append(SlotWork(DECODES + i, 0, length, self._prompts[i][:length], sample=True))
        return StepPlan(0, tuple(work))

    def run(self, plans: Sequence[StepPlan]) -> list[float]:
        """Device milliseconds of each, two under way at a time."""
        elapsed = []
        for i, plan in enumerate(plans):
            self.executor.submit(plan)
            if i:
                elapsed.append(self.executor.collect().elapsed * 1e3)
        elapsed.append(self.executor.collect().elapsed * 1e3)
        return elapsed

    def queued(self, plan: StepPlan) -> float:
        """Device milliseconds of a step that was given whole to the device before it began."""
        torch.cuda._sleep(AHEAD_CYCLES)
        self.executor.submit(plan)
        return self.executor.collect().elapsed * 1e3

    def alone(self, plan: StepPlan) -> float:
        """Wall milliseconds of a step that begins on an idle device."""
        torch.cuda.synchronize()
        before = time.perf_counter()
        self.executor.submit(plan)
        self.executor.collect()
        return (time.perf_counter() - before) * 1e3


class HostParts:
    """Times what `submit` calls, by replacing attributes of the executor and its parts while it is measured."""

    def __init__(self, executor: CudaExecutor) -> None:
        self._executor = executor
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._spent[name] += time.perf_counter() - before
                self._calls[name] += 1

        return timed

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Collect from here to the end."""
        executor, replaced = self._executor, []

        def replace(owner: Any, attribute: str, name: str) -> None:
            replaced.append((owner, attribute, vars(owner).get(attribute)))
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

        self._spent.clear()
        self._calls.clear()
        replace(executor, "submit", "submit")
        replace(executor._sent, "wait", "sent.wait")
        replace(executor._stage, "next_step", "stage.next_step")
        replace(executor._chunks, "fill", "chunks.fill")
        replace(executor._attention.chunks, "plan", "chunks.plan")
        replace(executor._attention.chunks, "run", "chunks.run")
        replace(executor._decodes, "fill", "decodes.fill")
        if executor._mixed_graphs is not None:
            replace(executor._mixed_graphs, "prepare", "mixed.prepare")
            replace(executor._mixed_graphs, "run", "mixed graph")
        else:
            replace(executor._mixed, "fill", "mixed.fill")
        replace(executor, "_finish_mixed", "finish_mixed")
        replace(executor._model, "forward", "model, eager")
        replace(host_memory, "copy", "host_memory.copy")
        replace(executor._tables, "extend", "tables.extend")
        for bucket in executor._buckets:
            replace(bucket.attention, "plan", "decodes.plan")
            replace(bucket.attention, "run", "decodes.run")
            replace(bucket.graph, "replay", "decode graph")
        for pieces in executor._pieces:
            replace(pieces, "run", "pieces.run")
        replace(cuda_executor.Pending, "keep_sampled", "keep_sampled")
        try:
            yield
        finally:
            for owner, attribute, before in reversed(replaced):
                if before is None:
                    delattr(owner, attribute)
                else:
                    setattr(owner, attribute, before)

    def per_step(self, steps: int) -> dict[str, float]:
        """Milliseconds by part."""
        return {name: spent / steps * 1e3 for name, spent in sorted(self._spent.items(), key=lambda item: -item[1])}


def traced(steps: Steps, plans: Sequence[StepPlan]) -> dict[str, Any]:
    """What the profiler saw of the device, per step."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        steps.run(plans)
        torch.cuda.synchronize()
    seen = [
        (event.start_ns(), event.duration_ns(), event.name())
        for event in trace.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type()) and event.duration_ns() > 0
    ]
    seen.sort()
    busy, end, last = 0.0, 0, ""
    gaps: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start, duration, name in seen:
        if start > end and end:
            gaps[last[:60]] += start - end
        busy += max(0, start + duration - max(start, end))
        if start + duration > end:
            end, last = start + duration, name
        groups[group_of(name)] += duration
        kernels[name[:100]] += duration
        counts[name[:100]] += 1
    each = 1e6 * len(plans)
    return {
        "launches": len(seen) / len(plans),
        "kernels_ms": busy / each,
        "gaps_ms": sum(gaps.values()) / each,
        "gaps_behind_ms": {name: value / each for name, value in gaps.most_common(8)},
        "groups_ms": {name: value / each for name, value in groups.most_common()},
        "kernel_ms": {f"{counts[name] / len(plans):g} x {name}": v / each for name, v in kernels.most_common(24)},
    }


def measure(steps: Steps, plans: Sequence[StepPlan]) -> dict[str, Any]:
    """Steps of `plans` in turn, again and again."""
    again = list(plans) * STEPS
    steps.run(again)
    before = time.perf_counter()
    elapsed = steps.run(again)
    wall = (time.perf_counter() - before) * 1e3 / STEPS
    parts = HostParts(steps.executor)
    with parts.watch():
        steps.run(again)
    return {
        "step_ms": [statistics.median(elapsed[i :: len(plans)]) for i in range(len(plans))],
        "queued_ms": [statistics.median(steps.queued(plan) for _ in range(4)) for plan in plans],
        "alone_ms": [statistics.median(steps.alone(plan) for _ in range(5)) for plan in plans],
        "wall_ms": wall,
        "host_ms": parts.per_step(len(again)),
        "device": traced(steps, again),
    }


def measure_eager(steps: Steps, plans: Sequence[StepPlan]) -> dict[str, Any]:
    """The same steps where none with chunks is captured: of exactly their rows, and launched one by one."""
    executor = steps.executor
    graphs, executor._mixed_graphs = executor._mixed_graphs, None
    pieces, executor._pieces = executor._pieces, []
    again = list(plans) * STEPS
    steps.run(again)
    elapsed = steps.run(again)
    executor._mixed_graphs, executor._pieces = graphs, pieces
    return {"step_ms": [statistics.median(elapsed[i :: len(plans)]) for i in range(len(plans))]}


def padded_rows(executor: CudaExecutor, plan: StepPlan) -> tuple[int, int]:
    """Rows of a step, and of the graph that it replays; the same where it has none."""
    chunks = [work for work in plan.work if work.tokens]
    decodes = len(plan.work) - len(chunks)
    rows = decodes + sum(work.length for work in chunks)
    found = executor._mixed_graphs.find(decodes, chunks) if executor._mixed_graphs is not None and chunks else None
    return rows, rows if found is None else found.rows


def capture_memory(executor: CudaExecutor) -> dict[str, float]:
    """Gigabytes."""
    return {
        "allocated_gb": torch.cuda.memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.memory_reserved() / 1e9,
        "kv_gb": executor.cache.nbytes / 1e9,
    }


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="gpu-mixed-steps")
    parser.add_argument("--decodes", type=int, nargs="+", default=[64, 128, 256], help="batches of decodes alone")
    parser.add_argument("--beside", type=int, default=128, help="decodes beside chunks")
    parser.add_argument("--eager", action="store_true", help="measure steps with chunks eagerly too")
    parser.add_argument("--only", nargs="+", default=list(CHUNKS), help=f"of {', '.join(CHUNKS)}")
    arguments = parser.parse_args()
    before, last = time.perf_counter(), ""
    spent: defaultdict[str, float] = defaultdict(float)

    def on_progress(label: str, _: float) -> None:
        """Seconds by what was going on at start."""
        nonlocal before, last
        now = time.perf_counter()
        spent[last or "importing"] += now - before
        before, last = now, label

    executor = gpu_executor(
        on_progress,
        max_batch_size=DECODES + PROMPTS,
        max_batch_tokens=LONGEST,
        kv_tokens=DECODES * (CONTEXT + 2 * PAGE) + LONGEST + PROMPTS * (LONGEST // 8 + 2 * PAGE),
    )
    on_progress("", 1.0)
    memory = capture_memory(executor)
    print("  ".join(f"{name} {value:.2f}" for name, value in [*memory.items(), *spent.items()]), flush=True)
    steps = Steps(executor)
    beside = arguments.beside
    cases = {f"{n} decodes": [steps.plan(n)] for n in arguments.decodes}
    for name in arguments.only:
        cases[f"{beside} + {name}"] = [steps.plan(beside, CHUNKS[name])]
        cases[f"{beside}, {beside} + {name}"] = [steps.plan(beside), steps.plan(beside, CHUNKS[name])]
    cases |= {f"0 + {name}": [steps.plan(0, CHUNKS[name])] for name in arguments.only}
    results = {}
    for name, plans in cases.items():
        found = results[name] = measure(steps, plans)
        rows, padded = padded_rows(executor, plans[-1])
        found |= {"rows": rows, "padded_rows": padded}
        eager = ""
        if arguments.eager and name.endswith(tuple(arguments.only)):
            found["eager"] = measure_eager(steps, plans)
            eager = "eager " + " ".join(f"{value:.2f}" for value in found["eager"]["step_ms"]) + "  "
        device = found["device"]
        listed = " ".join(f"{value:.2f}" for value in found["step_ms"])
        queued = " ".join(f"{value:.2f}" for value in found["queued_ms"])
        alone = " ".join(f"{value:.2f}" for value in found["alone_ms"])
        parts = ", ".join(f"{part} {value:.2f}" for part, value in list(found["host_ms"].items())[:9])
        print(
            f"{name:24} {rows}/{padded} rows  step {listed:12} {eager}queued {queued:12} alone {alone:12} wall "
            f"{found['wall_ms']:6.2f}  kernels {device['kernels_ms']:6.2f}  gaps {device['gaps_ms']:5.2f}  "
            f"{device['launches']:.0f} launches  host: {parts}",
            flush=True,
        )
    measured = {
        "model": MODEL,
        "memory": memory,
        "start_s": dict(spent),
        "results": results,
    }
    print(f"written to {write(arguments.name, 'python benchmarks/gpu_mixed_steps.py', measured)}")


if __name__ == "__main__":
    main()
