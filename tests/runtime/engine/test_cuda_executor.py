"""The CUDA executor's host side on the CPU, without graphs; in mixed batches Triton's kernels run in its interpreter.

What a GPU adds, FlashInfer, graphs and real overlap, is tested in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from checkpoints import generate, logprobs, make_checkpoint, prompts_of
from plain_kernels import use_plain_kernels
from stepper import Stepper

from superinfer.errors import ModelLoadError
from superinfer.kernels.paged import PagedBatch, TorchAttention, choose_attention
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_batch import decode_buckets
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.cuda_mixed import CapturedChunks
from superinfer.runtime.engine.cuda_rehearsal import rehearse
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.models.loader import load_model
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

TOKENS = 10


class TorchFresh(TorchAttention):
    """Over the step's own keys and values, as if they were a cache of one token a block."""

    def plan(self, batch: PagedBatch) -> None:
        starts = batch.host_qo_indptr
        rows, ends = torch.arange(int(starts[-1]), dtype=torch.int32), torch.ones_like(batch.host_last_page_len)
        super().plan(
            dataclasses.replace(
                batch, kv_indices=rows, host_kv_indptr=starts, last_page_len=ends, host_last_page_len=ends
            )
        )

    def run(self, q, kv, layer=0, out=None):
        return super().run(q, kv.transpose(0, 1)[:, :, None], layer, out)


def executor_of(
    folder, page: int = 4, slots: int = 6, blocks: int = 200, most_chunks: int = 0, fresh: bool = False
) -> CudaExecutor:
    """most_chunks: that steps made for graphs take, whose kernels are run here as they would be captured; 0: none.
    fresh: prompts that begin are attended apart."""
    model = load_model(folder)
    limits = ExecutorLimits(blocks, page, slots, 256, model.config.vocab_size)
    scale = model.config.head_dim**-0.5
    captured = CapturedChunks(lambda rows, indices: TorchAttention(scale), most_chunks)
    # TorchAttention's Triton twin is compared with it in tests/kernels.
    attention = StepAttention(
        lambda _: TorchAttention(scale),
        TorchAttention(scale),
        TorchFresh(scale) if fresh else None,
        captured if most_chunks else None,
    )
    return CudaExecutor(
        model, limits, attention, max_batch_tokens=512, model_name=str(folder), path=str(folder), graphs=False
    )


@pytest.fixture
def plain_kernels(monkeypatch):
    use_plain_kernels(monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_checkpoint(folder)


def check_mixed_batches(folder, model, most_chunks, arrays=False):
    """Prompts of one, two and three chunks: steps of decodes beside two chunks, beside one, and alone."""
    executor = executor_of(folder, most_chunks=most_chunks)
    if most_chunks == 3:  # then no step is left for the general way
        executor._chunks = None
    prompts, tokens = prompts_of([1, 9, 17]), 4
    stepper = Stepper(executor, arrays=arrays)
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, tokens, chunk=7)
    assert [s.output for s in batch] == [generate(model, prompt, tokens) for prompt in prompts]


@pytest.mark.parametrize("most_chunks", [0, 2, 3])
def test_greedy_tokens_equal_transformers_in_mixed_batches(tmp_path, most_chunks):
    model = make_checkpoint(tmp_path, "llama-7-heads-per-kv-head")
    check_mixed_batches(tmp_path, model, most_chunks)


@pytest.mark.parametrize("most_chunks", [0, 2, 3])
@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_greedy_tokens_equal_transformers_for_every_architecture(tmp_path, plain_kernels, variant, most_chunks):
    check_mixed_batches(tmp_path, make_checkpoint(tmp_path, variant), most_chunks)


@pytest.mark.parametrize("variant", ["llama", "llama-7-heads-per-kv-head"])
def test_prompts_that_begin_are_attended_over_what_the_step_itself_made(tmp_path, variant):
    """In the same step as decodes and chunks that go on, and without reading the cache: its blocks are not a number."""
    model = make_checkpoint(tmp_path, variant)
    executor = executor_of(tmp_path, fresh=True)
    executor.cache.fill_(float("nan"))
    stepper = Stepper(executor)
    prompts = prompts_of([9, 17, 1, 30, 3])
    batch = [stepper.add(prompt) for prompt in prompts]
    first, second, third, fourth, fifth = batch
    stepper.step((first, stepper.prefill(first)), (second, stepper.prefill(second, 5)))
    stepper.step((third, stepper.prefill(third)), (second, stepper.prefill(second, 5)), (first, stepper.decode(first)))
    stepper.step((fourth, stepper.prefill(fourth, 20)), (second, stepper.prefill(second)))
    stepper.step((fifth, stepper.prefill(fifth)), (fourth, stepper.prefill(fourth)))
    stepper.run(batch, 6)
    assert [s.output for s in batch] == [generate(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize(
    ("slots", "blocks", "most_chunks", "fresh"), [(6, 200, 0, True), (2, 200, 3, False), (1, 40, 0, False)]
)
def test_a_rehearsed_executor_answers_as_a_fresh_one(llama, plain_kernels, slots, blocks, most_chunks, fresh):
    folder, model = llama
    sampling = SamplingParams(temperature=0.9, top_p=0.8, repetition_penalty=1.2, seed=3)

    def sampled_by(executor):
        stepper = Stepper(executor)
        sequence = stepper.add([5, 6, 7], sampling, seed=3, room=8)
        stepper.run([sequence], 6)
        stepper.remove(sequence)
        return sequence.output

    executor = executor_of(folder, slots=slots, blocks=blocks, most_chunks=most_chunks, fresh=fresh)
    rehearse(executor, 512)
    assert sampled_by(executor) == sampled_by(executor_of(folder, slots=slots, blocks=blocks))
    prompts = prompts_of([1, 9, 17][:slots])
    stepper = Stepper(executor)
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, 4, chunk=7)
    assert [s.output for s in batch] == [generate(model, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize(("slots", "blocks"), [(6, 1), (2, 2), (1, 1), (3, 200)])
def test_a_rehearsal_fits_every_pool(llama, plain_kernels, slots, blocks):
    rehearse(executor_of(llama[0], slots=slots, blocks=blocks), 512)


def test_a_rehearsal_without_memory_for_a_step_says_what_to_lower():
    class Full:
        limits, device = ExecutorLimits(200, 4, 6, 256, 211), "cpu"

        def submit(self, plan):
            pass

        def collect(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(
        ModelLoadError, match=r"max_batch_tokens=512 .* 2.00 GiB.*; lower max_batch_tokens or kv_tokens"
    ):
        rehearse(Full(), 512)


@pytest.mark.parametrize("most_chunks", [0, 3])
def test_decodes_may_come_as_arrays_beside_others_and_chunks(llama, plain_kernels, most_chunks):
    check_mixed_batches(*llama, most_chunks, arrays=True)


def test_steps_submitted_ahead_continue_from_tokens_the_host_has_not_seen(llama, plain_kernels):
    folder, model = llama
    executor = executor_of(folder)
    prompts = prompts_of([12, 5])
    stepper = Stepper(executor)
    batch = [stepper.add(prompt) for prompt in prompts]
    for _ in range(TOKENS):
        works = tuple(stepper.prefill(s) if not s.computed else stepper.decode(s) for s in batch)
        executor.submit(StepPlan(stepper.steps, works, tuple(stepper.inits)))
        stepper.inits, stepper.steps = [], stepper.steps + 1
        if stepper.steps > 1:
            for s, token in zip(batch, executor.collect().tokens.values(), strict=True):
                s.output.append(token)
    for s, token in zip(batch, executor.collect().tokens.values(), strict=True):
        s.output.append(token)
    assert [s.output for s in batch] == [generate(model, prompt, TOKENS) for prompt in prompts]


def test_limits_hold_behind_tokens_the_host_has_not_seen(llama, plain_kernels):
    folder, model = llama
    (prompt,) = prompts_of([12])
    greedy = generate(model, prompt, TOKENS)
    kinds = [
        SamplingParams(temperature=0, bad_words=((greedy[0], greedy[1]), (greedy[0],) * 9)),
        SamplingParams(temperature=0, bad_words=((greedy[0],),)),
        SamplingParams(temperature=0, allowed_token_ids=(3, 4, 5)),
        SamplingParams(temperature=0),
    ]
    stepped = Stepper(executor_of(folder))
    alone = [stepped.add(prompt, kind) for kind in kinds]
    stepped.run(alone, TOKENS)
    executor = executor_of(folder)
    ahead = Stepper(executor)
    batch = [ahead.add(prompt, kind) for kind in kinds]
    for _ in range(TOKENS):
        works = tuple(ahead.prefill(s) if not s.computed else ahead.decode(s) for s in batch)
        executor.submit(StepPlan(ahead.steps, works, tuple(ahead.inits)))
        ahead.inits, ahead.steps = [], ahead.steps + 1
    for _ in range(TOKENS):
        for s, token in zip(batch, executor.collect().tokens.values(), strict=True):
            s.output.append(token)
    assert [s.output for s in batch] == [s.output for s in alone]
    two, one, few, free = (s.output for s in batch)
    assert two[0] == greedy[0] and two[1] != greedy[1] and one[0] != greedy[0] and free == greedy
    assert (greedy[0], greedy[1]) not in itertools.pairwise(two)
    assert greedy[0] not in one and set(few) <= {3, 4, 5}


def test_a_seeded_draw_is_the_same_in_any_batch_and_logprobs_come_back(llama, plain_kernels):
    folder, model = llama
    sampling = SamplingParams(temperature=0.9, top_p=0.9, logprobs=2)
    prompts = prompts_of([13, 20])
    alone = Stepper(executor_of(folder))
    single = alone.add(prompts[0], sampling, seed=5)
    alone.run([single], TOKENS)
    together = Stepper(executor_of(folder))
    batch = [together.add(prompts[1]), together.add(prompts[0], sampling, seed=5)]
    together.run(batch, TOKENS, chunk=6)
    assert batch[1].output == single.output and not batch[0].logprobs
    expected = logprobs(model, prompts[0] + single.output)[len(prompts[0]) - 1 :]
    for found, row in zip(single.logprobs, expected, strict=False):
        assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
        assert [i for i, _ in found.top] == row.topk(2).indices.tolist()


def test_a_sequence_that_lacks_one_token_draws_as_if_it_had_never_left(llama, plain_kernels):
    folder, _ = llama
    sampling = SamplingParams(temperature=0.9, top_p=0.9)
    (prompt,) = prompts_of([13])
    stepper = Stepper(executor_of(folder))
    first = stepper.add(prompt, sampling, seed=5)
    stepper.run([first], TOKENS)
    back = stepper.add(prompt, sampling, seed=5, output=first.output[:4], shared=tuple(first.blocks[:4]))
    stepper.step((back, stepper.prefill(back)))
    stepper.run([back], TOKENS - 4)
    assert back.output == first.output[4:]
    broken = stepper.add([999])
    with pytest.raises(IndexError, match=r"999\.\.999 are not within the vocabulary of 211"):
        stepper.step((broken, stepper.prefill(broken)))


def test_scores_equal_transformers_log_softmax(llama, plain_kernels):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    prompt, other = prompts_of([25, 8])
    scored, stranger = stepper.add(prompt, SamplingParams(logprobs=2)), stepper.add(other)
    while len(scored.scores) < len(prompt) - 1:
        busy = stepper.prefill(stranger) if not stranger.computed else stepper.decode(stranger)
        stepper.step((scored, stepper.prefill(scored, 7, score=True)), (stranger, busy))
    expected = logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([s.logprob for s in scored.scores]), expected, rtol=1e-4, atol=1e-4)
    values, ids = logprobs(model, prompt)[:-1].topk(2)
    assert [[token_id for token_id, _ in s.top] for s in scored.scores] == ids.tolist()
    rivals = torch.tensor([[value for _, value in s.top] for s in scored.scores])
    torch.testing.assert_close(rivals, values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most_chunks", [0, 3])
def test_the_last_layer_feeds_forward_only_what_is_asked_for(llama, plain_kernels, most_chunks):
    folder, _ = llama
    executor = executor_of(folder, most_chunks=most_chunks)
    rows: list[int] = []
    executor._model.model.layers[-1].mlp.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    long, other = prompts_of([60, 30])
    stepper = Stepper(executor)
    first, second = stepper.add(long), stepper.add(other)
    stepper.step((first, stepper.prefill(first, 40)))  # goes on: nobody asks for anything
    stepper.step((first, stepper.prefill(first)), (second, stepper.prefill(second, 20)))  # one ends
    assert rows == [1 if not most_chunks else 8]  # graphs of a step's end have 8 rows at least


def test_shared_prefix_blocks_are_read_not_recomputed(llama, plain_kernels):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    (prompt,) = prompts_of([22])
    first = stepper.add(prompt)
    stepper.run([first], 3)
    second = stepper.add([*prompt[:16], 7, 8, 9], shared=tuple(first.blocks[:4]))
    stepper.run([second], TOKENS)
    assert second.output == generate(model, [*prompt[:16], 7, 8, 9], TOKENS)


def test_a_step_that_fails_is_told_by_its_collect_and_leaves_the_executor_usable(llama, plain_kernels):
    folder, model = llama
    executor = executor_of(folder)
    stepper = Stepper(executor)
    prompt, broken = prompts_of([15, 4])
    sequence = stepper.add(prompt)
    stepper.run([sequence], 5)
    bad = stepper.add(broken)
    with pytest.raises(IndexError, match="vocabulary of 211"):
        stepper.step((bad, SlotWork(bad.slot, 0, 4, (1, 2, 3, 99999), tuple(bad.blocks[:1]), sample=True)))
    stepper.remove(bad)
    stepper.run([sequence], TOKENS)
    assert sequence.output == generate(model, prompt, TOKENS)


def test_blocks_that_came_with_a_failed_decode_are_there_for_the_next(llama, plain_kernels, monkeypatch):
    folder, model = llama
    executor = executor_of(folder)
    stepper = Stepper(executor)
    (prompt,) = prompts_of([6])
    sequence = stepper.add(prompt)
    stepper.step((sequence, stepper.prefill(sequence)))

    def fail(batch):
        raise RuntimeError("no plan")

    while len(sequence.output) < TOKENS:
        work = stepper.decode(sequence)
        with monkeypatch.context() as patched:
            patched.setattr(executor._buckets[0].attention, "plan", fail)
            with pytest.raises(RuntimeError, match="no plan"):
                stepper.step((sequence, work))
        stepper.step((sequence, SlotWork(work.slot, work.start, 1, sample=True)))
    assert sequence.output == generate(model, prompt, TOKENS)


def test_more_new_blocks_than_a_step_has_room_for_reach_the_device(llama, plain_kernels):
    """Of 2 slots there is room for 8 changes with a step; two prompts of 60 tokens bring 30 blocks of 4."""
    folder, model = llama
    stepper = Stepper(executor_of(folder, slots=2))
    prompts = prompts_of([60, 58])
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, 3)
    assert [s.output for s in batch] == [generate(model, prompt, 3) for prompt in prompts]


def test_work_beyond_a_slots_blocks_is_refused(llama):
    executor = executor_of(llama[0])
    init = SlotInit(0, SamplingParams(), 0, (1, 2, 3, 4, 5))
    executor.submit(StepPlan(0, (SlotWork(0, 0, 5, (1, 2, 3, 4, 5), (7,)),), (init,)))
    with pytest.raises(ValueError, match="slot 0 computes up to position 5 with only 1 blocks of 4"):
        executor.collect()
    executor.submit(StepPlan(1, (SlotWork(0, 4, 1, sample=True),)))
    with pytest.raises(ValueError, match="slot 0 computes up to position 5"):
        executor.collect()
    assert not executor.cache.any()


def test_an_empty_plan_gives_an_empty_result(llama):
    executor = executor_of(llama[0])
    executor.submit(StepPlan(7, ()))
    result = executor.collect()
    assert (result.step, result.tokens, result.scores) == (7, {}, {})


def test_buckets_end_with_the_largest_batch():
    assert decode_buckets(1) == [1]
    assert decode_buckets(6) == [1, 2, 4, 6]
    assert decode_buckets(256)[-2:] == [248, 256] and decode_buckets(300)[-2:] == [288, 300]
    for most in (1, 3, 8, 100, 700):
        sizes = np.array(decode_buckets(most))
        assert sizes[-1] == most and (np.diff(sizes) > 0).all()


def test_the_table_says_why(monkeypatch, tmp_path):
    bfloat16 = torch.bfloat16
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_attention((9, 0), bfloat16, 128)[:2] == ("triton", "triton")
    assert "not installed" in choose_attention((9, 0), bfloat16, 128).why

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "flashinfer" else None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "finds no nvcc" in choose_attention((9, 0), bfloat16, 128).why
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert choose_attention((9, 0), bfloat16, 128)[:2] == ("flashinfer-fa2", "flashinfer-fa3")
    assert "needs cuda-bindings" in choose_attention((9, 0), bfloat16, 128).why
    there = {"flashinfer", "cuda", "cuda.bindings"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    assert choose_attention((9, 0), bfloat16, 128, shared=8)[:2] == ("hopper", "flashinfer-fa3")
    for sizes in (dict(shared=9), dict(page=24), dict(head_dim=256)):
        choice = choose_attention(**dict(capability=(9, 0), dtype=bfloat16, head_dim=128) | sizes)
        assert choice[:2] == ("flashinfer-fa2", "flashinfer-fa3") and str(*sizes.values()) in choice.why
    assert choose_attention((8, 0), bfloat16, 128)[:2] == ("flashinfer-fa2", "flashinfer-fa2")
    for capability, dtype, head_dim, word in (
        ((9, 0), torch.float32, 128, "half precision"),
        ((9, 0), bfloat16, 80, "head_dim=80"),
        ((7, 5), torch.float16, 128, "compute capability 8.0"),
    ):
        choice = choose_attention(capability, dtype, head_dim)
        assert choice.decode == choice.prefill == "triton" and word in choice.why
