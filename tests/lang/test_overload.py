"""Programs under overload, simulated: planning keeps more of them in time than arrival order and plain deadlines do."""

from __future__ import annotations

import argparse
import importlib
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def share_met(monkeypatch: pytest.MonkeyPatch, policy: str, *, plan: bool) -> float:
    """Of about 200 programs of five shapes, 25 a second with 2 to 10 s each, after some that came slowly."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("programs_deadlines")
    options = argparse.Namespace(hardware="h100-pcie5", model="llama-3-8b", slots=128, batch_tokens=2048)
    programs = list(benchmark.arrivals(0, 25.0, 10.0, 8.0, [2.0, 10.0]))
    benchmark.World(policy, plan, options).run(programs)
    return statistics.mean(program.met for program in programs if program.measured)


@pytest.mark.slow
def test_planned_programs_beat_arrival_order_and_plain_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = share_met(monkeypatch, "rota", plan=True)
    assert planned >= 0.55  # 0.35 where calls are kept one by one, and what follows them is not counted
    assert planned >= 1.5 * share_met(monkeypatch, "fcfs", plan=False)
    assert planned >= 1.2 * share_met(monkeypatch, "edf", plan=False)
