"""The scheduler, the model executor and the CPU body in one process: exact through rotations and failing copies."""

from __future__ import annotations

import math
import random

import pytest
from checkpoints import generate, make_checkpoint, prompts_that_share

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

TOKENS = 24
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = make_checkpoint(folder)
    prompts = prompts_that_share(4, 8)
    return folder, prompts, [generate(model, prompt, TOKENS) for prompt in prompts]


def serve(folder, prompts, *, dram_tokens=2000, link_gbps=None, spoil=None, **scheduling):
    """Tokens of each prompt, and the scheduler afterwards. HBM holds about two of the sequences."""
    config = EngineConfig(
        model=str(folder), page_size=4, max_batch_size=4, kv_tokens=112, dram_tokens=dram_tokens, link_gbps=link_gbps
    )
    executor = build_executor(config)
    executor.cache.fill_(float("nan"))  # no read of what nobody wrote or loaded goes unnoticed
    executor.duplex.dram.fill_(float("nan"))
    limits = executor.limits
    kv = build_cache(limits.num_blocks, executor.tier.num_blocks, limits.page_size)
    scheduler = build_scheduler("lru", kv, SchedulerLimits(limits.num_slots, 32, limits.max_model_len))
    scheduler.quantum = scheduler.headroom = 0
    scheduler.worth, scheduler.idle_share = 0.0, math.inf  # whatever it costs
    scheduler._rotation.max_waits = scheduling.get("max_waits", 8)
    if spoil is not None:
        spoil(executor, kv)
    for id, prompt in enumerate(prompts):
        scheduler.add(Sequence(id=id, prompt=prompt, max_tokens=TOKENS, arrival=0.0, sampling=GREEDY))
    outputs = [[] for _ in prompts]
    for turn in range(3000):
        plan = scheduler.plan(turn * 0.01)
        if plan is None:
            break
        executor.submit(plan)
        for update in scheduler.commit(executor.collect(), turn * 0.01):
            outputs[update.sequence.id] += update.token_ids
    return outputs, scheduler


@pytest.mark.parametrize("link_gbps", [None, 0.02])
@pytest.mark.parametrize("max_waits", [0, 8, 1000])
def test_tokens_equal_transformers_when_every_step_may_rotate(llama, link_gbps, max_waits):
    folder, prompts, expected = llama
    outputs, scheduler = serve(folder, prompts, link_gbps=link_gbps, max_waits=max_waits)
    assert outputs == expected
    counts = scheduler.counts()
    assert counts.tiers.totals.rotations_out > 40
    assert counts.preemptions == 0


def test_copies_that_fail_cost_time_and_no_token(llama):
    folder, prompts, expected = llama
    rng = random.Random(1)

    def spoil(executor, kv):
        move = executor.duplex.copy_block

        def sometimes(copy):
            if rng.random() < 0.1:
                raise RuntimeError("planted failure")
            move(copy)

        executor.duplex.copy_block = sometimes

    outputs, scheduler = serve(folder, prompts, link_gbps=0.02, spoil=spoil)
    assert outputs == expected
    assert scheduler.counts().tiers.totals.failed > 10
    assert scheduler.counts().preemptions > 0


def test_a_full_dram_means_recomputing_and_no_other_token(llama):
    folder, prompts, expected = llama
    outputs, scheduler = serve(folder, prompts, dram_tokens=24)
    assert outputs == expected
    assert scheduler.counts().preemptions > 0


def _skip_waits(executor, kv):
    executor.duplex.wait = lambda ids: None


def _skip_copies_in(executor, kv):
    move = executor.duplex.copy_block
    executor.duplex.copy_block = lambda copy: move(copy) if copy.out else None


def _free_early(executor, kv):
    kv.copies.on_hbm = type("Forgetful", (list,), {"__setitem__": lambda *_: None})(kv.copies.on_hbm)


@pytest.mark.parametrize("fault", [_skip_waits, _skip_copies_in, _free_early])
def test_planted_faults_change_tokens(llama, fault):
    folder, prompts, expected = llama
    outputs, _ = serve(folder, prompts, link_gbps=0.002, spoil=fault)
    assert outputs != expected
