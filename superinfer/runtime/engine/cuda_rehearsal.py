"""Steps of every kind, run before the first request comes, which would else wait for what they need once.

CUDA loads a kernel, Triton compiles one and torch asks the driver for memory when they are first wanted. What is in a
graph was run for its capture. The longest steps, which run kernel by kernel, and the sampler are in none: on a machine
that never compiled their kernels, the first requests of a server would wait for seconds, all deadlines with them.
"""

from __future__ import annotations

from typing import Any

import torch

from superinfer.errors import ModelLoadError
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.models.loader import Progress
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.0, logprobs=1),
    SamplingParams(temperature=1.0, min_tokens=2, repetition_penalty=1.1, logit_bias=((0, 1.0),), logprobs=1),
)
# Triton compiles a kernel for one row apart, and for a multiple of 16.
MASKED_ROWS = 1, 2, 16
DECODES = 2  # tokens of each prompt's answer that are computed, at most


def rehearse(executor: CudaExecutor, max_batch_tokens: int, on_progress: Progress | None = None) -> None:
    """Run the longest steps there may be, and each way to pick a token; afterwards all slots are free again.

    The KV cache has something in its blocks then, and nobody's. Raises ModelLoadError where the device has no memory
    for such a step.
    """
    prompts = _prompts(executor.limits, max_batch_tokens)
    if not prompts:  # a pool of less than a prompt's block for each of two slots
        return
    if on_progress is not None:
        on_progress("rehearsing steps", 0.0)
    _mask(torch.device(executor.device), executor.limits.vocab_size)
    try:
        for plan in _plans(executor.limits, prompts):
            executor.submit(plan)
            executor.collect()
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"a step of max_batch_tokens={max_batch_tokens} finds no memory beside the weights and the KV pool: "
            f"{error}; lower max_batch_tokens or kv_tokens"
        ) from error


def _mask(device: torch.device, vocab_size: int) -> None:
    """Forbid nothing in rows of logits, as `Constraints.mask` does: of all rows, and of some."""
    import xgrammar

    for rows in MASKED_ROWS:
        bitmask = xgrammar.allocate_token_bitmask(rows, vocab_size).to(device)
        indices: Any = torch.arange(rows, dtype=torch.int32, device=device)
        for logits, masked in ((torch.zeros(rows, vocab_size), None), (torch.zeros(rows + 1, vocab_size), indices)):
            xgrammar.apply_token_bitmask_inplace(logits.to(device), bitmask, indices=masked)


def _prompts(limits: ExecutorLimits, max_batch_tokens: int) -> list[tuple[int, ...]]:
    """As few as fill a step, two at least, of equal length."""
    longest = limits.max_model_len - DECODES
    count = min(max(2, -(-max_batch_tokens // max(1, longest))), limits.num_slots)
    length = min(longest, max_batch_tokens // count, limits.num_blocks // count * limits.page_size - DECODES)
    return [(0,) * length] * count if length > 0 else []


def _plans(limits: ExecutorLimits, prompts: list[tuple[int, ...]]) -> list[StepPlan]:
    """All prompts whole; all but the last again behind what is cached of them, beside a decode of the last; then the
    last once more for each way to sample, and scored."""
    page, length, last = limits.page_size, len(prompts[0]), len(prompts) - 1
    each = -(-(length + DECODES) // page)
    blocks = [tuple(range(slot * each, (slot + 1) * each)) for slot in range(len(prompts))]
    inits = tuple(SlotInit(slot, GREEDY, 0, prompt) for slot, prompt in enumerate(prompts))
    begun = [SlotWork(slot, 0, length, prompt, blocks[slot], sample=True) for slot, prompt in enumerate(prompts)]
    decode = SlotWork(last, length, 1, sample=True)
    again = [SlotWork(slot, page, length - page, (0,) * (length - page), sample=True) for slot in range(last)]
    plans = [StepPlan(0, tuple(begun), inits), StepPlan(1, (decode, *again) if length > page else (decode,))]
    short = (0,) * min(length, page)
    for sampling in SAMPLED:
        init = SlotInit(last, sampling, 0, short, stop_ids=(0,))
        work = SlotWork(last, 0, len(short), short, blocks[last], sample=True)
        plans.append(StepPlan(len(plans), (work,), (init,), freed=(last,)))
        plans.append(StepPlan(len(plans), (SlotWork(last, len(short), 1, sample=True),)))
    scored = SlotWork(last, 0, len(short), short, blocks[last], score=(0,))
    plans.append(StepPlan(len(plans), (scored,), (SlotInit(last, GREEDY, 0, short),), freed=(last,)))
    return [*plans, StepPlan(len(plans), (), freed=tuple(range(len(prompts))))]
