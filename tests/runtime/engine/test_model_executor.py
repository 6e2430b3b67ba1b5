"""The executor against transformers on small random models, driven by plans made by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, generate, logprobs, make_checkpoint, prompts_of
from stepper import Stepper

from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan

TOKENS = 24


def executor_of(folder, **settings):
    settings = {"page_size": 4, "max_batch_size": 8, "kv_tokens": 2048, **settings}
    return build_executor(EngineConfig(model=str(folder), **settings))


def poison(executor) -> None:
    """No read of a cell nobody wrote goes unnoticed."""
    executor.cache.fill_(float("nan"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_checkpoint(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers_for_every_variant(tmp_path, variant):
    model = make_checkpoint(tmp_path, variant)
    executor = executor_of(tmp_path)
    poison(executor)
    prompts = prompts_of([1, 9, 30, 70])
    expected = [generate(model, prompt, TOKENS) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)  # the oracle tells prompts apart

    for chunk in (None, 7):
        stepper = Stepper(executor, seed=chunk or 0)
        batch = [stepper.add(prompt) for prompt in prompts]
        stepper.run(batch, TOKENS, chunk)
        assert [sequence.output for sequence in batch] == expected


@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
def test_pages_and_chunks_of_any_size_change_nothing(llama, page, chunk):
    folder, model = llama
    executor = executor_of(folder, page_size=page)
    poison(executor)
    prompts = prompts_of([50, 17])
    stepper = Stepper(executor)
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, TOKENS, chunk)
    assert [s.output for s in batch] == [generate(model, prompt, TOKENS) for prompt in prompts]


def test_sequences_that_come_and_go_do_not_disturb_each_other(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder, max_batch_size=3))
    poison(stepper.executor)
    prompts = prompts_of([5, 41, 12, 60, 3, 25])
    waiting, running, done = list(prompts), [], []
    while waiting or running:
        if waiting and len(running) < 3:
            running.append((waiting[0], stepper.add(waiting.pop(0))))
        stepper.step(
            *((s, stepper.prefill(s, 11) if s.computed < len(s.known) else stepper.decode(s)) for _, s in running)
        )
        for pair in [pair for pair in running if len(pair[1].output) == TOKENS]:
            running.remove(pair)
            stepper.remove(pair[1])
            done.append(pair)
    assert len(done) == len(prompts)
    for prompt, sequence in done:
        assert sequence.output == generate(model, prompt, TOKENS)


def test_many_decodes_of_unlike_lengths_are_grouped_correctly(llama, monkeypatch):
    """With room for 40 tokens in a group, eight sequences need several, some of one sequence and some of many."""
    folder, model = llama
    executor = executor_of(folder)
    monkeypatch.setattr(executor._assembler, "_group_tokens", 40)
    poison(executor)
    prompts = prompts_of([3, 90, 8, 8, 14, 33, 5, 61])
    stepper = Stepper(executor)
    batch = [stepper.add(prompt) for prompt in prompts]
    stepper.run(batch, TOKENS)
    assert [s.output for s in batch] == [generate(model, prompt, TOKENS) for prompt in prompts]


def test_a_prefix_computed_by_another_sequence_is_used(llama):
    folder, model = llama
    executor = executor_of(folder)
    poison(executor)
    stepper = Stepper(executor)
    prefix, tail_a, tail_b = prompts_of([20, 7, 13])
    first = stepper.add(prefix + tail_a)
    stepper.step((first, stepper.prefill(first)))
    second = stepper.add(prefix + tail_b, shared=tuple(first.blocks[:5]))
    assert second.computed == 20
    stepper.run([first, second], TOKENS, chunk=6)
    assert first.output == generate(model, prefix + tail_a, TOKENS)
    assert second.output == generate(model, prefix + tail_b, TOKENS)


@pytest.mark.parametrize("freed", [True, False])
def test_a_preempted_sequence_continues_from_its_prompt_and_output(llama, freed):
    """Whether the plan names the slot as freed first, or only initialises it anew."""
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    (prompt,) = prompts_of([18])
    sequence = stepper.add(prompt)
    stepper.run([sequence], 9)
    if freed:
        stepper.freed.append(sequence.slot)
    stepper.free = sequence.blocks + stepper.free  # the stranger gets the blocks given up
    (other,) = prompts_of([20], seed=8)
    stranger = stepper.add(other)
    again = stepper.add(prompt, slot=sequence.slot, output=sequence.output)
    stepper.run([again, stranger], TOKENS - 9, chunk=10)
    assert stranger.output == generate(model, other, TOKENS - 9)
    assert sequence.output + again.output == generate(model, prompt, TOKENS)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_scores_equal_transformers_log_softmax(tmp_path, variant, chunk):
    model = make_checkpoint(tmp_path, variant)
    stepper = Stepper(executor_of(tmp_path))
    poison(stepper.executor)
    prompt, other = prompts_of([45, 20])
    scored, stranger = stepper.add(prompt, SamplingParams(logprobs=2)), stepper.add(other)
    while len(scored.scores) < len(prompt) - 1:
        busy = stepper.prefill(stranger) if not stranger.computed else stepper.decode(stranger)
        stepper.step((scored, stepper.prefill(scored, chunk, score=True)), (stranger, busy))
    expected = logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
    assert [s.token_id for s in scored.scores] == prompt[1:]
    torch.testing.assert_close(torch.tensor([s.logprob for s in scored.scores]), expected, rtol=1e-4, atol=1e-4)
    values, ids = logprobs(model, prompt)[:-1].topk(2)
    assert [[token_id for token_id, _ in s.top] for s in scored.scores] == ids.tolist()
    rivals = torch.tensor([[value for _, value in s.top] for s in scored.scores])
    torch.testing.assert_close(rivals, values, rtol=1e-4, atol=1e-4)


def test_the_last_layer_feeds_forward_only_what_is_asked_for(llama):
    folder, _ = llama
    executor = executor_of(folder)
    rows: list[list[int]] = [[], []]
    for seen, layer in zip(rows, (executor._model.model.layers[0], executor._model.model.layers[-1]), strict=True):
        layer.mlp.register_forward_hook(lambda _, given, out, seen=seen: seen.append(len(given[0])))
    prompt, other = prompts_of([20, 30])
    stepper = Stepper(executor)
    first, second = stepper.add(prompt), stepper.add(other)
    stepper.step((first, stepper.prefill(first)))  # ends
    stepper.step((first, stepper.decode(first)), (second, stepper.prefill(second, 16)))  # goes on
    stepper.step((second, stepper.prefill(second, 10, score=True)))  # all but what comes before is judged
    third = stepper.add(prompt)
    stepper.step((third, stepper.prefill(third, 16)))  # nobody asks for anything
    assert rows[0] == [20, 17, 10, 16] and rows[1] == [1, 1, 10]


def test_only_the_last_positions_of_a_chunk_are_scored_when_few_are_asked(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    (prompt,) = prompts_of([12])
    sequence = stepper.add(prompt)
    plan = StepPlan(
        0,
        (SlotWork(sequence.slot, 0, 11, tuple(prompt[:11]), tuple(sequence.blocks[:3]), score=tuple(prompt[8:12])),),
        tuple(stepper.inits),
    )
    stepper.executor.submit(plan)
    scores = stepper.executor.collect().scores[sequence.slot]
    expected = [logprobs(model, prompt)[p - 1, prompt[p]].item() for p in range(8, 12)]
    assert [s.logprob for s in scores] == pytest.approx(expected, abs=1e-4)


def test_logprobs_are_those_of_the_unmodified_distribution(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    prompts = prompts_of([10, 23, 6])
    asked = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3, logprobs=4)
    chosen_only = SamplingParams(temperature=0.0, logprobs=0)
    batch = [stepper.add(prompts[0], asked, seed=1), stepper.add(prompts[1]), stepper.add(prompts[2], chosen_only)]
    stepper.run(batch, 8)
    assert batch[1].logprobs == []
    for sequence, prompt, top in ((batch[0], prompts[0], 4), (batch[2], prompts[2], 0)):
        expected = logprobs(model, prompt + sequence.output)[len(prompt) - 1 :]
        assert [found.token_id for found in sequence.logprobs] == sequence.output
        for found, row in zip(sequence.logprobs, expected, strict=False):
            assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
            assert [i for i, _ in found.top] == row.topk(top).indices.tolist()
            assert [v for _, v in found.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_on_another_slot(llama):
    folder, _ = llama
    prompts = prompts_of([13, 40, 22])
    sampling = SamplingParams(temperature=0.9, top_p=0.95)

    def run(who: list[int], slots: list[int], chunk: int | None = None) -> dict[int, list[int]]:
        stepper = Stepper(executor_of(folder), seed=len(who))
        batch = {i: stepper.add(prompts[i], sampling, 100 + i, slot=s) for i, s in zip(who, slots, strict=True)}
        stepper.run(list(batch.values()), TOKENS, chunk)
        return {i: s.output for i, s in batch.items()}

    alone = {i: run([i], [0])[i] for i in range(3)}
    assert run([0, 1, 2], [5, 2, 7]) == alone
    assert run([2, 1, 0], [0, 1, 2], chunk=9) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 3


def test_a_preempted_sequence_continues_its_random_numbers(llama):
    folder, _ = llama
    (prompt,) = prompts_of([13])
    sampling = SamplingParams(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2)
    stepper = Stepper(executor_of(folder))
    whole, part = stepper.add(prompt, sampling, 5), stepper.add(prompt, sampling, 5)
    stepper.run([whole], TOKENS)
    stepper.run([part], 10)
    stepper.remove(part)
    again = stepper.add(prompt, sampling, 5, output=part.output)
    stepper.run([again], TOKENS - 10)
    assert part.output + again.output == whole.output


def test_a_step_that_fails_leaves_the_executor_usable(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder))
    prompt, broken = prompts_of([15, 4])
    sequence = stepper.add(prompt)
    stepper.run([sequence], 5)
    bad = stepper.add(broken)
    outside = SlotWork(bad.slot, 0, 4, (1, 2, 3, 99999), tuple(bad.blocks[:1]), sample=True)
    with pytest.raises(IndexError):
        stepper.step((bad, outside))
    stepper.remove(bad)
    stepper.run([sequence], TOKENS)
    assert sequence.output == generate(model, prompt, TOKENS)


def test_work_beyond_a_slots_blocks_is_refused_before_it_hits_foreign_kv(llama):
    folder, _ = llama
    executor = executor_of(folder)
    init = SlotInit(0, SamplingParams(), 0, (1, 2, 3, 4, 5))
    executor.submit(StepPlan(0, (SlotWork(0, 0, 5, (1, 2, 3, 4, 5), (7,)),), (init,)))
    with pytest.raises(ValueError, match="slot 0 computes up to position 5 with only 1 blocks of 4"):
        executor.collect()
    executor.submit(StepPlan(1, (SlotWork(0, 0, 1, (1,), (512,)),), (init,)))
    with pytest.raises(ValueError, match=r"not within 0..511"):
        executor.collect()
    assert not executor.cache.any()


def test_an_empty_plan_gives_an_empty_result(llama):
    executor = executor_of(llama[0])
    executor.submit(StepPlan(7, ()))
    result = executor.collect()
    assert (result.step, result.tokens, result.scores) == (7, {}, {})


def test_half_precision_follows_the_float32_distribution(llama):
    folder, model = llama
    stepper = Stepper(executor_of(folder, dtype="bfloat16"))
    (prompt,) = prompts_of([30])
    sequence = stepper.add(prompt, SamplingParams(temperature=0, logprobs=5))
    stepper.step((sequence, stepper.prefill(sequence)))
    expected = logprobs(copy.deepcopy(model).to(torch.bfloat16), prompt)[-1]
    assert sequence.logprobs[0].logprob == pytest.approx(expected[sequence.output[0]].item(), abs=0.3)
    assert stepper.executor.dtype == "bfloat16"


# ------------------------------------------------------------------------------------------------ limits


def test_limits_follow_the_model_the_settings_and_the_pool(llama):
    folder, _ = llama
    limits = executor_of(folder, kv_tokens=1000, page_size=16, max_batch_size=5).limits
    assert limits == (62, 16, 5, 256, 211)
    assert executor_of(folder, kv_tokens=100, page_size=16).limits.max_model_len == 96
    assert executor_of(folder, max_model_len=33).limits.max_model_len == 33
    with pytest.raises(InvalidRequestError, match="max_model_len=257 is more than the 256 positions of this model"):
        executor_of(folder, max_model_len=257)
    assert executor_of(folder, kv_tokens=None, page_size=16, max_batch_size=5).limits.num_blocks == 5 * 256 // 16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from /proc")
def test_pools_take_memory_as_their_blocks_are_used(llama):
    def megabytes() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    before = megabytes()
    executor = executor_of(llama[0], kv_tokens=500_000, dram_tokens=500_000, page_size=16)
    pools = [executor.cache, executor.duplex.dram]
    assert all(pool.nbytes > 300 << 20 for pool in pools) and megabytes() - before < 100
    assert not any(pool[block].any() for pool in pools for block in (0, 9999, -1))
    pools[1][:5000] = 1.0
    assert 40 < megabytes() - before < 150


def test_a_pool_without_room_for_a_block_is_refused(llama):
    with pytest.raises(InvalidRequestError, match="kv_tokens"):
        executor_of(llama[0], kv_tokens=15, page_size=16)


def test_what_a_client_is_told_of_the_model(llama):
    executor = executor_of(llama[0])
    assert (executor.architecture, executor.dtype, executor.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert executor.path == executor.model_name == str(llama[0])
    assert executor.eos_token_ids == ()
