"""What the simulator's step times are fitted to: an engine's trace, read back step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superinfer.cli.trace_file import read_trace
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepLoad, StepRates
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.executor import Quirks, SimExecutor
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.tracing import TraceRecorder

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
H200, LLAMA = profile_of("h200-pcie5"), shape_of("llama-3-8b")
# A machine that is not the profile's.
EFFICIENCY = H200.efficiency._replace(
    kv=0.7, matmul=0.6, attention=0.4, step_s=1e-3, decode_s=3e-6, pieces_s=1.2e-3, eager_s=4e-3
)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def record(path: Path, runs: int, requests: int) -> list[int]:
    """A trace of an engine on that machine: as many runs, a pause after each. Returns how many steps each had."""
    rates, limits = StepRates.seed(H200._replace(efficiency=EFFICIENCY), LLAMA), ExecutorLimits(9600, 16, 64, 8192, 100)
    scheduler = build_scheduler("fcfs", KVCache(9600, 16), SchedulerLimits(64, 4096, 8192))
    executor = SimExecutor(rates, limits)
    trace, now, random, counts = TraceRecorder(path, 0.0), 0.0, np.random.default_rng(0), []
    for run in range(runs):
        waiting = []
        for id in range(run * requests, (run + 1) * requests):
            prompt, sampling = [id] * int(random.integers(1, 4000)), SamplingParams(ignore_eos=True)
            waiting.append(Sequence(id=id, prompt=prompt, arrival=now, max_tokens=40, sampling=sampling))
        counts.append(0)
        while True:
            if waiting and counts[-1] % 5 == 0:
                scheduler.add(waiting.pop())
            plan = scheduler.plan(now)
            if plan is None:
                break
            trace.planned(plan, now, now + 2e-4)
            executor.now = now + 7e-4
            executor.submit(plan)
            trace.submitted(plan.step, now + 2e-4, executor.now)
            result = executor.collect()
            now = executor.last.end
            scheduler.commit(result, now)
            trace.finished(result, now, now + 1e-4)
            now += 1e-4
            counts[-1] += 1
        now += 2.0
    trace.close(now)
    return counts


def test_a_machines_step_times_are_found_in_the_trace_of_an_engine(tmp_path: Path):
    from sim_steps import calibrated

    path = tmp_path / "ours-rota.trace"
    counts = record(path, 2, 120)
    found: dict[str, Any] = calibrated(path, H200, LLAMA)
    for name, value in EFFICIENCY._asdict().items():
        near = 0.3 if name == "decode_s" else 0.03  # a tenth of a millisecond a step, which reading KV looks like
        assert found["efficiency"][name] == pytest.approx(value, rel=near), name
    assert [sum(run[kind]["steps"] for kind in ("decodes", "chunks", "long")) for run in found["runs"]] == counts
    assert len(found["steps"]) == counts[0]  # the others are held out
    held_out = found["runs"][1]
    assert held_out["long"]["said_over_took"] == pytest.approx(1.0, abs=0.01)
    assert held_out["decodes"]["submit_s"]["p50"] == pytest.approx(5e-4, rel=0.01)


def _under_way(quirks: Quirks, long_steps: int, long_times: float = 1.0) -> list[tuple[StepLoad, float]]:
    """Steps of that machine with these quirks, one right behind another. long_times: what long ones take is more."""
    random, rates = np.random.default_rng(2), StepRates.seed(H200._replace(efficiency=EFFICIENCY), LLAMA)
    observed, chunks = [], 0.0
    for at in range(3000):
        decodes, prompt = int(random.integers(1, 100)), int(random.integers(100, 1900)) if random.random() < 0.2 else 0
        if long_steps and at % (3000 // long_steps) == 0:
            prompt = int(random.integers(2200, 6000))
        load = StepLoad(decodes + prompt, decodes, int(1200 * decodes * random.uniform(0.8, 1.2)), prompt**2 / 2)
        seconds = rates.seconds(load) * quirks.factor(load, chunks) * random.normal(1.0, 0.02)
        seconds *= long_times if load.tokens > rates.captured else 1.0
        chunks = quirks.later(chunks, seconds, prompt > 0)
        observed.append((load, seconds))
    return observed


def test_low_clocks_behind_chunks_and_what_decodes_take_by_their_number_are_found():
    from sim_steps import fitted

    quirks = Quirks(0.1, 0.07, by_decodes=(1.0,) * 8 + (0.93,), slower_decodes=(0.05,) * 6 + (0.15,))
    found = fitted(H200, LLAMA, _under_way(quirks, 300))
    assert found.quirks.slower == pytest.approx(0.1, rel=0.15)
    assert found.quirks.slower_s in (0.05, 0.07, 0.1)
    assert found.spread == pytest.approx(0.02, rel=0.15)
    by_decodes = found.quirks.by_decodes
    assert by_decodes[9] / by_decodes[6] == pytest.approx(0.93, abs=0.015)
    slower = found.quirks.slower_decodes
    assert np.mean(slower[1:6]) == pytest.approx(0.05, abs=0.01)
    assert np.mean(slower[6:]) == pytest.approx(0.15, abs=0.015)
    plain = fitted(H200, LLAMA, _under_way(Quirks(), 300)).quirks
    assert plain.slower < 0.01 and np.mean(plain.slower_decodes) < 0.01
    assert plain.by_decodes == pytest.approx([1.0] * len(plain.by_decodes), abs=0.02)


def test_what_few_long_steps_tell_is_not_believed():
    from sim_steps import LEAST_OF_A_KIND, fitted

    few, many = (
        fitted(H200, LLAMA, _under_way(Quirks(), count, 1.7)).efficiency.eager_s for count in (4, 4 * LEAST_OF_A_KIND)
    )
    assert few == H200.efficiency.eager_s
    assert many > 2 * few


def test_what_steps_cost_the_host_is_what_the_calibration_saw():
    from sim_truth import host_of

    def run(long_steps: int) -> dict[str, Any]:
        kinds: dict[str, Any] = {}
        for kind, steps, plan_s, submit_s in (
            ("decodes", 900, 1e-4, 3e-4), ("chunks", 200, 4e-4, 9e-3), ("long", long_steps, 9e-4, 36e-3),
        ):  # fmt: skip
            times = {"plan_s": plan_s, "submit_s": submit_s, "commit_s": 2e-4}
            kinds[kind] = {"steps": steps, **{name: {"p50": value} for name, value in times.items()}}
        return {"runs": [kinds]}

    alone, many, few = host_of(None), host_of(run(150)), host_of(run(2))
    assert (many.plan_s, many.decodes_s, many.commit_s) == (1e-4, 3e-4, 2e-4)
    assert many.plan_chunks_s == pytest.approx(3e-4)
    assert many.chunks_s == 9e-3
    assert many.eager_s == pytest.approx(27e-3)
    assert few.eager_s == alone.eager_s
    assert many.in_steps and not alone.in_steps


def test_what_a_server_had_behind_it_is_simulated_before():
    from sim_truth import _before

    online, slo = {"runs": [{"rate": 20.0}]}, {"runs": [{"rate": 25.0}]}
    assert _before({"phases": {"online": online, "slo": slo}}) == online["runs"]
    assert _before({"phases": {"slo": slo, "online": online}}) == []
    assert _before({"phases": {"slo": slo}}) == []


def test_a_few_pauses_of_the_host_do_not_bend_the_fit():
    from sim_steps import fit, seed_of

    random, rates = np.random.default_rng(1), StepRates.seed(H200._replace(efficiency=EFFICIENCY), LLAMA)
    loads = [
        StepLoad(int(d + p), int(d), int(1000 * d), float(p * p / 2))
        for d, p in zip(
            random.integers(1, 200, 900), random.integers(0, 2, 900) * random.integers(1, 4000, 900), strict=True
        )
    ]
    observed = [(load, rates.seconds(load) * (10.0 if at % 100 == 0 else 1.0)) for at, load in enumerate(loads)]
    seed = seed_of(H200, LLAMA)
    factors = fit(seed, observed)
    fitted = seed._replace(token_s=seed.token_s * factors[1], kv_s=seed.kv_s * factors[2])
    assert fitted.token_s == pytest.approx(rates.token_s, rel=0.02)
    assert fitted.kv_s == pytest.approx(rates.kv_s, rel=0.1)


def test_a_trace_without_a_run_is_refused(tmp_path: Path):
    from sim_steps import calibrated

    path = tmp_path / "ours-rota.trace"
    record(path, 1, 2)
    assert read_trace(path).tracks
    with pytest.raises(RuntimeError, match="no 500 steps in a row"):
        calibrated(path, H200, LLAMA)
