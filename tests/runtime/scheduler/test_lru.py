"""Policy `lru` with a second tier: first tokens come sooner, and turning it on costs nothing, whatever the link."""

from __future__ import annotations

import random

import pytest

from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.kv.link_profile import LinkProfile
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job

LLAMA = shape_of("llama-3-8b")
POOL = 48_000  # tokens: some 50 of these sequences


def overload(seed: int, prompts: tuple[int, int], outputs: tuple[int, int], rate: float) -> list[Job]:
    """300 requests, faster than they can be served: so many that it matters little whose answer ends last."""
    rng, jobs, at = random.Random(seed), [], 0.0
    for number in range(300):
        at += rng.expovariate(rate)
        length = rng.randrange(*prompts)
        jobs.append(Job(at, length, rng.randrange(*outputs), (-1 - number,), length))
    return jobs


def serve(jobs: list[Job], hardware: str, gb_s: float | None, dram: int) -> SimResult:
    """gb_s: each way, of a slower link than the hardware's."""
    profile = profile_of(hardware)
    if gb_s is not None:
        profile = profile._replace(link_in=gb_s * 1e9, link_out=gb_s * 1e9, link_duplex=1.8 * gb_s * 1e9)
    config = SimConfig(
        policy="lru", kv_tokens=POOL, dram_tokens=dram, max_batch_size=128, max_batch_tokens=2048, depth=2
    )
    return simulate(jobs, profile, LLAMA, config)


SHORT, LONG = ((200, 1200), (100, 300), 60.0), ((20, 600), (50, 800), 60.0)


@pytest.mark.parametrize(
    ("hardware", "seed", "prompts", "outputs", "rate"),
    [
        ("h200-pcie5", 0, *SHORT),
        pytest.param("h100-pcie5", 1, *SHORT, marks=pytest.mark.slow),
        pytest.param("h200-pcie5", 1, *LONG, marks=pytest.mark.slow),
        ("h100-pcie5", 0, *LONG),
    ],
)
def test_an_overload_is_served_as_fast_with_the_second_tier_as_without(hardware, seed, prompts, outputs, rate):
    jobs = overload(seed, prompts, outputs, rate)
    without = serve(jobs, hardware, None, 0)
    for gb_s in (None, 3.0, 0.5):
        with_it = serve(jobs, hardware, gb_s, 4 * POOL)
        assert with_it.tokens_per_s >= 0.98 * without.tokens_per_s, f"at {gb_s} GB/s"


def test_first_tokens_come_sooner_where_the_link_is_fast_and_rotations_are_few_where_it_is_not():
    jobs = overload(0, *SHORT)
    without, fast, slow = (serve(jobs, "h200-pcie5", *tier) for tier in ((None, 0), (None, 4 * POOL), (0.5, 4 * POOL)))
    assert fast.ttft.p50 < 0.9 * without.ttft.p50
    assert 5 * slow.moved.rotations_out < fast.moved.rotations_out


def test_who_must_give_its_blocks_up_is_moved_where_that_is_quicker_than_computing_anew():
    for bytes_per_s, is_moved in ((50e9, True), (0.5e9, False)):
        link = LinkProfile.symmetric("a link", 2 << 20, bytes_per_s)
        kv = DuplexCache(200, 400, 16, link=link)
        rotation = build_scheduler("fcfs", kv, SchedulerLimits(4, 64, 1600))._rotation
        table = kv.open("")
        kv.allocate(table, 100)
        assert rotation.worth_parking(table, 1600), "what is not known is tried"
        rotation.cost.token_s = 25e-6  # 40,000 tokens/s: 100 blocks are computed in 40 ms
        assert rotation.worth_parking(table, 1600) is is_moved
