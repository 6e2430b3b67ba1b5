"""Layers that look back a limited way: the CPU executor, and the CUDA executor's host side, against transformers."""

from __future__ import annotations

import pytest
from checkpoints import generate, make_checkpoint, prompts_of
from stepper import Stepper

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.models.loader import load_model

TOKENS = 16
VARIANTS = ["mistral-window", "qwen2-upper-layers-windowed", "qwen3-alternating-windows"]


def executor_of(folder):
    config = EngineConfig(model=str(folder), device="cpu", page_size=4, max_batch_size=8, kv_tokens=1024)
    executor = build_executor(config)
    executor.cache.fill_(float("nan"))
    return executor


@pytest.mark.parametrize("variant", [*VARIANTS, "mixtral-tied-window", "qwen3-moe-window"])
def test_a_prefix_hit_longer_and_shorter_than_the_window_changes_nothing(tmp_path, variant):
    model = make_checkpoint(tmp_path, variant)
    stepper = Stepper(executor_of(tmp_path))
    prefix, tail, stranger = prompts_of([32, 9, 21], seed=4)
    first, other = stepper.add(prefix), stepper.add(stranger)
    stepper.run([first, other], 5, chunk=10)
    hits = [stepper.add(prefix + tail, shared=tuple(first.blocks[:blocks])) for blocks in (8, 1)]
    stepper.run([other, *hits], TOKENS, chunk=6)
    assert [hit.output for hit in hits] == [generate(model, prefix + tail, TOKENS)] * 2
    assert other.output == generate(model, stranger, TOKENS)


def test_nothing_outside_the_window_is_read(tmp_path):
    """Blocks that every layer's window has left may hold anything: here NaN, as a read would show."""
    model = make_checkpoint(tmp_path, "mistral-window")
    stepper = Stepper(executor_of(tmp_path))
    (prompt,) = prompts_of([60], seed=4)
    sequence = stepper.add(prompt)
    while sequence.computed < 48:
        stepper.step((sequence, stepper.prefill(sequence, 16)))
    stepper.executor.cache[sequence.blocks[:9]] = float("nan")  # positions 0 to 35; position 48 looks back to 38
    stepper.run([sequence], TOKENS, chunk=5)
    assert sequence.output == generate(model, prompt, TOKENS)


def test_the_oracle_sees_the_window(tmp_path):
    """These tests could not fail if transformers answered alike with and without."""
    model = make_checkpoint(tmp_path, "mistral-window")
    executor = executor_of(tmp_path)
    executor._assembler._windows = (None,) * 3
    stepper = Stepper(executor)
    (prompt,) = prompts_of([40], seed=4)
    sequence = stepper.add(prompt)
    stepper.run([sequence], TOKENS)
    assert sequence.output != generate(model, prompt, TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cuda_executor_attends_by_layer(tmp_path, variant, monkeypatch):
    """In mixed batches, with the reference attention; its Triton twin is compared with it in tests/kernels."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    from plain_kernels import use_plain_kernels

    from superinfer.kernels.paged import AttentionByLayer, TorchAttention
    from superinfer.runtime.engine.cuda_attention import StepAttention
    from superinfer.runtime.engine.cuda_executor import CudaExecutor

    use_plain_kernels(monkeypatch)
    oracle = make_checkpoint(tmp_path, variant)
    model = load_model(tmp_path)
    config = model.config

    def attention(_=None) -> AttentionByLayer:
        return AttentionByLayer(config.windows, lambda window: TorchAttention(config.head_dim**-0.5, window))

    limits = ExecutorLimits(64, 4, 4, 128, config.vocab_size)
    executor = CudaExecutor(
        model, limits, StepAttention(attention, attention()), max_batch_tokens=128, model_name="", path="", graphs=False
    )
    stepper = Stepper(executor)
    prompts = prompts_of([3, 30], seed=4)
    batch = [stepper.add(prompt, room=TOKENS) for prompt in prompts]
    stepper.run(batch, 8, chunk=7)
    assert [s.output for s in batch] == [generate(oracle, prompt, 8) for prompt in prompts]
