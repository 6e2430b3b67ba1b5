"""The second tier on a GPU: bits, order beside running graphs, what is refused, and a long run that leaks nothing."""

from __future__ import annotations

import math
import random
import time
from collections import deque

import pytest
import torch
from checkpoints import generate, make_checkpoint, prompts_that_share
from stepper import Stepper

from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine import cuda_tier
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.cuda_tier import PinnedDuplex, device_link
from superinfer.runtime.engine.model_executor import build_executor
from superinfer.runtime.kv.copies import NO_COPIES, BlockCopy, Copies
from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.cuda_driver import CudaDriver
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.kv.link_measure import measure_link
from superinfer.runtime.kv.pinned import PinnedPool
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import StepPlan
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

GREEDY = SamplingParams(temperature=0)
TOKENS = 16
SHAPE = (4, 2, 16, 2, 64)  # of a block: layers, key and value, page, heads, head dim: 32 KiB in bfloat16


class Pools:
    """Random blocks on the GPU, a pinned pool, and a body between them."""

    def __init__(self, blocks: int, dram: int, *, batched: bool = True, shape=SHAPE) -> None:
        bits = torch.randint(-(2**15), 2**15, (blocks, *shape), dtype=torch.int16, device="cuda")
        self.hbm = bits.view(torch.bfloat16)  # any pattern, NaNs and denormals too
        torch.cuda.synchronize()
        self.driver = CudaDriver(torch.cuda.current_stream().cuda_stream, batched=batched)
        self.pool = PinnedPool(
            dram,
            self.hbm[0].nbytes,
            register=self.driver.register,
            unregister=self.driver.unregister,
            piece_bytes=1 << 22,
        )
        assert self.pool.num_blocks == dram, self.pool.shortfall
        self.places = Places(self.hbm.data_ptr(), self.pool.address, self.hbm[0].nbytes, self.pool.piece_blocks)
        self.duplex = PinnedDuplex(self.driver, self.places, self.pool)

    def bits(self) -> torch.Tensor:
        return self.hbm.view(torch.int16)

    def finish(self, ids) -> tuple[list[int], list[int]]:
        self.duplex.wait(ids)
        torch.cuda.synchronize()
        return self.duplex.report()[:2]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (32, 2, 16, 8, 128)], ids=["32KiB", "2MiB"])
def test_scattered_blocks_that_went_out_and_came_back_elsewhere_are_bit_exact(batched, shape):
    pools = Pools(120, 130, batched=batched, shape=shape)
    before = pools.bits().clone()
    rng = random.Random(1)
    out, back, there = (rng.sample(range(n), 60) for n in (120, 120, 130))
    copies = [BlockCopy(1 + i, True, out[i], there[i]) for i in range(60)]
    copies += [BlockCopy(61 + i, False, back[i], there[i], _after(i, back[i], out)) for i in range(60)]
    pools.duplex.start(Copies.of(copies))
    copied, failed = pools.finish(range(1, 121))
    assert sorted(copied) == list(range(1, 121)) and not failed
    expected = before.clone()
    expected[back] = before[out]
    assert torch.equal(pools.bits(), expected)
    pools.duplex.close()


def _after(i: int, place: int, out: list[int]) -> tuple[int, ...]:
    return tuple(sorted({1 + i} | ({1 + out.index(place)} if place in out else set())))


def test_the_batched_copy_is_what_this_driver_has():
    torch.zeros(1, device="cuda")
    assert CudaDriver().is_batched, "CUDA 12.8 and later have it"


def test_work_waits_for_what_it_needs_without_the_host_waiting():
    """2 GiB come in behind a second of other work; a kernel that waits for the last block reads it whole, and the host
    has gone on long before."""
    pools = Pools(1100, 1100, shape=(32, 2, 16, 8, 128))
    pools.duplex.start(Copies.of(BlockCopy(i, True, i, i) for i in range(1000)))
    pools.finish(range(1000))
    want = pools.bits()[:1000].clone()
    assert bool(pools.bits()[:1000].eq(want).all())  # loads its kernels, which may wait for the device
    pools.bits()[:1000] = 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # cycles
        pools.duplex.start(Copies.of(BlockCopy(1000 + i, False, i, i) for i in range(1000)), [1999])
        pools.duplex.wait(range(1000, 2000))
        same = pools.bits()[:1000].eq(want).all()
        under_way = not pools.driver.reached(pools.duplex._under_way[0][-1].end)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    use = pools.duplex.report()[2]
    pools.duplex.close()
    assert bool(same) and under_way
    assert use.stall_s > 0.5 * use.in_s, "the work waited for nearly all of it"


def test_the_link_is_measured_and_named():
    pools = Pools(600, 600, shape=(32, 2, 16, 8, 128))
    kind = device_link(pools.driver, torch.device("cuda", torch.cuda.current_device()))
    link = measure_link(pools.driver, pools.places, 600, 600, kind)
    print(link.line())
    assert min(link.in_alone, link.out_alone, link.in_both, link.out_both) > 1e9
    pools.duplex.close()


# ---------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = make_checkpoint(folder)
    prompts = prompts_that_share(8, 10)
    return folder, prompts, [generate(model, prompt, TOKENS) for prompt in prompts]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A head size that FlashInfer has, for half precision."""
    folder = tmp_path_factory.mktemp("wide")
    make_checkpoint(
        folder,
        "llama-head-128",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return folder


def executor_of(folder, **settings) -> CudaExecutor:
    """HBM holds about two of the sequences."""
    given = {"page_size": 8, "max_batch_size": 4, "max_batch_tokens": 64, "kv_tokens": 224, "dram_tokens": 4000}
    given = {**given, "dtype": "float32", "max_model_len": 200, **settings}
    executor = build_executor(EngineConfig(model=str(folder), device="cuda", **given))
    assert isinstance(executor, CudaExecutor)
    return executor


class Server:
    """The engine's loop without the door: plans one step ahead, rotates whenever it can."""

    def __init__(self, executor: CudaExecutor, quantum: int = 0) -> None:
        self.executor = executor
        limits, tier = executor.limits, executor.tier
        assert tier is not None
        self.kv = build_cache(limits.num_blocks, tier.num_blocks, limits.page_size, link=tier.link)
        self.scheduler = build_scheduler("lru", self.kv, SchedulerLimits(4, 64, limits.max_model_len))
        self.scheduler.quantum = quantum
        self.scheduler.worth, self.scheduler.idle_share = 0.0, math.inf  # whatever it costs
        executor.cache[: limits.num_blocks] = float("nan")  # no read of what nobody wrote or loaded goes unnoticed
        torch.cuda.synchronize()
        self.outputs: dict[int, list[int]] = {}
        self.ahead: deque[int] = deque()
        self.steps = 0

    def add(self, id: int, prompt: list[int], max_tokens: int = TOKENS) -> None:
        self.outputs[id] = []
        self.scheduler.add(Sequence(id=id, prompt=prompt, max_tokens=max_tokens, arrival=0.0, sampling=GREEDY))

    def step(self) -> bool:
        self.steps += 1
        now = self.steps * 0.01
        plan = self.scheduler.plan(now)
        if plan is not None:
            self.executor.submit(plan)
            self.ahead.append(plan.step)
        if self.ahead and (plan is None or len(self.ahead) == self.executor.depth):
            self.ahead.popleft()
            for update in self.scheduler.commit(self.executor.collect(), now):
                self.outputs[update.sequence.id] += update.token_ids
            return True
        return plan is not None

    def run(self, limit: int = 50_000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def serve(self, prompts: list[list[int]]) -> list[list[int]]:
        for id, prompt in enumerate(prompts):
            self.add(id, prompt)
        self.run()
        return [self.outputs[id] for id in range(len(prompts))]


def test_float32_tokens_equal_transformers_when_every_step_may_rotate_beside_graphs(llama):
    folder, prompts, expected = llama
    executor = executor_of(folder)
    server = Server(executor)
    assert server.serve(prompts) == expected
    counts = server.scheduler.counts()
    assert counts.tiers.totals.rotations_out > 20 and counts.preemptions == 0
    assert counts.tiers.totals.failed == 0 and counts.tiers.link.in_s > 0
    executor.close()


def test_a_rotation_beside_decodes_of_the_same_batch_changes_no_bfloat16_token(wide):
    """Three sequences decode, a fourth rests. Out and back in between, or not: the same batches, so the same bits."""
    rng = random.Random(2)
    prompts = [[rng.randrange(211) for _ in range(n)] for n in (70, 33, 50, 90)]

    def run(rotate: bool) -> list[list[int]]:
        executor = executor_of(wide, dtype="bfloat16", kv_tokens=2048, page_size=16, max_batch_tokens=256)
        stepper = Stepper(executor)
        batch = [stepper.add(prompt) for prompt in prompts]
        for sequence in batch:
            stepper.step((sequence, stepper.prefill(sequence)))
        resting, busy = batch[3], batch[:3]
        blocks = resting.blocks[: -(-len(prompts[3]) // 16)]
        outs = [BlockCopy(1 + i, True, block, 7 * i % 100) for i, block in enumerate(blocks)]
        ins = [BlockCopy(50 + i, False, block, 7 * i % 100, (1 + i,)) for i, block in enumerate(blocks)]
        reported: list[int] = []
        for turn in range(12):
            copies, waits = NO_COPIES, ()
            if rotate and turn == 2:
                copies = Copies.of(outs)
            if rotate and turn == 6:
                give_up = time.monotonic() + 20
                while not {copy.id for copy in outs} <= set(reported) and time.monotonic() < give_up:
                    reported += executor._duplex.report()[0]
                executor.cache[blocks] = float("nan")  # behind the copies out: their report has been seen
                copies = Copies.of(ins)
            if rotate and turn == 8:
                waits = tuple(copy.id for copy in ins)
            members = batch if turn >= 8 else busy
            works = tuple(stepper.decode(sequence) for sequence in members)
            executor.submit(StepPlan(100 + turn, works, copies=copies, waits=waits))
            result = executor.collect()
            reported += result.copied
            assert turn < 6 or not rotate or {copy.id for copy in outs} <= set(reported)
            assert not waits or set(waits) <= set(reported)
            for sequence in members:
                sequence.output.append(result.tokens[sequence.slot])
        executor.close()
        return [sequence.output for sequence in batch]

    assert run(rotate=True) == run(rotate=False)


def test_copies_that_fail_cost_time_and_no_token(llama):
    """One in seven of what the device is told to copy, each of which is a block or several; all of them are counted."""
    folder, prompts, expected = llama
    executor = executor_of(folder)
    driver = executor._duplex._device
    copy, tried, spoilt = driver.copy, 0, 0

    def sometimes(stream, dsts, srcs, sizes):
        nonlocal tried, spoilt
        lost = [at for at in range(len(dsts)) if (tried + at) % 7 == 6]
        keep = [at for at in range(len(dsts)) if at not in lost]
        tried, spoilt = tried + len(dsts), spoilt + len(lost)
        if keep:
            assert not copy(stream, dsts[keep].copy(), srcs[keep].copy(), sizes[keep].copy())
        return lost

    driver.copy = sometimes
    server = Server(executor, quantum=2)
    assert server.serve(prompts) == expected
    assert server.scheduler.counts().tiers.totals.failed >= spoilt > 3, f"{spoilt} of {tried} copies were spoilt"
    executor.close()


def test_a_full_dram_means_recomputing_and_no_other_token(llama):
    folder, prompts, expected = llama
    server = Server(executor_of(folder, dram_tokens=48, kv_tokens=136, max_model_len=120))
    assert server.serve(prompts) == expected
    assert server.scheduler.counts().preemptions > 0


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_refusal_to_pin_leaves_a_smaller_tier_or_none_and_the_engine_serves(llama, monkeypatch, pieces):
    """CUDA itself refuses: the piece's memory is pinned already."""
    folder, prompts, expected = llama
    seen = []

    class Twice(PinnedPool):
        def __init__(self, *given, register, **named) -> None:
            def again(address: int, size: int) -> None:
                seen.append(address)
                register(address, size)
                if len(seen) > pieces:
                    try:
                        register(address, size)
                    finally:
                        register.__self__.unregister(address)

            super().__init__(*given, register=again, **{**named, "piece_bytes": 1 << 18})

    monkeypatch.setattr(cuda_tier, "PinnedPool", Twice)
    executor = executor_of(folder)
    assert len(seen) == pieces + 1
    if pieces:
        assert 0 < executor.tier.num_blocks < 500
        assert Server(executor).serve(prompts) == expected
    else:
        assert executor.tier is None
        stepper = Stepper(executor)
        sequence = stepper.add(prompts[0])
        stepper.run([sequence], TOKENS)
        assert sequence.output == expected[0]
    executor.close()


def test_ten_thousand_steps_of_rotation_leak_nothing(llama):
    folder, prompts, expected = llama
    executor = executor_of(folder)
    server = Server(executor)
    rng, id = random.Random(7), 0
    asked: dict[int, int] = {}
    while server.steps < 10_000:
        while server.scheduler.counts().waiting < 4:
            asked[id] = rng.randrange(len(prompts))
            server.add(id, prompts[asked[id]])
            id += 1
        server.step()
    server.run()
    for id, which in asked.items():
        assert server.outputs[id] == expected[which]
    kv = server.kv
    assert kv.num_pending == 0 and kv.totals.rotations_out > 500
    kv.clear()
    assert (kv.num_free, kv.num_dram_free, kv.num_dram_pinned) == (kv.num_blocks, kv.num_dram, 0)
    assert not any(executor._duplex._arranger._seqs) and len(executor._duplex._events) < 1000
    executor.close()
