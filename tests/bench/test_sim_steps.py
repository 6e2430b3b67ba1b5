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
from superinfer.runtime.sim.executor import SimExecutor
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
