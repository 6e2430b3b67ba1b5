"""The CUDA executor against transformers, and its graphs and overlap against itself without them."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import generate, logprobs, make_checkpoint, prompts_of
from stepper import Stepper

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import StepPlan

TOKENS = 24
FLOAT32_VARIANTS = [
    "llama",
    "llama-7-heads-per-kv-head",
    "llama-biases",
    "mistral-window",
    "qwen2",
    "qwen2-upper-layers-windowed",
    "qwen3",
    "qwen3-alternating-windows",
    "mixtral",
    "mixtral-tied-window",
    "qwen3-moe",
    "qwen3-moe-dense-first",
]
WIDE = dict(head_dim=128, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)
# Experts all chosen: where few are, bfloat16 picks others than float32 here and there, in transformers as here.
WIDE_VARIANTS = {
    "llama": {},
    "mistral-window": dict(sliding_window=30),
    "qwen2": {},
    "qwen3": {},
    "qwen3-alternating-windows": dict(sliding_window=20),
    "mixtral-every-expert": {},
    "qwen3-moe": dict(num_experts_per_tok=6, norm_topk_prob=True, moe_intermediate_size=256),
}


def executor_of(folder, **settings) -> CudaExecutor:
    settings = {"page_size": 16, "max_batch_size": 12, "kv_tokens": 8192, "dtype": "float32", **settings}
    executor = build_executor(EngineConfig(model=str(folder), device="cuda", **settings))
    assert isinstance(executor, CudaExecutor)
    return executor


def run(executor: CudaExecutor, prompts: list[list[int]], chunk: int | None = None, **kwargs) -> list[list[int]]:
    stepper = Stepper(executor)
    batch = [stepper.add(prompt, seed=i, **kwargs) for i, prompt in enumerate(prompts)]
    stepper.run(batch, TOKENS, chunk)
    return [s.output for s in batch]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_checkpoint(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A head size that FlashInfer has, for half precision."""
    folder = tmp_path_factory.mktemp("wide")
    changes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)
    return folder, make_checkpoint(folder, "llama-head-128", **changes)


@pytest.mark.parametrize("variant", FLOAT32_VARIANTS)
def test_float32_greedy_tokens_equal_transformers(tmp_path, variant):
    model = make_checkpoint(tmp_path, variant)
    executor = executor_of(tmp_path)
    prompts = prompts_of([1, 9, 30, 70, 16])
    expected = [generate(model, prompt, TOKENS) for prompt in prompts]
    assert run(executor, prompts) == expected
    assert run(executor, prompts, chunk=7) == expected  # chunks beside decodes in one forward


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("variant", WIDE_VARIANTS)
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tmp_path, variant, graphs):
    """Relative error of the log probabilities of the 20 likeliest tokens; on a random Llama near 6 %. graphs: of steps
    with chunks; longer steps than graphs take do without."""
    model = make_checkpoint(tmp_path, variant, **{**WIDE, **WIDE_VARIANTS[variant]})
    executor = executor_of(tmp_path, dtype="bfloat16")
    if not graphs:
        executor._mixed_graphs = None
    prompts = prompts_of([40, 100, 17])
    stepper = Stepper(executor)
    batch = [stepper.add(prompt, SamplingParams(temperature=0, logprobs=20)) for prompt in prompts]
    stepper.run(batch, TOKENS, chunk=50)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for prompt, sequence in zip(prompts, batch, strict=True):
        found = torch.tensor([[value for _, value in entry.top] for entry in sequence.logprobs])
        ids = torch.tensor([[i for i, _ in entry.top] for entry in sequence.logprobs])
        wanted, theirs = (
            logprobs(m, prompt + sequence.output)[len(prompt) - 1 :].float()[: len(ids)].gather(1, ids)
            for m in (model, half)
        )
        ours, baseline = ((x - wanted).norm() / wanted.norm() for x in (found, theirs))
        assert ours < 1.3 * baseline + 5e-3, f"relative error {ours:.4f}, transformers in bfloat16 has {baseline:.4f}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_give_the_tokens_of_eager_steps(wide, dtype):
    folder, _ = wide
    prompts = prompts_of([5, 33, 80, 12, 64, 3, 7])  # seven decodes in a bucket of eight
    executor = executor_of(folder, dtype=dtype)
    assert all(bucket.graph is not None for bucket in executor._buckets)
    with_graphs = run(executor, prompts)
    for bucket in executor._buckets:
        bucket.graph = None
    assert run(executor, prompts) == with_graphs


@pytest.mark.parametrize("variant", ["mistral-window", "qwen3-alternating-windows", "mixtral", "qwen3-moe"])
def test_windows_and_experts_keep_graphs_equal_to_eager_steps_and_free_of_waits(tmp_path, variant):
    make_checkpoint(tmp_path, variant, **WIDE)
    prompts = prompts_of([5, 33, 80, 12, 64, 3, 7])
    executor = executor_of(tmp_path, dtype="bfloat16")
    with_graphs = run(executor, prompts)
    stepper = Stepper(executor)
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            stepper.step(*((s, stepper.decode(s)) for s in batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for bucket in executor._buckets:
        bucket.graph = None
    assert run(executor, prompts) == with_graphs


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-alternating-windows"])
def test_steps_with_chunks_are_graphs_that_give_the_tokens_of_running_the_same_eagerly(tmp_path, variant):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention of chunks is captured on a Hopper GPU alone")
    make_checkpoint(tmp_path, variant, **WIDE)
    executor = executor_of(tmp_path, dtype="bfloat16")
    mixed = executor._mixed_graphs
    assert mixed is not None and all(step.graph is not None for step in mixed._graphs)
    executor._chunks = None  # nothing is left for the general way
    prompts = prompts_of([5, 33, 80, 12, 64, 3, 7, 150])
    with_graphs = run(executor, prompts, chunk=20)
    for step in mixed._graphs:
        step.graph = None
    assert run(executor, prompts, chunk=20) == with_graphs


def test_submitting_a_step_with_chunks_never_waits_for_the_device(wide):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention of chunks is captured on a Hopper GPU alone")
    folder, _ = wide
    executor = executor_of(folder, dtype="bfloat16")
    stepper = Stepper(executor)
    decodes = [stepper.add(prompt) for prompt in prompts_of([12, 50, 5])]
    long = stepper.add(prompts_of([200])[0])
    stepper.run(decodes, 4)
    stepper.step((long, stepper.prefill(long, 20)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            stepper.step(*((s, stepper.decode(s)) for s in decodes), (long, stepper.prefill(long, 20)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(temperature=0.8)])
def test_steps_submitted_ahead_give_the_tokens_of_steps_one_by_one(wide, sampling):
    folder, _ = wide
    prompts = prompts_of([12, 50, 5])
    executor = executor_of(folder, dtype="bfloat16")
    expected = run(executor, prompts, sampling=sampling)
    stepper = Stepper(executor)
    batch = [stepper.add(prompt, sampling, seed=i) for i, prompt in enumerate(prompts)]
    outputs: dict[int, list[int]] = {s.slot: [] for s in batch}
    for step in range(TOKENS):
        works = tuple(stepper.prefill(s) if not s.computed else stepper.decode(s) for s in batch)
        if step:  # in the order of `Stepper.run`, as spans of our decode attention depend on it
            works = works[::-1]
        executor.submit(StepPlan(step, works, tuple(stepper.inits)))
        stepper.inits = []
        for _ in range(1 if step else 0):
            for slot, token in executor.collect().tokens.items():
                outputs[slot].append(token)
    for slot, token in executor.collect().tokens.items():
        outputs[slot].append(token)
    assert list(outputs.values()) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8),
        SamplingParams(top_p=0.9, top_k=40, min_p=0.01),
        SamplingParams(bad_words=((3,), (4, 5))),
        SamplingParams(allowed_token_ids=(3, 4, 5)),
    ],
)
def test_submitting_a_decode_never_waits_for_the_device(wide, sampling):
    folder, _ = wide
    executor = executor_of(folder, dtype="bfloat16")
    stepper = Stepper(executor)
    batch = [stepper.add(prompt, sampling) for prompt in prompts_of([12, 50, 5])]
    stepper.run(batch, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(8):
            executor.submit(StepPlan(step, tuple(stepper.decode(s) for s in batch)))
            executor.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8),
        SamplingParams(top_p=0.9, top_k=40, min_tokens=9),
        SamplingParams(bad_words=((3,), (4, 5))),
        SamplingParams(allowed_token_ids=(3, 4, 5)),
    ],
)
def test_whoever_comes_is_given_to_the_device_without_waiting_for_it(wide, sampling):
    """A sequence that takes its slot beside decodes: nothing that is written for it may wait for the step under way."""
    folder, _ = wide
    executor = executor_of(folder, dtype="bfloat16")
    stepper = Stepper(executor)
    first, second, *others = prompts_of([12, 50, 5, 30])
    batch = [stepper.add(first, sampling), stepper.add(second, sampling, stop_ids=(3,))]
    stepper.run(batch, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for prompt in others:
            came = stepper.add(prompt, sampling, stop_ids=(3,))
            stepper.step(*((s, stepper.decode(s)) for s in batch), (came, stepper.prefill(came)))
            batch.append(came)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_hit_gives_the_tokens_of_computing_it(wide, dtype):
    folder, _ = wide
    executor = executor_of(folder, dtype=dtype)
    stepper = Stepper(executor)
    (prompt,) = prompts_of([70])
    first = stepper.add(prompt)
    stepper.run([first], TOKENS)
    again = stepper.add(prompt, shared=tuple(first.blocks[:4]))
    stepper.run([again], TOKENS)
    assert again.output == first.output


def test_sampling_with_filters_penalties_and_seeds_runs_beside_greedy_rows(llama):
    folder, model = llama
    executor = executor_of(folder)
    prompts = prompts_of([20, 31, 8, 14, 9])
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.9, top_p=0.8, top_k=30),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, min_tokens=5),
        SamplingParams(temperature=0.9, bad_words=((3,), (4, 5), (6, 7, 8))),
        SamplingParams(temperature=0.9, allowed_token_ids=(3, 4, 5)),
    ]

    def outputs(which: list[int]) -> dict[int, list[int]]:
        stepper = Stepper(executor)
        batch = {i: stepper.add(prompts[i], kinds[i], seed=i) for i in which}
        stepper.run(list(batch.values()), TOKENS, chunk=9)
        return {i: s.output for i, s in batch.items()}

    together = outputs([0, 1, 2, 3, 4])
    assert together[0] == generate(model, prompts[0], TOKENS)
    assert {i: outputs([i])[i] for i in range(5)} == together


def test_scores_equal_transformers_log_softmax(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    (prompt,) = prompts_of([90])
    scored = stepper.add(prompt, SamplingParams(logprobs=2))
    while len(scored.scores) < len(prompt) - 1:
        stepper.step((scored, stepper.prefill(scored, 32, score=True)))
    expected = logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([s.logprob for s in scored.scores]), expected, rtol=1e-3, atol=1e-3)
    values, _ = logprobs(model, prompt)[:-1].topk(2)
    rivals = torch.tensor([[value for _, value in s.top] for s in scored.scores])
    torch.testing.assert_close(rivals, values, rtol=1e-3, atol=1e-3)


def test_the_first_steps_compile_nothing(wide, monkeypatch):
    """Neither long ones, which no graph holds, nor those that sample: a server's first requests have deadlines too."""
    import importlib
    import pkgutil

    import triton
    import xgrammar
    from xgrammar.kernels import apply_token_bitmask_inplace_triton

    import superinfer.kernels

    names = pkgutil.iter_modules(superinfer.kernels.__path__, "superinfer.kernels.")
    for module in [*(importlib.import_module(found.name) for found in names), apply_token_bitmask_inplace_triton]:
        for value in vars(module).values():
            if isinstance(value, triton.runtime.JITFunction):
                value.device_caches.clear()  # what other tests have compiled
    folder, _ = wide
    executor = executor_of(folder, dtype="bfloat16", max_batch_tokens=4096)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    stepper = Stepper(executor)
    ways = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.7, top_p=0.9, logprobs=3),
        SamplingParams(temperature=0.7, repetition_penalty=1.2, min_tokens=3),
    ]
    batch = [
        stepper.add(prompt, ways[i % len(ways)], stop_ids=(1,), seed=i, room=16)
        for i, prompt in enumerate(prompts_of([236] * 12))
    ]
    first, *others = batch
    stepper.step((first, stepper.prefill(first)))
    stepper.step((first, stepper.decode(first)), *((s, stepper.prefill(s, 20)) for s in others))
    rest = [(s, stepper.prefill(s)) for s in others]
    assert sum(work.length for _, work in rest) > executor.captured_tokens  # a long step, of prompts that go on
    stepper.step((first, stepper.decode(first)), *rest)
    stepper.run(batch, 6)
    for sequence in batch:
        stepper.remove(sequence)
    again = [stepper.add(prompt, room=16) for prompt in prompts_of([230] * 12)]
    stepper.step(*((s, stepper.prefill(s)) for s in again))  # and of prompts that begin
    vocab = executor.limits.vocab_size
    for rows in (1, 5, 16, 48):
        bitmask = xgrammar.allocate_token_bitmask(rows, vocab).cuda()
        chosen = torch.arange(rows, dtype=torch.int32, device="cuda")
        xgrammar.apply_token_bitmask_inplace(torch.zeros(rows, vocab, device="cuda"), bitmask)
        xgrammar.apply_token_bitmask_inplace(torch.zeros(2 * rows, vocab, device="cuda"), bitmask, indices=chosen)
    assert compiled == []


def test_the_pool_fills_the_memory_that_is_left(wide):
    folder, _ = wide
    executor = executor_of(folder, dtype="bfloat16", kv_tokens=None, max_batch_size=4)
    free, total = torch.cuda.mem_get_info()
    executor.close()
    assert 0.02 * total < free < 0.25 * total
