"""The collector in a process that must not pause."""

import gc

from superinfer.runtime.collector import THRESHOLDS, spared_collector
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO


def test_what_was_there_is_left_alone_and_all_is_as_before_in_the_end():
    before = gc.get_threshold()
    with spared_collector():
        assert gc.get_threshold() == THRESHOLDS
        assert gc.get_freeze_count() > 1000
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_requests_leave_no_cycles_behind_so_that_nobody_need_look_for_them():
    jobs = make_jobs("lmsys", rate=60, duration=5, seed=0, slos=[(0.7, SLO(ttft=1.0, tbt=0.1)), (0.3, SLO.batch())])
    found: list[int] = []
    ended = 0

    def look(_):
        nonlocal ended
        ended += 1
        if ended % 50 == 0:
            found.append(gc.collect())

    config = SimConfig(policy="rota", kv_tokens=8_000, dram_tokens=32_000)
    result = simulate(jobs, profile_of("h100-pcie5"), shape_of("llama-3-8b"), config, on_end=look)
    assert result.moved is not None and result.moved.rotations_out > 0
    assert len(found) > 3
    assert found == [0] * len(found)
