"""Simulated runs: real scheduling in virtual time, reproducible, and judged as in an engine."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from superinfer.embedded import model_path
from superinfer.errors import InvalidRequestError, UnsupportedError
from superinfer.runtime.engine.executor import ExecutorLimits, TierLimits
from superinfer.runtime.kv.copies import BlockCopy, Copies
from superinfer.runtime.kv.link import VirtualLink
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.cost import StepLoad, StepRates
from superinfer.runtime.scheduler.plan import SlotInit, SlotWork, StepPlan
from superinfer.runtime.scheduler.registry import POLICIES
from superinfer.runtime.sim.__main__ import main
from superinfer.runtime.sim.command import parse_slos
from superinfer.runtime.sim.executor import Quirks, SimExecutor
from superinfer.runtime.sim.hardware import PROFILES, profile_of
from superinfer.runtime.sim.report import Point, plot
from superinfer.runtime.sim.result import Passed
from superinfer.runtime.sim.shapes import SHAPES, shape_of
from superinfer.runtime.sim.simulate import HostTimes, SimConfig, kv_room, simulate
from superinfer.runtime.sim.workload import Job, as_turns, lognormal, make_jobs
from superinfer.runtime.slo import SLO

H100, LLAMA = profile_of("h100-pcie5"), shape_of("llama-3-8b")
RATES = StepRates.seed(H100, LLAMA)
WALL = ("plan_ms", "plan_ms_max", "wall_s", "requests_per_wall_s")


def job(at: float, prompt: int, output: int, number: int = 0, slo: SLO | None = None) -> Job:
    return Job(at, prompt, output, (number,), prompt, slo)


def test_one_request_takes_its_prefill_and_then_a_step_for_each_token():
    result = simulate([job(5.0, 1000, 4)], H100, LLAMA, SimConfig())
    prefill = RATES.seconds(StepLoad(1000, 0, 0, 1000 * 1001 / 2))
    decodes = [RATES.seconds(StepLoad(1, 1, 1000 + k, 0.0)) for k in (1, 2, 3)]
    assert result.ttft.p50 == pytest.approx(prefill)
    assert result.tpot.mean == pytest.approx(sum(decodes) / 3)
    assert result.duration == pytest.approx(prefill + sum(decodes))
    assert (result.requests, result.steps, result.preemptions) == (1, 4, 0)
    assert result.tokens_per_s == pytest.approx(4 / result.duration)


def test_with_two_steps_in_flight_time_is_the_same_for_one_request():
    one, two = (simulate([job(0.0, 500, 20)], H100, LLAMA, SimConfig(depth=depth)) for depth in (1, 2))
    assert two.duration == pytest.approx(one.duration)
    assert two.steps == one.steps


def test_a_step_planned_late_has_who_came_meanwhile():
    jobs = [job(0.0, 500, 200), job(0.5001, 500, 20, 1)]
    at_once, late = (
        simulate(jobs, H100, LLAMA, SimConfig(depth=2, way_s=0.0, plan_late=late)) for late in (False, True)
    )
    assert late.ttft.p99 < at_once.ttft.p99 - 0.5 * RATES.seconds(StepLoad(1, 1, 500, 0.0))


def test_while_a_long_step_is_launched_the_tokens_of_the_one_before_it_wait():
    # Two prompts of more tokens than graphs take: the second comes while the first one decodes.
    jobs = [job(0.0, 3000, 40), job(0.2, 3000, 2, 1)]
    quick, slow = (
        simulate(jobs, H100, LLAMA, SimConfig(depth=2, host=HostTimes(eager_s=eager_s))) for eager_s in (0.0, 0.03)
    )
    assert slow.duration == pytest.approx(quick.duration, abs=1e-9)  # the device works meanwhile
    gap = RATES.seconds(StepLoad(1, 1, 3010, 0.0))
    assert quick.tbt.p50 == pytest.approx(gap, rel=0.02)
    assert slow.tbt.p99 < quick.tbt.p99 - 0.004  # told late, so that the next one seems to come sooner
    late = simulate(jobs, H100, LLAMA, SimConfig(depth=2, host=HostTimes(chunks_s=0.03)))
    assert late.duration > quick.duration + 0.03  # the first prompt's step could not begin sooner
    assert late.ttft.mean > quick.ttft.mean + 0.015


def test_launching_that_is_in_the_times_of_steps_keeps_the_host_alone():
    jobs = [job(0.0, 1000, 40), job(0.2, 1000, 2, 1)]
    quick, held = (
        simulate(jobs, H100, LLAMA, SimConfig(depth=2, host=HostTimes(chunks_s=chunks_s, in_steps=True)))
        for chunks_s in (0.0, 0.01)
    )
    assert held.duration == pytest.approx(quick.duration, abs=1e-9)  # the device works meanwhile
    assert held.tbt.p99 < quick.tbt.p99 - 0.0005  # the token before is told late, so that the next seems to come sooner
    planned = simulate(jobs, H100, LLAMA, SimConfig(depth=2, host=HostTimes(plan_chunks_s=0.02)))
    assert planned.ttft.mean > quick.ttft.mean + 0.01  # nothing else runs when the first prompt is planned


def test_steps_take_longer_behind_chunks_and_what_was_measured_of_each_number_of_decodes():
    quirks = Quirks(slower=0.1, slower_s=0.05, by_decodes=(1.2, 0.9))
    chunk, few, more = StepLoad(900, 0, 0, 1e5), StepLoad(8, 8, 800, 0.0), StepLoad(9, 9, 900, 0.0)
    assert quirks.factor(few, 0.0) == pytest.approx(1.2)
    assert quirks.factor(more, 0.5) == pytest.approx(0.9 * 1.05)
    assert quirks.factor(StepLoad(400, 400, 4000, 0.0), 0.0) == pytest.approx(0.9)  # as the last that were measured
    assert quirks.factor(chunk, 1.0) == pytest.approx(1.1)
    apart = quirks._replace(slower_decodes=(0.3, 0.2))
    assert apart.factor(few, 1.0) == pytest.approx(1.2 * 1.3)
    assert apart.factor(chunk, 1.0) == pytest.approx(1.1)
    warm = quirks.later(0.0, 0.05, had_chunks=True)
    assert quirks.later(warm, 0.05, had_chunks=False) == pytest.approx(0.368 * 0.632, rel=0.01)
    config = SimConfig(depth=2, quirks=Quirks(slower=0.1, slower_s=0.05))
    cold, slow = (simulate([job(0.0, 1000, 100)], H100, LLAMA, each) for each in (SimConfig(depth=2), config))
    assert slow.ttft.p50 == pytest.approx(cold.ttft.p50)  # nothing came before it
    prefill = RATES.seconds(StepLoad(1000, 0, 0, 1000 * 1001 / 2))
    excess = 0.1 * 0.05 * (1.0 - np.exp(-prefill / 0.05))  # slower, and all of what is forgotten from then on
    assert slow.duration == pytest.approx(cold.duration + excess, abs=0.1 * excess)
    assert slow.cost_error.median > 0.0  # of which the scheduler is not told


def test_the_host_is_waited_for_where_a_step_is_shorter_than_what_it_takes():
    host = HostTimes(plan_s=0.004, decodes_s=0.004, commit_s=0.004)
    result = simulate([job(0.0, 100, 50)], H100, LLAMA, SimConfig(depth=2, host=host))
    assert result.tpot.mean == pytest.approx(0.012, rel=0.05)
    assert RATES.seconds(StepLoad(1, 1, 150, 0.0)) < 0.008


def test_who_comes_while_the_host_sleeps_counts_from_then():
    # Nothing to do but the first one's decodes: the host sleeps in each, and the second comes in one.
    jobs = [job(0.0, 500, 200), job(0.5001, 500, 20, 1)]
    arrivals = []
    config = SimConfig(depth=2, way_s=0.0, plan_late=True)
    simulate(jobs, H100, LLAMA, config, lambda sequence: arrivals.append((sequence.id, sequence.arrival)))
    assert dict(arrivals)[1] == pytest.approx(0.5001, abs=1e-9)


def test_steps_spread_around_the_profile_and_the_same_seed_draws_the_same():
    jobs = [job(0.01 * at, 200, 60, at) for at in range(30)]
    even, one, same, other = (
        simulate(jobs, H100, LLAMA, SimConfig(depth=2, spread=spread, spread_seed=seed))
        for spread, seed in ((0.0, 0), (0.05, 0), (0.05, 0), (0.05, 1))
    )
    assert one.duration == same.duration != other.duration
    assert one.duration == pytest.approx(even.duration, rel=0.02)
    assert even.cost_error.p90 < 1e-9 and 0.02 < one.cost_error.median < 0.06


def test_what_the_scheduler_believes_of_a_machine_is_not_what_the_machine_does():
    slow = H100._replace(efficiency=H100.efficiency._replace(matmul=0.02))
    rota, promise = SimConfig(policy="rota"), SLO(ttft=1.0, tbt=0.05)
    known, believed = (simulate([job(0.0, 1000, 50)], H100, LLAMA, rota, None, seen) for seen in (None, slow))
    assert believed.duration == pytest.approx(known.duration)
    jobs = [job(0.01 * at, 1000, 50, at, promise) for at in range(20)]
    known, believed = (simulate(jobs, H100, LLAMA, rota, None, seen) for seen in (None, slow))
    assert believed.ttft.mean != pytest.approx(known.ttft.mean, rel=0.02)  # prompts are cut otherwise


def test_runs_one_after_another_on_one_engine_are_counted_apart():
    jobs = [job(0.0, 100, 10), job(0.0, 100, 10_000, 1), job(50.0, 100, 10, 2)]
    ends = {}
    result = simulate(
        jobs, H100, LLAMA, SimConfig(leave_at=(1.0, 40.0)), lambda s: ends.update({s.id: s.finish_reason})
    )
    assert ends == {0: "length", 1: "cancelled", 2: "length"} and result.given_up == 1
    first, second = result.passed
    assert first == second == Passed(first.steps, 0, 0, 0) and first.steps > 10
    assert result.steps == first.steps + 10


def test_time_passes_while_nothing_is_to_do():
    result = simulate([job(0.0, 10, 2), job(100.0, 10, 2, 1)], H100, LLAMA, SimConfig())
    assert result.duration == pytest.approx(100.0, abs=0.1)
    assert result.ttft.p99 < 0.02


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_every_policy_finishes_every_request_under_pressure_and_repeats_itself(policy, depth):
    classes = [(2, SLO(ttft=1.0, tbt=0.1)), (1, SLO(deadline=60.0, weight=0.2))]
    jobs = make_jobs("lmsys", rate=40, duration=5, seed=4, slos=classes)
    config = SimConfig(policy=policy, kv_tokens=8192, max_batch_size=64, depth=depth)
    first, again = simulate(jobs, H100, LLAMA, config), simulate(jobs, H100, LLAMA, config)
    assert first.requests == len(jobs)
    assert first.peak_live > 64
    for run in (first, again):
        assert run.met is not None and 0.0 <= run.met <= 1.0
        assert len(run.met_by_class) == 2
    same = [{k: v for k, v in msgspec.to_builtins(r).items() if k not in WALL} for r in (first, again)]
    assert same[0] == same[1]


def test_promises_are_judged_and_requests_without_one_are_left_out():
    kept, broken, none = SLO(ttft=10.0), SLO(ttft=1e-4), None
    jobs = [job(0.0, 100, 3, n, slo) for n, slo in enumerate((kept, broken, none))]
    result = simulate(jobs, H100, LLAMA, SimConfig())
    assert (result.met, result.ttft_met) == (0.5, 0.5)
    assert sorted(result.met_by_class.values()) == [0.0, 1.0]
    assert result.goodput == pytest.approx(1 / result.duration)
    silent = simulate([job(0.0, 100, 3)], H100, LLAMA, SimConfig())
    assert (silent.met, silent.ttft_met, silent.goodput) == (None, None, 0.0)


def test_a_second_tier_moves_what_one_tier_would_compute_again():
    jobs = make_jobs("lmsys", rate=40, duration=5, seed=4, slos=[(1.0, SLO(ttft=1.0, tbt=0.1))])
    one, two = (
        simulate(jobs, H100, LLAMA, SimConfig(policy="fcfs", kv_tokens=8192, dram_tokens=dram, max_batch_size=64))
        for dram in (0, 65_536)
    )
    assert one.moved is None and one.preemptions > 0
    moved = two.moved
    assert two.preemptions == 0
    assert moved.rotations_out == moved.rotations_in > 0
    assert moved.bytes_in % (16 * LLAMA.kv_bytes_per_token) == 0 and moved.bytes_in > 0
    assert moved.bytes_out >= moved.mirrored > 0
    assert moved.gbps_out * 1e9 <= H100.link_out
    assert 0 < moved.busy_out < 1 and moved.busy_both <= min(moved.busy_in, moved.busy_out)
    assert 0 <= moved.stall_share < 0.2
    assert max(sample.rotated for sample in two.residency) > 0


def test_a_step_that_waits_for_a_copy_ends_later_by_what_the_link_takes():
    limits, block = ExecutorLimits(8, 16, 4, 128, 100), 1000
    link = VirtualLink(block, 1e6)  # a block takes 1 ms
    executor = SimExecutor(RATES, limits, tier=TierLimits(8, block), link=link)
    init = SlotInit(0, SamplingParams(), 0, (1,))
    work = (SlotWork(0, 0, 1, (1,), (0,), True),)
    copies = Copies.of([BlockCopy(1, False, 0, 0), BlockCopy(2, True, 1, 1), BlockCopy(3, True, 2, 2)])
    executor.submit(StepPlan(1, work, (init,), copies=copies, waits=(1,)))
    result = executor.collect()
    compute_s = RATES.seconds(StepLoad(1, 1, 1, 0.0))  # one token that is sampled from: a decode's row
    assert result.elapsed == pytest.approx(0.001 + compute_s)
    assert result.link.stall_s == pytest.approx(0.001)
    assert result.copied == [1, 2, 3]
    with pytest.raises(RuntimeError, match="one tier only"):
        SimExecutor(RATES, limits).submit(StepPlan(1, work, (init,), copies=copies))


@pytest.mark.parametrize(("prompt", "more"), [(1000, 0.003), (1024, 0.003), (1025, 0.009)])
def test_a_step_with_prompt_tokens_takes_what_its_launch_costs_beyond_and_decodes_do_not(prompt, more):
    slow = H100._replace(efficiency=H100.efficiency._replace(pieces_s=0.003, eager_s=0.009))
    with_it, without = (simulate([job(0.0, prompt, 4)], profile, LLAMA, SimConfig()) for profile in (slow, H100))
    assert with_it.ttft.p50 - without.ttft.p50 == pytest.approx(more)
    assert with_it.tpot.mean == pytest.approx(without.tpot.mean)


def test_a_sequence_of_which_one_token_is_missing_costs_a_decode_and_no_launch_of_chunks():
    limits = ExecutorLimits(8, 16, 4, 128, 100)
    slow = RATES._replace(pieces_s=0.003, eager_s=0.009)
    for work, more in (
        (SlotWork(0, 16, 1, (1,), (0, 1), True), 0.0),
        (SlotWork(0, 16, 1, (1,), (0, 1)), 0.003),  # of a longer prompt: nothing is sampled behind it
        (SlotWork(0, 15, 2, (1, 1), (0, 1), True), 0.003),
    ):
        executor = SimExecutor(slow, limits)
        executor.submit(StepPlan(1, (work,), (SlotInit(0, SamplingParams(), 0, (1,)),)))
        executor.collect()
        assert executor.last.compute_s == pytest.approx(RATES.seconds(executor.last.load) + more)


def test_a_request_that_comes_while_a_step_runs_is_read_when_that_ends():
    jobs = [job(0.0, 8000, 2), job(0.1, 10, 2, 1)]
    arrivals: dict[int, float] = {}

    def ended(sequence):
        arrivals[sequence.id] = sequence.arrival

    config = SimConfig(way_s=0.002)
    result = simulate(jobs, H100, LLAMA, config, ended)
    assert result.requests == 2
    assert arrivals[0] == pytest.approx(0.002)
    assert arrivals[1] == pytest.approx(0.002 + RATES.seconds(StepLoad(8000, 0, 0, 8000 * 8001 / 2)))
    simulate(jobs, H100, LLAMA, SimConfig(), ended)
    assert arrivals == {0: 0.0, 1: 0.1}


def test_what_clients_gave_up_kept_no_promise_and_counts_in_no_mean():
    easy, endless = SLO(ttft=1.0, tbt=1.0), 100_000
    jobs = [job(0.0, 10, 5, 0, easy), job(0.0, 10, endless, 1, easy)]
    ends: dict[int, str | None] = {}
    result = simulate(
        jobs,
        H100,
        LLAMA,
        SimConfig(give_up_s=2.0),
        lambda sequence: ends.__setitem__(sequence.id, sequence.finish_reason),
    )
    assert ends == {0: "length", 1: "cancelled"}
    assert (result.requests, result.given_up) == (1, 1)
    assert (result.ttft_met, result.met) == (1.0, 0.5)
    assert result.duration == pytest.approx(2.0, abs=0.1)


def test_shared_prompts_are_computed_once():
    jobs = [Job(float(n), 2048, 4, (7, 8, 9, 10), 512) for n in range(3)]
    result = simulate(jobs, H100, LLAMA, SimConfig())
    assert result.cached == pytest.approx(2 / 3, abs=0.01)


def conversation() -> list[Job]:
    """Two turns, and a third who begins like the first: blocks of 512, of which prompts share those that are whole."""
    return [
        Job(0.0, 1100, 110, (1, 2, 3), 512),
        Job(60.0, 1800, 7, (1, 2, 4, 5), 512),
        Job(120.0, 1600, 7, (1, 2, 4, 6), 512),
    ]


@pytest.mark.parametrize("policy", ["fcfs", "rota"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_next_turn_finds_the_prompt_and_the_answer_before_it(policy, depth):
    cached = []
    for jobs in (conversation(), as_turns(conversation())):
        ended = []
        simulate(jobs, H100, LLAMA, SimConfig(policy=policy, depth=depth), ended.append)
        cached.append([sequence.cached for sequence in ended])
        assert all(list(s.tokens[: s.num_prompt]) == jobs[s.id].prompt() for s in ended)
    # Of the first turn 1100 + 110 tokens; the last one's KV was never needed. The third shares blocks 1, 2 and 4.
    assert cached == [[0, 1024, 1536], [0, 1209 // 16 * 16, 1536]]


def test_an_answer_is_found_again_after_its_turn_was_preempted():
    """In a pool for one of them at a time, the later one's prompt and answer are computed twice."""
    jobs = as_turns([*conversation()[:1], Job(0.001, 1100, 110, (7, 8, 9), 512), Job(60.0, 1800, 7, (7, 8, 4, 5), 512)])
    ended = {}
    result = simulate(
        jobs, H100, LLAMA, SimConfig(kv_tokens=2352), lambda sequence: ended.update({sequence.id: sequence})
    )
    assert result.preemptions == 1 and ended[1].preemptions == 1
    assert ended[2].cached == 1209 // 16 * 16


@pytest.mark.parametrize("depth", [1, 2])
def test_an_answer_ends_where_it_ends_though_it_was_asked_for_more(depth):
    config, produced, asked = SimConfig(policy="rota", depth=depth, max_model_len=2000), {}, {}

    def ended(sequence):
        produced[sequence.id], asked[sequence.id] = sequence.num_output, sequence.max_tokens
        assert sequence.finish_reason == ("stop" if sequence.max_tokens > sequence.num_output else "length")

    lengths = [1, 2, *(40 + 7 * at for at in range(50))]  # some while they are in a cohort
    jobs = [job(0.0, 100, length, at)._replace(max_tokens=(3000, 60)[at % 2]) for at, length in enumerate(lengths)]
    result = simulate(jobs, H100, LLAMA, config, ended)
    assert produced == dict(enumerate(lengths))
    # No more than fits the context, and no less than the answer is to have.
    assert asked == {at: (1900, max(60, length))[at % 2] for at, length in enumerate(lengths)}
    assert result.requests == len(jobs)


def test_what_is_longer_than_the_engine_takes_is_refused_and_the_rest_runs():
    result = simulate([job(0.0, 5000, 10), job(0.0, 100, 10, 1)], H100, LLAMA, SimConfig(kv_tokens=4096))
    assert (result.requests, result.refused) == (1, 1)


def test_no_jobs_give_an_empty_result():
    result = simulate([], H100, LLAMA, SimConfig())
    assert (result.requests, result.met, result.goodput) == (0, None, 0.0)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(InvalidRequestError, match=r"mixtral-8x7b has 93 GB of weights"):
        kv_room(H100, shape_of("mixtral-8x7b"))
    assert kv_room(profile_of("gh200-144"), shape_of("mixtral-8x7b")) > 100_000


def test_the_shapes_have_the_published_sizes():
    billions = {name: shape.weight_bytes / 2e9 for name, shape in SHAPES.items()}
    assert billions == pytest.approx({"llama-3-8b": 8.03, "qwen2.5-32b": 32.8, "mixtral-8x7b": 46.7}, rel=0.01)
    assert LLAMA.kv_bytes_per_token * 16 == 2 * 1024 * 1024  # a block is 2 MiB
    assert shape_of("mixtral-8x7b").flops_per_token / 2e9 == pytest.approx(12.7, rel=0.02)  # of 12.9 billion active


def test_a_checkpoints_folder_is_a_shape_too(tmp_path):
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100, "dtype": "float32"}))
    shape = shape_of(str(tmp_path))
    assert (shape.kv_heads, shape.head_dim, shape.dtype_bytes) == (4, 16, 4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequestError, match="no 'vocab_size'"):
        shape_of(str(tmp_path))
    with pytest.raises(InvalidRequestError, match="'gpt-9' has no shape"):
        shape_of("gpt-9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"{", "is no JSON "),
        (b"\xff\xfe", "is no JSON "),
        (b"[]", "no JSON object"),
    ],
)
def test_a_folder_without_a_config_that_can_be_read_says_so(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=f"model '{tmp_path}': {tmp_path}/config.json.*{message}"):
        shape_of(str(tmp_path))


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text((model_path() / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--model", ""]) == 2
    assert "model='' names no model" in capsys.readouterr().err


def test_every_profile_names_its_sources_and_no_share_exceeds_its_peak():
    for profile in PROFILES.values():
        assert profile.sources
        shares = profile.efficiency
        assert all(0 < share <= 1 for share in (shares.weights, shares.kv, shares.matmul, shares.attention))
        assert max(profile.link_in, profile.link_out) <= profile.link_duplex <= profile.link_in + profile.link_out


def test_the_executor_refuses_a_slot_that_nobody_took():
    executor = SimExecutor(RATES, ExecutorLimits(8, 16, 4, 128, 100))
    executor.submit(StepPlan(1, (SlotWork(0, 0, 1, (5,), (0,), True),), (SlotInit(0, SamplingParams(), 0, (5,)),)))
    assert executor.collect().tokens == {0: 0}
    with pytest.raises(RuntimeError, match=r"slots \[1\] that nobody took"):
        executor.submit(StepPlan(2, (SlotWork(1, 1, 1, (), (), True),)))


# ---------------------------------------------------------------------------- the command

SMALL = ["--workload", "lmsys", "--rate", "2,4", "--duration", "2", "--policy", "fcfs,edf"]


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "fcfs" in shown and "edf" in shown
    written = json.loads(path.read_text())
    assert [(run["policy"], run["rate"]) for run in written["runs"]] == [
        ("fcfs", 2), ("edf", 2), ("fcfs", 4), ("edf", 4),
    ]  # fmt: skip
    assert written["settings"]["seed"] == 0


def test_json_on_stdout_is_all_there_is(capsys):
    assert main([*SMALL, "--slo", "", "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs[0]["met"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "abacus"], "'abacus' is unknown"),
        (["--policy", "lottery"], "'lottery' is unknown"),
        (["--rate", "fast"], "--rate 'fast' is not a number"),
        (["--slo", "ttft=soon"], "--slo ttft 'soon' is not a number"),
        (["--slo", "speed=1"], "'speed=1' must be one of"),
        (["--slo", "ttft=-1"], "ttft=-1.0 must be"),
        (["--model", "mixtral-8x7b"], "weights, too much"),
        (["--policy", "fcfs,lottery"], "'lottery' is unknown"),
        (["--policy", ","], "--policy ',' names nothing"),
        (["--rate", ""], "--rate '' names nothing"),
        (["--rate", "5,-5"], "rate=-5.0 and duration="),
        (["--rate", "1e9"], "requests; simulate 10,000,000 at most"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--max-batch-size", "0"], "max_batch_size=0 must be at least 1"),
        (["--max-batch-tokens", "-1"], "max_batch_tokens=-1 must be at least 1"),
        (["--slo", "inf: ttft=1"], "share that is not finite"),
        (["--slo", "nan: ttft=1"], "share that is not finite"),
        (["--trace", "x.csv"], "workload 'lmsys' reads no trace"),
        (["--turns"], "--turns: prompts of workload 'lmsys' follow no answers"),
        (["--model", ""], "model='' names no model; give --model one of llama-3-8b, "),
        (["--model", "gpt-9"], "model 'gpt-9' has no shape here, and is no folder; give --model one of llama-3-8b, "),
    ],
)
def test_wrong_input_is_said_in_one_line(arguments, message, capsys):
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_neither_torch_nor_numpy():
    code = "import sys, superinfer.runtime.sim.command; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_simulating_needs_no_torch():
    code = "import sys, superinfer.runtime.sim.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_slo_classes_are_read_with_their_shares():
    assert parse_slos("ttft=1,tbt=0.1") == [(1.0, SLO(ttft=1.0, tbt=0.1))]
    assert parse_slos("3: ttft=1; 1: deadline=60, weight=0.1") == [
        (3.0, SLO(ttft=1.0)),
        (1.0, SLO(deadline=60.0, weight=0.1)),
    ]
    assert parse_slos(" ") == []


def test_plots_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"superinfer\[plot\]"):
        plot([], tmp_path, "x")


def test_what_cannot_be_written_is_said_before_anything_is_simulated(tmp_path, monkeypatch, capsys):
    def never(*_: object) -> None:
        raise AssertionError("it was simulated")

    monkeypatch.setattr("superinfer.runtime.sim.simulate.simulate", never)
    (tmp_path / "file").touch()
    assert main(["--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "nowhere" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(["--plot", str(tmp_path / "file" / "plots")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    result = simulate([job(0.0, 10, 3, slo=SLO(ttft=1.0))], H100, LLAMA, SimConfig())
    paths = plot([Point(1.0, result), Point(2.0, result)], tmp_path, "x")
    assert [path.name for path in paths] == ["x-attainment.png", "x-tbt.png", "x-residency.png"]
    assert all(path.stat().st_size > 1000 for path in paths)


def chat(rate: float, seconds: float) -> list[Job]:
    """Poisson arrivals of prompts of 1,000 tokens and answers of 200, with a first token and a pace to keep."""
    rng = np.random.default_rng(0)
    count = int(rate * seconds)
    times = np.cumsum(rng.exponential(1 / rate, count))
    lengths = zip(lognormal(rng, 1000, 800, count), lognormal(rng, 200, 150, count), strict=True)
    return [
        job(float(at), int(prompt), int(output), number, SLO(ttft=1.0, tbt=0.1))
        for number, (at, (prompt, output)) in enumerate(zip(times, lengths, strict=True))
    ]


@pytest.mark.parametrize("paces", [((8.0, 2.0),), ((8.0, 2.0), (16.0, 1.0))])
def test_when_the_machine_becomes_slower_streams_keep_their_pace_and_few_are_let_go(paces):
    config = SimConfig(policy="rota", kv_tokens=100_000, dram_tokens=400_000, paces=paces)
    result = simulate(chat(20, 25), H100, LLAMA, config)
    assert result.met is not None and result.met > 0.9
    assert result.tbt.p99 < 0.1


def test_steps_take_as_long_as_the_machine_is_slow():
    usual = simulate([job(0.0, 100, 51)], H100, LLAMA, SimConfig())
    half = usual.duration / 2
    slower = simulate([job(0.0, 100, 51)], H100, LLAMA, SimConfig(paces=((half, 3.0),)))
    assert slower.duration == pytest.approx(half * 4, rel=0.05)


def test_who_is_late_gets_tokens_at_the_promised_pace_though_nobody_else_is_promised_anything():
    jobs = [job(0.0, 1500, 20 + number * 37 % 400, number, SLO(ttft=1.0, tbt=0.1)) for number in range(200)]
    gaps = []
    config = SimConfig(policy="rota", kv_tokens=153_600, dram_tokens=300_000)
    simulate(
        jobs, H100, LLAMA, config, lambda s: gaps.append(0.0 if s.rotations + s.preemptions else s.timeline.max_tbt)
    )
    assert sum(gap > 0.0 for gap in gaps) > 100
    assert max(gaps) < 0.1
