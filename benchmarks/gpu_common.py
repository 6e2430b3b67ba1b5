"""What the GPU scripts share: an executor of Llama-3-8B's shape with prompts in its slots, the device's clock, the
machine's ceilings."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from superinfer.bench import engine, shapes
from superinfer.bench.ceilings import measure_ceilings
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

MODEL = "Llama-3-8B shape, random weights, bfloat16"  # as results name it
PROMPT, PAGE = 512, 16  # tokens of the prompts that `fill_slots` computes, and of a block
ROOM = 64  # tokens that a slot has blocks for beyond its prompt
GREEDY = SamplingParams(temperature=0)
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # [out, in]


def gpu_executor(
    on_progress: Callable[[str, float], None] | None = None,
    shape: str = "llama-3-8b",
    layers: int | None = None,
    **settings: Any,
) -> CudaExecutor:
    """On a GPU, of that model, or of another `shape` of `bench`. settings: further fields of EngineConfig."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(shapes.write_shape(shape, Path(folder), layers))
        config = EngineConfig(model=model, device="cuda", load_format="dummy", **settings)
        executor = build_executor(config, on_progress)
    assert isinstance(executor, CudaExecutor)
    return executor


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids of Llama 3."""
    return engine.random_prompt(rng, length, 128000)


def fill_slots(executor: CudaExecutor, slots: int, at_once: int) -> list[SlotWork]:
    """Compute a prompt of PROMPT tokens in each of the first `slots` slots, so many in a step; what was computed."""
    rng = random.Random(0)
    blocks = (PROMPT + ROOM) // PAGE
    prompts = [tuple(random_prompt(rng, PROMPT)) for _ in range(slots)]
    inits = tuple(SlotInit(slot, GREEDY, 0, prompt) for slot, prompt in enumerate(prompts))
    works = [
        SlotWork(slot, 0, PROMPT, prompt, tuple(range(slot * blocks, (slot + 1) * blocks)), sample=True)
        for slot, prompt in enumerate(prompts)
    ]
    for first in range(0, slots, at_once):
        executor.submit(StepPlan(0, tuple(works[first : first + at_once]), inits[first : first + at_once]))
        executor.collect()
    return works


def decode_plan(batch: int) -> StepPlan:
    """A token for each of the first `batch` slots that `fill_slots` has filled; it may run again and again."""
    return StepPlan(0, tuple(SlotWork(slot, PROMPT + 8, 1, sample=True) for slot in range(batch)))


def device_ms(executor: CudaExecutor, plans: list[StepPlan]) -> float:
    """Device milliseconds of the steps, two under way at a time."""
    elapsed = 0.0
    for i, plan in enumerate(plans):
        executor.submit(plan)
        if i:
            elapsed += executor.collect().elapsed
    return (elapsed + executor.collect().elapsed) * 1e3


def milliseconds(work: Callable[[], object]) -> float:
    """Device time of what `work` enqueues on the current stream; waits for it."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


def milliseconds_a_call(call: Callable[[int], object], calls: int, layers: int) -> float:
    """The same of one call of call(layer), over `calls` of them in a row, the layers by turns."""

    def every() -> None:
        for number in range(calls):
            call(number % layers)

    return milliseconds(every) / calls


def ceilings() -> dict[str, float]:
    """Measured in a process of their own, so that the memory is free again."""
    roof = measure_ceilings("cuda", "bfloat16")
    return {"copy_tb_s": roof.copy / 1e12, "matmul_tflop_s": roof.matmul / 1e12}
