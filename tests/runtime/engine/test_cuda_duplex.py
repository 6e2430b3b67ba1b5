"""The CUDA executor with its second tier, two steps ahead, on a double: exact through rotations and failing copies."""

from __future__ import annotations

import math
import time
from collections import deque

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from checkpoints import generate, make_checkpoint, prompts_that_share
from plain_kernels import use_plain_kernels
from stream_double import LateSubmitter, StreamDouble

from superinfer.kernels.paged import TorchAttention
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.kv.copy_batches import Places
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.kv.duplex_cuda import CudaDuplex
from superinfer.runtime.models.loader import load_model
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.plan import SlotWork, StepPlan
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence

TOKENS, PAGE, BLOCKS = 10, 4, 20


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    use_plain_kernels(monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = make_checkpoint(folder)
    prompts = prompts_that_share(4, 5)
    return folder, prompts, [generate(model, prompt, TOKENS) for prompt in prompts]


class ChunkAttention(TorchAttention):
    """Notes how many tokens each chunk that it plans for has, and of which sequences' step."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.lengths: list[int] = []

    def plan(self, batch) -> None:
        self.lengths += torch.diff(batch.host_qo_indptr).tolist()
        super().plan(batch)


class Rig:
    """A CudaExecutor over two tiers; `device` and `duplex` may be spoiled."""

    def __init__(self, folder, num_dram: int = 300, lazy: float = 0.8, seed: int = 0) -> None:
        model = load_model(folder)
        limits = ExecutorLimits(BLOCKS, PAGE, 4, BLOCKS * PAGE, model.config.vocab_size)
        scale = model.config.head_dim**-0.5
        self.chunk_attention = ChunkAttention(scale)
        self.executor = CudaExecutor(
            model,
            limits,
            StepAttention(lambda _: TorchAttention(scale), self.chunk_attention),
            max_batch_tokens=32,
            model_name="",
            path="",
            graphs=False,
        )
        cache = self.executor.cache
        cache[:BLOCKS] = float("nan")  # no read of what nobody wrote or loaded goes unnoticed
        self.dram = torch.full((num_dram, *cache.shape[1:]), float("nan"))
        self.device = StreamDouble(seed, lazy=lazy, eager_compute=True)
        self.submitter = LateSubmitter(seed, 0.5)
        places = Places(cache.data_ptr(), self.dram.data_ptr(), cache[0].nbytes, 50)
        self.duplex = CudaDuplex(self.device, places, submitter=self.submitter)
        self.duplex._arranger._most = 3
        self.executor.add_tier(self.duplex, TierLimits(num_dram, cache[0].nbytes))
        self.kv = build_cache(BLOCKS, num_dram, PAGE)
        self.scheduler = build_scheduler("lru", self.kv, SchedulerLimits(4, 32, BLOCKS * PAGE))
        self.scheduler.quantum = self.scheduler.headroom = 0
        self.scheduler.worth, self.scheduler.idle_share = 0.0, math.inf  # whatever it costs
        self.lost: set[int] = set()

    def serve(self, prompts) -> list[list[int]]:
        """Greedy tokens of each prompt, planning one step ahead of what is collected."""
        for id, prompt in enumerate(prompts):
            greedy = SamplingParams(temperature=0)
            self.scheduler.add(Sequence(id=id, prompt=prompt, max_tokens=TOKENS, arrival=0.0, sampling=greedy))
        outputs: list[list[int]] = [[] for _ in prompts]
        ahead: deque[int] = deque()
        for turn in range(3000):
            plan = self.scheduler.plan(turn * 0.01)
            if plan is not None:
                self.executor.submit(plan)
                ahead.append(plan.step)
            if ahead and (plan is None or len(ahead) == self.executor.depth):
                self.collect(ahead.popleft(), turn * 0.01, outputs)
            elif plan is None:
                return outputs
        raise AssertionError("the scheduler does not come to an end")

    def collect(self, step: int, now: float, outputs: list[list[int]]) -> None:
        """Commit a step, or do as the engine does with one that failed."""
        try:
            result = self.executor.collect()
        except RuntimeError:
            self.lost |= {sequence.id for sequence in self.scheduler.abort(step, now)}
            return
        for update in self.scheduler.commit(result, now):
            outputs[update.sequence.id] += update.token_ids


def test_tokens_equal_transformers_when_every_step_may_rotate(llama):
    folder, prompts, expected = llama
    rig = Rig(folder)
    assert rig.serve(prompts) == expected
    counts = rig.scheduler.counts()
    assert counts.tiers.totals.rotations_out > 5 and counts.preemptions == 0
    assert counts.tiers.link.in_s > 0 and counts.tiers.link.out_s > 0
    rig.executor.close()


def test_a_sequence_that_comes_back_decodes_and_makes_no_prefill_step(llama):
    """A step with prefill chunks costs milliseconds more than one of decodes: an overload would pay that each time."""
    folder, prompts, expected = llama
    rig = Rig(folder)
    assert rig.serve(prompts) == expected
    assert rig.scheduler.counts().tiers.totals.rotations_in > 5
    assert sum(rig.chunk_attention.lengths) <= sum(map(len, prompts)) and 1 not in rig.chunk_attention.lengths
    rig.executor.close()


def test_copies_that_fail_cost_time_and_no_token(llama):
    folder, prompts, expected = llama
    rig = Rig(folder)
    rig.device.fails = 0.15
    rig.scheduler.quantum = 2
    assert rig.serve(prompts) == expected
    assert rig.scheduler.counts().tiers.totals.failed > 2


def test_a_step_that_fails_has_started_its_copies_and_later_results_report_them(llama):
    folder, prompts, expected = llama
    rig = Rig(folder, lazy=0.9)
    attention, failed = rig.executor._split, []

    def fails_beside_copies(places, calls):
        if not failed and len(rig.duplex._under_way[1]) > 2:
            failed.append(rig.kv.num_pending)
            raise RuntimeError("planted failure")
        return attention(places, calls)

    rig.executor._split = fails_beside_copies
    outputs = rig.serve(prompts)
    assert failed and 0 < len(rig.lost) < len(prompts)
    for id, wanted in enumerate(expected):
        assert id in rig.lost or outputs[id] == wanted
    assert rig.kv.num_pending == 0, "every copy was reported"


def test_an_empty_plan_waits_for_the_copies_it_names(llama):
    rig = Rig(llama[0], lazy=1.0)
    rig.executor.cache[3] = 7.0
    table = rig.kv.open("")
    rig.kv.allocate(table, 4)
    rig.kv.park(table, 16)
    copies = rig.kv.take_copies()
    rig.executor.submit(StepPlan(1, (), copies=copies, waits=tuple(copy.id for copy in copies)))
    assert sorted(rig.executor.collect().copied) == [copy.id for copy in copies]
    place = next((copy.dram for copy in copies if copy.hbm == 3), None)
    assert place is None or bool((rig.dram[place] == 7.0).all())


@pytest.mark.parametrize("fails", [False, True])
def test_copies_that_no_step_waits_for_are_submitted_by_the_thread_once_the_step_is(llama, fails):
    rig = Rig(llama[0], lazy=0.5)
    threaded = CudaDuplex(rig.device, rig.duplex._places)
    rig.executor.add_tier(threaded, rig.executor.tier)
    table = rig.kv.open("")
    rig.kv.allocate(table, 4)
    rig.kv.park(table, 16)
    work = (SlotWork(99, 0, 1, (1,), (0,), True),) if fails else ()
    rig.executor.submit(StepPlan(1, work, copies=rig.kv.take_copies()))
    until = time.monotonic() + 10
    while threaded._submitter.done < threaded._jobs and time.monotonic() < until:
        time.sleep(0.001)
    assert threaded._submitter.done == threaded._jobs > 0
    if fails:
        with pytest.raises(IndexError):
            rig.executor.collect()
    threaded.close()
    assert len(threaded.report()[0]) == 4


def test_work_that_does_not_wait_changes_tokens(llama):
    folder, prompts, expected = llama
    rig = Rig(folder)
    rig.duplex.wait = lambda ids: None
    assert rig.serve(prompts) != expected
