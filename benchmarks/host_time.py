"""The CUDA executor's host time, without a GPU: everything but what the device and its driver would do.

Steps are of steady decodes. The model and its graphs are left out (a replay does nothing), so what is timed is what the
scheduling thread spends in `submit` and `collect`: block tables, index arrays, uploads to a buffer, results. Plans are
made beforehand. What the second tier costs is in `block_host_time.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write

from superinfer.bench.shapes import CONFIGS
from superinfer.kernels.paged import PagedBatch
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import load_model
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import Decodes, SlotInit, StepPlan

PAGE = 16


class NoAttention:
    """Plans nothing, computes nothing."""

    skips_empty = reads_lengths = False

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


def main() -> None:
    """Measure, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="host-time-cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[592, 8000])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--before", help="another such file, whose numbers are kept beside these")
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
    record = {"settings": settings, "results": results}
    if arguments.before:
        older = json.loads(Path(arguments.before).read_text())
        record["before"] = {"commit": older["commit"], "date": older["date"], "results": older["results"]}
    print(f"written to {write(arguments.name, 'python benchmarks/host_time.py', record)}")


if __name__ == "__main__":
    main()
