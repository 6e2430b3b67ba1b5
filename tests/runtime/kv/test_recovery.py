"""After an overload the cache has nothing left of it: first tokens and throughput are as before within 5 s.

In simulated time, with the real scheduler and KV bookkeeping; `benchmarks/sim_recovery.py` does it at full size. And on
the real CPU engine, beside another that was never overloaded.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.kv.cache import BlockTable
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

BEFORE_S, OVERLOAD_S, AFTER_S = 2.0, 5.0, 30.0
END = BEFORE_S + OVERLOAD_S
CALM, MANY = 6.0, 40.0  # requests/s; the machine serves some 14
HBM, DRAM = 12_288, 49_152  # tokens
WITHIN_S = 5.0
MOVED = 60  # rotations and preemptions that make an overload of the real engine


def arrivals(overload: bool) -> list[Job]:
    """Calm, overload (or calm) and calm."""
    jobs: list[Job] = []
    parts = ((0.0, BEFORE_S, CALM), (BEFORE_S, OVERLOAD_S, MANY if overload else CALM), (END, AFTER_S, CALM))
    for seed, (begin, seconds, rate) in enumerate(parts):
        made = make_jobs("sharegpt", rate=rate, duration=seconds, seed=seed, slos=[(1.0, SLO(ttft=1.0, tbt=0.1))])
        jobs += [
            job._replace(at=begin + job.at, blocks=(-1 - len(jobs) - at,))
            for at, job in enumerate(made)
            if job.prompt_length + job.output_length < HBM // 8
        ]
    return jobs


def serve(policy: str, dram: int, *, overload: bool, leave: bool) -> tuple[SimResult, list[Sequence]]:
    """leave: the clients of what is under way leave when the overload ends."""
    done: list[Sequence] = []
    config = SimConfig(
        policy=policy, kv_tokens=HBM, dram_tokens=dram, max_batch_size=128, leave_at=(END,) if leave else ()
    )  # fmt: skip
    result = simulate(arrivals(overload), profile_of("h100-pcie5"), shape_of("llama-3-8b"), config, done.append)
    return result, done


def first_tokens(done: list[Sequence], begin: float, end: float) -> list[float]:
    """TTFT of those that arrived in between, in order of arrival."""
    between = sorted((s for s in done if begin <= s.arrival < end), key=lambda s: s.arrival)
    return [sequence.timeline.first or float("inf") for sequence in between]


def tokens_between(result: SimResult, begin: float, end: float) -> int:
    """Put out from one sample to another."""
    counts = [sample.tokens for sample in result.residency if begin <= sample.at < end]
    return counts[-1] - counts[0]


def worked_off(result: SimResult) -> float:
    """When nobody waits any more."""
    return next(sample.at for sample in result.residency if sample.at >= END and sample.waiting + sample.rotated == 0)


def one(policy: str, dram: int, *, slow: bool):
    name = f"{policy}, {'two tiers' if dram else 'one tier'}"
    return pytest.param((policy, dram), id=name, marks=[pytest.mark.slow] if slow else [])


CASES = [
    one(policy, dram, slow=not dram or policy == "fcfs") for policy in ("fcfs", "lru", "rota") for dram in (0, DRAM)
]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[str, int]:
    """Policy and DRAM tokens."""
    return request.param


@pytest.fixture(scope="module")
def calm(case) -> tuple[SimResult, list[Sequence]]:
    """The same arrivals after END, and no overload before them."""
    return serve(*case, overload=False, leave=False)


def assert_back(run, calm, begin: float, end: float) -> None:
    (result, done), (usual, usually) = run, calm
    now, then = first_tokens(done, begin, end), first_tokens(usually, begin, end)
    assert len(now) == len(then) >= 15
    assert statistics.median(now) <= 1.1 * statistics.median(then) + 2e-3
    assert statistics.quantiles(now, n=10)[-1] <= 1.2 * statistics.quantiles(then, n=10)[-1] + 5e-3
    assert tokens_between(result, begin, end) >= 0.95 * tokens_between(usual, begin, end)


def test_when_the_clients_of_an_overload_leave_all_is_back_within_5_s(case, calm):
    run = serve(*case, overload=True, leave=True)
    assert run[0].given_up > 60, "that was no overload"
    assert_back(run, calm, END + WITHIN_S, END + WITHIN_S + 10.0)


@pytest.mark.slow
def test_what_an_overload_left_is_worked_off_and_then_all_is_back_within_5_s(case, calm):
    run = serve(*case, overload=True, leave=False)
    back = worked_off(run[0]) + WITHIN_S
    assert END + WITHIN_S + 3.0 < back < END + AFTER_S - 5.0, "that was no overload, or it never ends"
    assert_back(run, calm, back, END + AFTER_S)
    assert tokens_between(run[0], END, back - WITHIN_S) >= tokens_between(calm[0], END, back - WITHIN_S)


@pytest.mark.parametrize(
    "tokens", [pytest.param(0, id="one tier", marks=pytest.mark.slow), pytest.param(DRAM, id="two tiers")]
)
def test_calls_that_come_5_s_after_an_overload_do_not_wait_for_what_it_left(tokens):
    result, done = serve("rota", tokens, overload=True, leave=False)
    assert worked_off(result) > END + WITHIN_S
    assert max(first_tokens(done, END + WITHIN_S, END + AFTER_S)) <= 1.0
    assert statistics.median(first_tokens(serve("fcfs", 0, overload=True, leave=False)[1], END, END + 3.0)) > 2.0


@pytest.mark.slow
def test_what_an_overload_leaves_in_the_pool_is_noticed(monkeypatch):
    """Planted: the first who end or leave keep their blocks."""
    calm, release = serve("lru", DRAM, overload=False, leave=False), DuplexCache.release
    kept: list[BlockTable] = []

    def leaks(kv: DuplexCache, table: BlockTable) -> None:
        if len(kept) > 60:
            release(kv, table)
        else:
            kept.append(table)

    monkeypatch.setattr(DuplexCache, "release", leaks)
    run = serve("lru", DRAM, overload=True, leave=True)
    with pytest.raises(AssertionError):
        assert_back(run, calm, END + WITHIN_S, END + WITHIN_S + 10.0)


def ask(client: EngineClient, prompt: list[int], tokens: int, *, leave: bool = False) -> float:
    """Seconds of one request. leave: once its first token is there."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    stream = client.generate(Generate(request_id=new_request_id(), prompt=prompt, sampling=sampling))
    for _ in stream:
        if leave:
            stream.close()
            break
    return time.perf_counter() - began


def overload(client: EngineClient, prompt: Callable[[], list[int]]) -> None:
    """Sixteen at once, five times the pool, every second of them left by its client; until much was moved for it."""
    enough = threading.Event()

    def load(number: int) -> None:
        while not enough.is_set():
            ask(client, prompt(), 60, leave=number % 2 == 0)

    with ThreadPoolExecutor(16) as threads:
        under_way = [threads.submit(load, number) for number in range(16)]
        try:
            until = time.monotonic() + 100
            while (stats := client.stats()).tiers.rotations_out + stats.preemptions < MOVED:
                assert time.monotonic() < until, "that was no overload"
                time.sleep(0.05)
        finally:
            enough.set()
        for one in under_way:
            one.result()


@pytest.mark.slow
@pytest.mark.parametrize("policy_name", ["lru", "rota"])
def test_the_real_engine_is_as_quick_after_an_overload_as_one_without(random_llama, policy_name):
    """Both are asked by turns, so that whatever else the machine does holds up the one as often as the other."""
    rng = random.Random(3)
    sizes = dict(page_size=8, kv_tokens=256, dram_tokens=1024, max_batch_size=8, max_batch_tokens=64)

    def prompt() -> list[int]:
        return [rng.randrange(3, 500) for _ in range(40)]

    config = EngineConfig(model=str(random_llama), policy=policy_name, **sizes)
    with (
        launch_engine(config) as engine,
        launch_engine(config) as other,
        EngineClient(engine.address) as client,
        EngineClient(other.address) as calm,
    ):
        for _ in range(10):
            ask(calm, prompt(), 20)  # whatever is made once
        overload(client, prompt)
        steps, calm_steps = client.stats().steps, calm.stats().steps
        after, usual = zip(*((ask(client, prompt(), 20), ask(calm, prompt(), 20)) for _ in range(40)), strict=True)
        stats, calm_stats = client.stats(), calm.stats()
    assert sum(after) - sum(usual) < WITHIN_S
    assert statistics.median(after) < 1.5 * statistics.median(usual) + 5e-3
    assert stats.steps - steps <= 1.1 * (calm_stats.steps - calm_steps)
    assert (stats.running, stats.waiting, stats.tiers.dram_pinned) == (0, 0, 0)
