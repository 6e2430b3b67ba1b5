"""The cost model: seeded by a datasheet, corrected by what steps took."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.cost import FACTORS, StepCost, StepLoad, StepRates
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of

RATES = StepRates.seed(profile_of("h100-pcie5"), shape_of("llama-3-8b"))


def decode(requests: int, context: int) -> StepLoad:
    return StepLoad(requests, requests, requests * context, 0.0)


def prefill(tokens: int, chunk: int) -> StepLoad:
    return StepLoad(tokens, 0, 0, tokens * (chunk + 1) / 2)


def random_load(rng: np.random.Generator) -> StepLoad:
    """Mixed steps, so that every term is seen apart from the others."""
    decodes = int(rng.integers(0, 257))
    chunk = int(rng.integers(1, 4096)) if rng.random() < 0.5 else 0
    before = int(rng.integers(0, 8192)) if chunk else 0
    return StepLoad(
        max(1, decodes + chunk),
        decodes,
        decodes * int(rng.integers(100, 2000)) + before,
        chunk * (before + chunk / 2),
    )


def took(load: StepLoad, factors: np.ndarray) -> float:
    weights, matmul, *others = np.array(RATES.terms(load)) * factors
    return float(max(weights, matmul) + sum(others))


@pytest.mark.parametrize(
    ("load", "measured_ms"),
    [(decode(1, 609), 6.50), (decode(32, 609), 7.64), (decode(128, 609), 10.61), (decode(256, 609), 15.84)],
)
def test_the_h100_seed_is_within_ten_percent_of_measured_decode_steps(load, measured_ms):
    assert RATES.seconds(load) * 1e3 == pytest.approx(measured_ms, rel=0.1)


@pytest.mark.parametrize(("length", "measured"), [(2048, 42_600), (8000, 38_200)])
def test_the_h100_seed_is_within_five_percent_of_measured_prefill(length, measured):
    assert length / RATES.seconds(prefill(length, length)) == pytest.approx(measured, rel=0.05)


def test_a_mixture_reads_more_experts_the_more_tokens_it_computes():
    rates = StepRates.seed(profile_of("gh200-144"), shape_of("mixtral-8x7b"))
    one, few, many = (rates.terms(decode(n, 0))[0] for n in (1, 4, 64))
    assert one < few < many < rates.dense_s + rates.expert_s + 1e-9
    assert one == pytest.approx(rates.dense_s + rates.expert_s / 4)


def test_the_load_of_a_plan_counts_tokens_context_and_attended_pairs():
    plan = StepPlan(
        1,
        (SlotWork(0, 9, 1), SlotWork(1, 4, 1), SlotWork(2, 8, 3, (1, 2, 3))),
        (SlotInit(0, SamplingParams(), 0, (1,)),),
    )
    assert StepLoad.of(plan) == StepLoad(tokens=5, decodes=2, kv_read=10 + 5 + 8, pairs=9 + 10 + 11)


def test_it_recovers_planted_factors_through_noise():
    rng = np.random.default_rng(0)
    planted = np.array([1.4, 0.8, 1.3, 2.0, 1.5, 0.5, 1.0, 1.0])
    cost = StepCost(RATES)
    for _ in range(1500):
        load = random_load(rng)
        cost.observe(load, took(load, planted) * rng.normal(1.0, 0.02))
    assert cost.factors[:4] == pytest.approx(planted[:4], rel=0.1)
    error = cost.error()
    assert error.median < 0.02
    assert error.p90 < 0.05
    assert error.steps == 512
    for load in (decode(200, 1000), prefill(2048, 2048), decode(1, 100)):
        assert cost.seconds(load) == pytest.approx(took(load, planted), rel=0.04)


@pytest.mark.parametrize("name", ["h100-pcie5", "h200-pcie5"])
def test_it_learns_what_launching_chunks_costs_whether_or_not_the_profile_knows(name):
    rng = np.random.default_rng(4)
    seed = StepRates.seed(profile_of(name), shape_of("llama-3-8b"))
    seed = seed._replace(captured=1024)  # both kinds are seen, and long steps are not all noise
    machine, cost = seed._replace(pieces_s=0.002, eager_s=0.006), StepCost(seed)
    before = cost.units()
    assert (before.pieces_s, before.eager_s) == pytest.approx((seed.pieces_s, seed.eager_s))
    for _ in range(2000):
        load = random_load(rng)
        cost.observe(load, machine.seconds(load) * rng.normal(1.0, 0.02))
    units = cost.units()
    assert units.launch_s(units.captured) == pytest.approx(0.002, abs=0.0005)
    assert units.launch_s(units.captured + 1) == pytest.approx(0.006, abs=0.002)
    for load in (prefill(900, 900), prefill(2048, 2048), decode(100, 609)):
        assert cost.seconds(load) == pytest.approx(machine.seconds(load), rel=0.03)


def test_it_follows_a_machine_that_slows_down():
    rng = np.random.default_rng(1)
    cost = StepCost(RATES)
    for factor, steps in ((1.0, 500), (1.5, 1500)):
        for _ in range(steps):
            load = random_load(rng)
            cost.observe(load, RATES.seconds(load) * factor)
    assert cost.seconds(decode(128, 609)) == pytest.approx(1.5 * RATES.seconds(decode(128, 609)), rel=0.05)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.2])
def test_a_machine_that_becomes_slower_or_quicker_at_once_is_known_within_twenty_steps(factor):
    rng = np.random.default_rng(1)
    cost = StepCost(RATES)
    for pace, steps in ((1.0, 500), (factor, 20)):
        for _ in range(steps):
            load = random_load(rng)
            cost.observe(load, RATES.seconds(load) * pace * rng.normal(1.0, 0.02))
    for load in (decode(128, 609), prefill(2048, 2048)):
        assert cost.seconds(load) == pytest.approx(factor * RATES.seconds(load), rel=0.05)


def test_a_few_slow_steps_one_after_another_are_no_slower_machine():
    rng = np.random.default_rng(3)
    cost = StepCost(RATES)
    for number in range(800):
        load = random_load(rng)
        cost.observe(load, RATES.seconds(load) * (5.0 if number % 100 < 8 else rng.normal(1.0, 0.02)))
    assert cost.seconds(decode(128, 609)) == pytest.approx(RATES.seconds(decode(128, 609)), rel=0.1)


def test_a_pause_of_the_host_or_a_compiling_first_step_hardly_moves_it():
    rng = np.random.default_rng(2)
    cost = StepCost(RATES)
    cost.observe(prefill(512, 512), 30.0)
    for _ in range(800):
        load = random_load(rng)
        slow = 20.0 if rng.random() < 0.03 else rng.normal(1.0, 0.02)
        cost.observe(load, RATES.seconds(load) * slow)
    for load in (decode(128, 609), prefill(2048, 2048)):
        assert cost.seconds(load) == pytest.approx(RATES.seconds(load), rel=0.05)


def test_what_is_never_seen_keeps_the_seeds_word():
    cost = StepCost(RATES)
    for at in range(2000):
        cost.observe(decode(1 + at % 200, 609), 1.2 * RATES.seconds(decode(1 + at % 200, 609)))
    names = dict(zip(FACTORS, cost.factors, strict=True))
    assert (names["matmul"], names["attention"]) == (1.0, 1.0)
    assert cost.seconds(decode(100, 609)) == pytest.approx(1.2 * RATES.seconds(decode(100, 609)), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(
    times=st.lists(st.floats(-1.0, 100.0) | st.sampled_from([np.nan, np.inf]), min_size=1, max_size=60),
    seed=st.integers(0, 1000),
)
def test_no_factor_and_no_prediction_is_ever_negative(times, seed):
    rng = np.random.default_rng(seed)
    cost = StepCost(RATES)
    for elapsed in times:
        cost.observe(random_load(rng), elapsed)
        assert (cost.factors >= 0.0).all()
        assert cost.seconds(random_load(rng)) >= 0.0
    assert np.isfinite(cost.factors).all()


def test_before_any_step_the_error_says_that_nothing_was_seen():
    assert StepCost(RATES).error() == (0.0, 0.0, 0)


@pytest.mark.parametrize("forgetting", [0.0, 1.5, -1.0])
def test_a_forgetting_factor_outside_its_range_is_refused(forgetting):
    with pytest.raises(ValueError, match="forgetting"):
        StepCost(RATES, forgetting=forgetting)
