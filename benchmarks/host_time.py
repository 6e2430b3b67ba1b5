"""The CUDA executor's host time, without a GPU: everything but what the device and its driver would do.

steps: of steady decodes. The model and its graphs are left out (a replay does nothing), so what is timed is what the
scheduling thread spends in `submit` and `collect`: block tables, index arrays, uploads to a buffer, results. Plans are
made beforehand.
copies: what the second tier's body spends on a block moved, on a device that does nothing: `start` and `report` on the
scheduling thread, `submit` on the submitting one. Beside it, what its bookkeeping does.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write

from superinfer.bench.shapes import CONFIGS
from superinfer.kernels.paged import PagedBatch
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.cuda_tier import SWITCH_S
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.kv.copies import BlockCopy
from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.kv.tiers import TierNode
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import load_model
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import Decodes, SlotInit, StepPlan

PAGE = 16
USLEEP = ctypes.CDLL(None).usleep
GIL_RELEASES = 20


class NoAttention:
    """Plans nothing, computes nothing."""

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall."""

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See AttentionCall."""
        return q


class NoGraph:
    """A replay that takes no time."""

    def replay(self) -> None:
        """See torch.cuda.CUDAGraph."""


def small_model() -> CausalLM:
    """Of random weights; its size does not matter."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS["llama-3-8b"] | sizes))
        return load_model(Path(folder), load_format="dummy", dtype=torch.float32)


def executor_of(batch: int, context: int, model: CausalLM) -> CudaExecutor:
    """One that holds `batch` sequences of up to `context` tokens, and never computes."""
    blocks = batch * -(-context // PAGE)
    limits = ExecutorLimits(blocks, PAGE, batch, context, model.config.vocab_size)
    executor = CudaExecutor(
        model,
        limits,
        StepAttention(lambda _: NoAttention(), NoAttention()),
        max_batch_tokens=max(batch, 512),
        model_name="",
        path="",
        graphs=False,
    )
    for bucket in executor._buckets:
        bucket.graph = NoGraph()  # type: ignore[assignment]
    return executor


def steps_of(batch: int, context: int, steps: int) -> list[StepPlan]:
    """Decode plans of sequences about `context` tokens long, of different lengths; the first one sets them up."""
    per_slot = -(-(context + steps + PAGE) // PAGE)
    shuffled = np.random.default_rng(0).permutation(batch * per_slot).reshape(batch, per_slot)
    starts = [context - i % PAGE for i in range(batch)]
    plans = []
    greedy = SamplingParams(temperature=0)
    for step in range(steps):
        grown = []
        for slot, start in enumerate(starts):
            held, needed = (0 if step == 0 else -(-(start + step) // PAGE)), (start + step) // PAGE + 1
            if held < needed:
                grown.append((slot, tuple(shuffled[slot, held:needed].tolist())))
        decodes = Decodes(np.arange(batch), np.array(starts) + step, tuple(grown))
        inits = tuple(SlotInit(slot, greedy, slot, (1,)) for slot in range(batch)) if step == 0 else ()
        plans.append(StepPlan(step, (), inits, decodes=decodes))
    return plans


def measure(batch: int, context: int, steps: int, model: CausalLM) -> dict[str, Any]:
    """Median milliseconds of `submit` and `collect`."""
    executor = executor_of(batch, context + steps + PAGE, model)
    submit, collect = [], []
    for plan in steps_of(batch, context, steps):
        before = time.perf_counter()
        executor.submit(plan)
        between = time.perf_counter()
        result = executor.collect()
        after = time.perf_counter()
        assert result.decoded is not None and len(result.decoded) == batch
        submit.append((between - before) * 1e3)
        collect.append((after - between) * 1e3)
    executor.close()
    warm = slice(len(submit) // 4, None)
    return {
        "batch": batch,
        "context": context,
        "submit_ms": statistics.median(submit[warm]),
        "submit_ms_least": min(submit[warm]),
        "collect_ms": statistics.median(collect[warm]),
    }


class NoDevice:
    """A CopyDevice on which all is done at once, and nothing is."""

    def __init__(self) -> None:
        self._handles = 0

    def use(self) -> None:
        """See CopyDevice."""

    def compute_stream(self) -> int:
        """See CopyDevice."""
        return 0

    def new_stream(self) -> int:
        """See CopyDevice."""
        return self.new_event()

    def new_event(self) -> int:
        """See CopyDevice."""
        self._handles += 1
        return self._handles

    def free(self, streams: list[int], events: list[int]) -> None:
        """See CopyDevice."""

    def record(self, event: int, stream: int) -> None:
        """See CopyDevice."""

    def wait(self, stream: int, event: int) -> None:
        """See CopyDevice."""

    def reached(self, event: int) -> bool:
        """See CopyDevice."""
        return True

    def seconds(self, earlier: int, later: int) -> float:
        """See CopyDevice."""
        return 1e-3

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """See CopyDevice."""
        return []

    def synchronize(self, stream: int) -> None:
        """See CopyDevice."""


class Inline:
    """A Submitter whose jobs run when asked for."""

    def __init__(self) -> None:
        self.done, self._jobs = 0, deque()

    def put(self, job: Any) -> None:
        """See Submitter."""
        self._jobs.append(job)

    def wake(self) -> None:
        """See Submitter."""

    def finish(self, count: int) -> None:
        """See Submitter."""
        while self.done < count:
            self._jobs.popleft()()
            self.done += 1

    def close(self) -> None:
        """See Submitter."""


def _mirrors(first: int) -> list[BlockCopy]:
    """What a step mirrors."""
    return [BlockCopy(first + i, True, i * 7 % 500, i) for i in range(32)]


def _both_ways(first: int) -> list[BlockCopy]:
    """Blocks that have nothing to do with each other."""
    return [BlockCopy(first + i, i % 2 == 0, i, i) for i in range(256)]


def _exchange(first: int) -> list[BlockCopy]:
    """A sequence of 500 blocks leaves, another takes its places."""
    outs = [BlockCopy(first + i, True, i, i) for i in range(500)]
    return outs + [BlockCopy(first + 500 + i, False, i, 500 + i, (first + i,)) for i in range(500)]


class SlowDevice(NoDevice):
    """Its copies take 1.5 µs of the caller's time each, without the GIL, as the driver's do."""

    def copy(self, stream: int, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> list[int]:
        """See CopyDevice."""
        USLEEP(int(1.5 * len(dsts)))
        return []


class Driver(SlowDevice):
    """Its short calls take the caller's time with the GIL, as the driver's do: a microsecond each. Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def _call(self) -> None:
        self.calls += 1
        until = time.perf_counter() + 1e-6
        while time.perf_counter() < until:
            pass

    def record(self, event: int, stream: int) -> None:
        """See CopyDevice."""
        self._call()

    def wait(self, stream: int, event: int) -> None:
        """See CopyDevice."""
        self._call()

    def reached(self, event: int) -> bool:
        """See CopyDevice."""
        self._call()
        return True

    def seconds(self, earlier: int, later: int) -> float:
        """See CopyDevice."""
        self._call()
        return 1e-3


def measure_in_step(rounds: int = 300, blocks: int = 140, work_s: float = 3e-4, step_s: float = 4e-3) -> dict[str, Any]:
    """Steps whose `submit` starts copies of `blocks` each way, each copy in behind a copy out, and then spends `work_s`
    on what is not copies, giving up the GIL now and then as torch's calls do; `collect` comes `step_s` later. Beside
    steps without copies, in turn: what `submit` and `report` take longer, microseconds of the clock for each block
    moved; and short driver calls a step."""
    sys.setswitchinterval(SWITCH_S)
    device = Driver()
    duplex, first = CudaDuplex(device, Places(0, 0, 2 << 20, 512)), 1
    submits: dict[bool, list[float]] = {True: [], False: []}
    reports: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * rounds):
        moving = turn % 2 == 0
        copies = []
        if moving:
            copies = [
                BlockCopy(first + i, i % 2 == 0, i, i, (first + i - 1,) if i % 2 else ()) for i in range(2 * blocks)
            ]
            first += 2 * blocks
        began = time.perf_counter()
        duplex.start(copies, hold=True)
        duplex.wait(())
        for _ in range(GIL_RELEASES):
            spun = 0
            while spun < work_s / GIL_RELEASES * SPINS_PER_S:
                spun += 1
            time.sleep(0)
        duplex.release()
        submitted = time.perf_counter()
        time.sleep(step_s)
        collected = time.perf_counter()
        duplex.report()
        reports[moving].append(time.perf_counter() - collected)
        submits[moving].append(submitted - began)
        while duplex._arranger._batch_of:
            time.sleep(1e-4)
            duplex.report()
    duplex.close()

    def more(times: dict[bool, list[float]]) -> float:
        return (statistics.median(times[True]) - statistics.median(times[False])) / (2 * blocks) * 1e6

    calls = device.calls / rounds
    row = {"blocks": 2 * blocks, "submit_us": more(submits), "report_us": more(reports), "driver_calls": calls}
    print(
        f"in a step: submit {row['submit_us']:.2f} µs a block longer, report {row['report_us']:.2f}; "
        f"{calls:.0f} short driver calls for {2 * blocks} blocks"
    )
    return row


def measure_in_turn(checkout: Path, rounds: int = 5) -> dict[str, Any]:
    """`measure_in_step` here and in another checkout of this repository, in turn, each time in a process of its own."""
    code = "import json, host_time; print(json.dumps(host_time.measure_in_step()))"
    rows: dict[str, list[dict[str, Any]]] = {"here": [], "other": []}
    for _ in range(rounds):
        for name, root in (("here", Path(__file__).parent.parent), ("other", checkout.resolve())):
            paths = f"{root}{os.pathsep}{root / 'benchmarks'}"
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": paths},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = {"other_commit": head.stdout.strip(), "runs": rows}
    for name, runs in rows.items():
        found[name] = {key: statistics.median(run[key] for run in runs) for key in ("submit_us", "report_us")}
        print(
            f"{name:5}: submit {found[name]['submit_us']:.2f} µs a block longer, report {found[name]['report_us']:.2f}"
        )
    return found


def _spins_per_s() -> float:
    began, spun = time.perf_counter(), 0
    while spun < 1_000_000:
        spun += 1
    return 1_000_000 / (time.perf_counter() - began)


SPINS_PER_S = _spins_per_s()


def measure_beside_thread(rounds: int = 40, plans: int = 16, blocks: int = 128) -> dict[str, Any]:
    """Plans of `blocks` each way, one behind the other, as `superinfer bench link` gives them, the submitting thread
    at work: median microseconds of the scheduling thread, of the clock and of the CPU, for each block moved."""
    duplex, first, wall, cpu = CudaDuplex(SlowDevice(), Places(0, 0, 2 << 20, 512)), 1, [], []
    for _ in range(rounds):
        made = []
        for _ in range(plans):
            made.append([BlockCopy(first + i, i >= blocks, i, i) for i in range(2 * blocks)])
            first += 2 * blocks
        left, spent, busy = plans * 2 * blocks, 0.0, 0.0
        for call in [*(lambda plan=plan: duplex.start(plan) for plan in made), None]:
            while call is not None or left:
                began, worked = time.perf_counter(), time.thread_time()
                copied = call() if call is not None else duplex.report()[0]
                if call is not None or copied:  # other reports only pass the time
                    spent += time.perf_counter() - began
                    busy += time.thread_time() - worked
                if call is not None:
                    break
                left -= len(copied)
                time.sleep(1e-4)
        wall.append(spent / (plans * 2 * blocks) * 1e6)
        cpu.append(busy / (plans * 2 * blocks) * 1e6)
    batches = duplex._jobs / rounds / plans
    duplex.close()
    row = {
        "blocks": 2 * blocks,
        "batches": batches,
        "wall_us": statistics.median(wall),
        "cpu_us": statistics.median(cpu),
    }
    print(f"beside the thread: {row['wall_us']:.2f} µs a block, CPU {row['cpu_us']:.2f}; {batches:.0f} batches a plan")
    return row


def measure_bookkeeping(rounds: int = 300, blocks: int = 140) -> dict[str, float]:
    """What the scheduler's side spends on a block moved before and after: to plan a copy, and to take in its report."""
    kv = DuplexCache(2 * blocks, 4 * blocks, PAGE)
    node, planned, settled = TierNode(b"", 0, None), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        for at in range(blocks):  # each copy in takes the room of a copy out
            kv.copies.plan(True, at, at, node)
            kv.copies.plan(False, at, 2 * blocks + at, node)
        copies = kv.take_copies()
        between = time.perf_counter()
        ids = [copy.id for copy in copies]
        before = time.perf_counter()
        kv.settle(ids, ())
        planned.append((between - began) / len(ids) * 1e6)
        settled.append((time.perf_counter() - before) / len(ids) * 1e6)
    row = {"plan_us": statistics.median(planned), "settle_us": statistics.median(settled)}
    print(f"bookkeeping: plan {row['plan_us']:.2f} µs a block, settle {row['settle_us']:.2f}")
    return row


def measure_copies(rounds: int = 200) -> list[dict[str, Any]]:
    """Median microseconds a block."""
    rows = []
    for plan in (_mirrors, _both_ways, _exchange):
        submitter = Inline()
        duplex = CudaDuplex(NoDevice(), Places(0, 0, 2 << 20, 512), submitter=submitter)
        first, spent = 1, []
        for _ in range(rounds):
            copies = plan(first)
            first += len(copies)
            marks = [time.perf_counter()]
            duplex.start(copies, (copies[-1].id,))
            marks.append(time.perf_counter())
            submitter.finish(duplex._jobs)
            marks.append(time.perf_counter())
            assert len(duplex.report()[0]) == len(copies)
            marks.append(time.perf_counter())
            spent.append([(b - a) / len(copies) * 1e6 for a, b in itertools.pairwise(marks)])
        start, submit, report = (statistics.median(column) for column in zip(*spent, strict=True))
        name = plan.__name__.strip("_")
        rows.append({"plan": name, "blocks": len(copies), "start_us": start, "submit_us": submit, "report_us": report})
        print(
            f"{name:10} {len(copies):5d} blocks: start {start:.2f} µs and report {report:.2f} µs a block, "
            f"submit {submit:.2f} µs on its own thread",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="host-time-cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[592, 8000])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--before", help="another such file, whose numbers are kept beside these")
    parser.add_argument(
        "--other", type=Path, help="another checkout, whose `in_step` is measured in turn with this one's"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = small_model()
    results = []
    for context in arguments.context:
        for batch in arguments.batch:
            results.append(measure(batch, context, arguments.steps, model))
            row = results[-1]
            print(
                f"batch {batch:4d}, {context:5d} tokens: submit {row['submit_ms']:.3f} ms "
                f"(least {row['submit_ms_least']:.3f}), collect {row['collect_ms']:.3f} ms",
                flush=True,
            )
    settings = vars(arguments) | {"before": Path(arguments.before).name if arguments.before else None}
    del settings["other"]
    record = {"settings": settings, "results": results, "copies": measure_copies()}
    record["bookkeeping"] = measure_bookkeeping()
    record["beside_thread"] = measure_beside_thread()
    record["in_step"] = measure_in_step()
    if arguments.other:
        record["in_turn"] = measure_in_turn(arguments.other)
    if arguments.before:
        older = json.loads(Path(arguments.before).read_text())
        record["before"] = {
            "commit": older["commit"],
            "date": older["date"],
            "results": older["results"],
            "copies": older["copies"],
        }
        record["before"]["beside_thread"] = older.get("beside_thread")
    print(f"written to {write(arguments.name, 'python benchmarks/host_time.py', record)}")


if __name__ == "__main__":
    main()
