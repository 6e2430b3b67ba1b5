"""What is foreseen of requests to come, and how far off that may be."""

from __future__ import annotations

import numpy as np
import pytest

from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost, StepRates
from superinfer.runtime.scheduler.residents import Residents
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.scheduler.slices import finish
from superinfer.runtime.scheduler.standing import Standing, _deviation, turn, turn_of_one
from superinfer.runtime.scheduler.triage import Demand
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.slo import SLO


@pytest.mark.parametrize("rate", [4, 40])
def test_the_deviation_is_that_of_the_work_of_a_poisson_number_of_requests(rate):
    rng = np.random.default_rng(0)
    kinds = rng.lognormal(0.0, 1.0, 400)
    sums = np.array([rng.choice(kinds, rng.poisson(rate)).sum() for _ in range(4000)])
    assert _deviation(kinds, rate) == pytest.approx(float(sums.std() / sums.mean()), rel=0.1)


def test_of_those_with_time_the_cheapest_is_next_and_nobody_before_who_has_half_its_time():
    start, cost = np.array([-0.5, 0.2, 0.99, 5.0, 7.9, 8.1, 500.0]), np.array([9.0, 8.0, 0.1, 6.0, 0.5, 0.01, 1e-9])
    turns = turn(start, cost)
    assert turns[:3] == pytest.approx(start[:3])  # pressing: cost is nothing
    assert np.argsort(turns).tolist() == [0, 1, 2, 4, 3, 5, 6]
    assert turns == pytest.approx([turn_of_one(*one) for one in zip(start.tolist(), cost.tolist(), strict=True)])


def test_what_is_learnt_of_lengths_is_told_a_fifth_of_a_second_later_at_the_latest():
    cost = StepCost(StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b")))
    standing = Standing(KVCache(100_000, 16), SchedulerLimits(1024, 8192, 32_768), cost)
    sequence = Sequence(id=0, prompt=[1] * 20, max_tokens=2000, arrival=0.0, slo=SLO(ttft=10.0, tbt=0.1))
    standing.roster.add(sequence, 20)

    def left(now: float) -> float:
        finish(standing.look(Residents([]), 1e-3, now))
        return float(standing.roster.left[sequence.row])

    for _ in range(100):
        standing.lengths.learn((), 100)
    assert left(1.0) == pytest.approx(100.0, rel=0.1)
    for _ in range(256):
        standing.lengths.learn((), 1000)
    assert left(1.1) == pytest.approx(100.0, rel=0.1)
    assert left(1.2) == pytest.approx(1000.0, rel=0.1)


def test_the_fewer_came_the_more_is_reserved_of_what_is_expected():
    def foreseen(every_s: float, prompt: int) -> Demand:
        cost = StepCost(StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b")))
        standing = Standing(KVCache(100_000, 16), SchedulerLimits(1024, 8192, 32_768), cost)
        for at in np.arange(0.0, 5.0, every_s).tolist():
            sequence = Sequence(id=0, prompt=[1], max_tokens=1, arrival=at, slo=SLO(ttft=1.0, tbt=0.1))
            standing.forecast.saw(sequence, prompt)
        nobody = Demand(*(np.zeros(0) for _ in Demand._fields[:-2]))
        return standing._with_foreseen(nobody, 5.0)

    few, many = foreseen(1.0, 4_000), foreseen(0.05, 200)
    assert few.expected is not None and many.expected is not None
    assert few.expected[0] == pytest.approx(1.0 / (1.0 + 5**-0.5), rel=0.1)  # 4 or 5 came
    assert many.expected[0] == pytest.approx(1.0 / (1.0 + 100**-0.5), rel=0.02)
    assert float(few.prefill_s.sum() / (few.prefill_s * few.expected).sum()) > 1.4


def test_decodes_of_who_is_foreseen_read_the_whole_prompt_though_little_of_it_is_to_be_computed():
    def foreseen(cached: int) -> Demand:
        cost = StepCost(StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b")))
        standing = Standing(KVCache(100_000, 16), SchedulerLimits(1024, 8192, 32_768), cost)
        for at in np.arange(0.0, 5.0, 0.1).tolist():
            sequence = Sequence(id=0, prompt=[1] * 2000, max_tokens=200, arrival=at, slo=SLO(ttft=1.0, tbt=0.1))
            standing.forecast.saw(sequence, 2000 - cached)
        nobody = Demand(*(np.zeros(0) for _ in Demand._fields[:-2]))
        return standing._with_foreseen(nobody, 5.0)

    fresh, cached = foreseen(0), foreseen(1900)
    assert (cached.token_s * cached.expected).sum() == pytest.approx((fresh.token_s * fresh.expected).sum())
    assert cached.held == pytest.approx(fresh.held)
    assert cached.prefill_s.sum() < fresh.prefill_s.sum() / 5


def test_of_who_is_foreseen_memory_is_asked_only_for_what_nobody_holds_yet():
    def foreseen(common: int) -> Demand:
        cost = StepCost(StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b")))
        standing = Standing(KVCache(1_000, 16), SchedulerLimits(1024, 8192, 32_768), cost)
        for at in np.arange(0.0, 5.0, 0.1).tolist():
            sequence = Sequence(id=0, prompt=[1] * 2000, max_tokens=2, arrival=at, slo=SLO(ttft=1.0, tbt=0.1))
            standing.forecast.saw(sequence, 2000 - common, common)
        nobody = Demand(*(np.zeros(0) for _ in Demand._fields[:-2]))
        return standing._with_foreseen(nobody, 5.0)

    assert foreseen(0).held == pytest.approx(2000 / 16_000, rel=0.01)
    assert foreseen(1600).held == pytest.approx(400 / 16_000, rel=0.01)


@pytest.mark.parametrize(("prompt", "in_time"), [(2_000, True), (100_000, False)])
def test_the_end_of_a_prompt_attends_to_all_that_is_cached_before_it(prompt, in_time):
    """2,000 tokens take an H100 46 ms by themselves, and 220 behind 98,000 others."""
    cost = StepCost(StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b")))
    standing = Standing(KVCache(10_000, 16), SchedulerLimits(1024, 8192, 131_072), cost)
    sequence = Sequence(id=0, prompt=[1] * prompt, max_tokens=2, arrival=0.0, slo=SLO(ttft=0.2, tbt=0.1))
    standing.roster.add(sequence, 2_000)
    finish(standing.look(Residents([]), 0.0, 0.0))
    assert bool(standing.roster.kept[sequence.row]) is in_time
