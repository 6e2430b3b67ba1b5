"""Logits that are no numbers on the CUDA executor's way, two steps ahead: its host side on the CPU, without graphs.

What draws on a GPU alone, `kernels/drawing.py`, is compared in tests/kernels; all together run in tests/gpu.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from overflowing_checkpoint import SPOILS
from plain_kernels import use_plain_kernels
from transformers import AutoTokenizer

from superinfer.kernels.paged import TorchAttention
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.cuda_mixed import CapturedChunks
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.sampling_state import SamplingState
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.models.loader import load_model
from superinfer.runtime.protocol import Grammar, SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

PAGE, BLOCKS, TOKENS = 4, 200, 6
WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "drawn": dict(temperature=0.9),
    "filtered": dict(temperature=0.9, top_p=0.9),
    "logprobs": dict(temperature=0, logprobs=2),
    "penalized": dict(temperature=0, repetition_penalty=1.2),
    "constrained": dict(temperature=0, grammar=Grammar(kind="regex", source="[a-z~]{30}")),
}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    use_plain_kernels(monkeypatch)


class Serving:
    """A CUDA executor and its scheduler, a step ahead of what is collected."""

    def __init__(self, folder, most_chunks: int = 0) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load_model(folder)
        limits = ExecutorLimits(BLOCKS, PAGE, 8, 256, model.config.vocab_size)
        scale = model.config.head_dim**-0.5
        captured = CapturedChunks(lambda rows, indices: TorchAttention(scale), most_chunks) if most_chunks else None
        attention = StepAttention(lambda _: TorchAttention(scale), TorchAttention(scale), None, captured)
        self.executor = CudaExecutor(
            model, limits, attention, max_batch_tokens=32, model_name="", path=str(folder), graphs=False
        )
        self.kv = KVCache(BLOCKS, PAGE)
        self.scheduler = build_scheduler("fcfs", self.kv, SchedulerLimits(8, 32, 256))
        self.scheduler.least_cohort = 1
        self.failed: list[Sequence] = []

    def add(self, id: int, text: str, tokens: int = TOKENS, score_start: int | None = None, **how: Any) -> Sequence:
        params = SamplingParams(max_tokens=tokens or None, **how)
        if params.grammar is not None:
            self.executor.grammars.request(params.grammar).result(60)
        sequence = Sequence(
            id=id, prompt=self.tokenizer.encode(text), arrival=0.0, max_tokens=tokens, sampling=params, seed=11,
            score_start=score_start,
        )  # fmt: skip
        self.scheduler.add(sequence)
        return sequence

    def run(self) -> None:
        ahead: deque[int] = deque()
        for turn in range(1000):
            now = turn * 0.01
            plan = self.scheduler.plan(now)
            if plan is not None:
                self.executor.submit(plan)
                ahead.append(plan.step)
            if ahead and (plan is None or len(ahead) == self.executor.depth):
                ahead.popleft()
                self.failed += self.scheduler.commit(self.executor.collect(), now).not_finite
            elif plan is None:
                return
        raise AssertionError("the scheduler does not come to an end")


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt :].tolist()


@pytest.fixture(params=[0, 3], ids=["launched", "as for graphs"])
def most_chunks(request) -> int:
    return request.param


@pytest.fixture(params=[True, False], ids=["told by the sampler", "looked for"])
def told(request, monkeypatch) -> bool:
    """On a GPU the sampler does not say whether logits that it changes are numbers."""
    if not request.param:
        sample = SamplingState.sample
        monkeypatch.setattr(
            SamplingState, "sample", lambda self, *given: dataclasses.replace(sample(self, *given), told=None)
        )
    return request.param


@pytest.mark.parametrize("way", WAYS)
def test_who_computes_no_numbers_fails_alone(overflowing_checkpoint, way, most_chunks, told, caplog):
    how = WAYS[way]
    serving = Serving(overflowing_checkpoint, most_chunks)
    spoils = serving.tokenizer.encode(SPOILS)[0]
    right = how | dict(logit_bias=((spoils, -100.0),))
    if way == "greedy":  # as nothing else is: picked by the graph
        right = how
    texts = ["the first", "the second prompt, which is longer than a step takes", "x"]
    alone = []
    for id, text in enumerate(texts):
        sequence = serving.add(id, text, **right)
        serving.run()
        alone.append(output(sequence))
    assert not serving.failed and all(spoils not in tokens for tokens in alone)
    prompted = [serving.add(20, f"bad{SPOILS}", **how), serving.add(21, "y" * 40 + SPOILS + "z" * 20, **how)]
    later = serving.add(22, "all right so far", **how | dict(logit_bias=((spoils, 100.0),)))
    good = [serving.add(30 + id, text, **right) for id, text in enumerate(texts)]
    serving.run()
    assert sorted(sequence.id for sequence in serving.failed) == [20, 21, 22]
    assert [output(sequence) for sequence in prompted] == [[], []] and output(later) == [spoils]
    assert [output(sequence) for sequence in good] == alone
    serving.kv.clear()
    assert serving.kv.num_free == BLOCKS
    assert not caplog.records  # a grammar is not asked about what is no token
    last = serving.executor._last_tokens
    assert int(last.min()) >= 0 and int(last.max()) < serving.executor.limits.vocab_size


def test_scores_that_are_no_numbers_are_found(overflowing_checkpoint, most_chunks):
    serving = Serving(overflowing_checkpoint, most_chunks)
    serving.add(1, "all right and longer than one step takes, this is", 0, score_start=1)
    serving.add(2, "x" * 40 + SPOILS + "y" * 20, 0, score_start=1)
    serving.run()
    assert [sequence.id for sequence in serving.failed] == [2]


def test_a_model_that_is_all_inf_fails_all_and_not_the_engine(overflowing_checkpoint, most_chunks):
    serving = Serving(overflowing_checkpoint, most_chunks)
    with torch.no_grad():
        serving.executor._model.lm_head.weight.fill_(3e38)
    sequences = [serving.add(id, f"prompt {id}", **how) for id, how in enumerate(WAYS.values())]
    serving.run()
    assert {sequence.id for sequence in serving.failed} == {sequence.id for sequence in sequences}
