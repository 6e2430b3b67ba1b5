"""The trace of an engine: whole, bounded, and drawn from what really happened."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiered_executor import TieredMemoryExecutor

from superinfer.errors import InvalidRequestError
from superinfer.runtime.client import EngineClient, new_request_id
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.kv.duplex import DuplexCache
from superinfer.runtime.launch import launch_engine
from superinfer.runtime.protocol import Generate, SamplingParams
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.cost import StepLoad
from superinfer.runtime.scheduler.registry import build_scheduler
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.tracing import COPIES_IN, COPIES_OUT, MIRRORING, TraceRecorder

PAGE = 4
Event = dict[str, Any]


def play(
    path: Path, prompts: list[list[int]], kv: DuplexCache | None = None, **recorder: Any
) -> tuple[list[Sequence], list[Any]]:
    """A small engine with two tiers in virtual time, recorded. Returns its sequences and plans."""
    kv = kv or DuplexCache(10, 40, PAGE)
    scheduler = build_scheduler("lru", kv, SchedulerLimits(3, 12, 10 * PAGE))
    scheduler.quantum = 1  # type: ignore[attr-defined]
    executor = TieredMemoryExecutor(10, 40, PAGE, seed=1)
    trace = TraceRecorder(path, 100.0, **recorder)
    now, plans = 100.0, []
    sequences = [Sequence(id=at, prompt=p, max_tokens=9, arrival=now) for at, p in enumerate(prompts)]
    for sequence in sequences:
        trace.follow(sequence)
        scheduler.add(sequence)
    while (plan := scheduler.plan(now)) is not None:
        plans.append(plan)
        trace.planned(plan, now, now + 0.001)
        executor.submit(plan)
        trace.submitted(plan.step, now + 0.001, now + 0.002)
        now += 0.01
        result = executor.collect()
        scheduler.commit(result, now)
        trace.finished(result, now, now + 0.001)
        trace.gauges(scheduler.counts(), now)
        now += 0.002
    trace.close(now)
    return sequences, plans


def check_nesting(events: list[Event]) -> dict[int, list[Event]]:
    """Async events of each request: every begin has its end, and stages lie inside their request, none over another."""
    by_request: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "request":
            by_request[event["id"]].append(event)
    for id, found in by_request.items():
        assert [e["name"] for e in found].count(f"request {id}") == 2
        outer = [e["ts"] for e in found if e["name"] == f"request {id}"]
        stages = [e for e in found if e["name"] != f"request {id}"]
        ends = outer[0]
        for begin, end in zip(stages[::2], stages[1::2], strict=True):
            assert (begin["ph"], end["ph"], begin["name"]) == ("b", "e", end["name"])
            assert ends <= begin["ts"] <= end["ts"] <= outer[1]
            ends = end["ts"]
    return by_request


def check_tracks(events: list[Event]) -> None:
    """On each track one slice at a time."""
    tracks: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append(event)
    for slices in tracks.values():
        slices.sort(key=lambda e: e["ts"])
        for one, other in itertools.pairwise(slices):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.01


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_trace_holds_every_step_copy_and_stage(tmp_path, prompts):
    path = tmp_path / "trace.json"
    sequences, plans = play(path, prompts)
    events = json.loads(path.read_text())
    check_tracks(events)
    requests = check_nesting(events)
    for sequence in sequences:
        spent: dict[str, float] = defaultdict(float)
        found = [e for e in requests[sequence.id] if not e["name"].startswith("request")]
        for begin, end in zip(found[::2], found[1::2], strict=True):
            spent[begin["name"]] += (end["ts"] - begin["ts"]) / 1e6
        assert spent == pytest.approx({k: v for k, v in sequence.stages.seconds.items() if v > 0}, abs=1e-6)
    slices = [e for e in events if e["ph"] == "X"]
    steps = [e for e in slices if "executor_ms" in e["args"]]
    assert [e["args"]["step"] for e in steps] == [plan.step for plan in plans]
    assert [e["args"]["tokens"] for e in steps] == [plan.num_tokens for plan in plans]
    loads = [StepLoad.of(plan) for plan in plans]  # so that a cost model can be fitted to a trace
    assert [(e["args"]["kv_read"], e["args"]["pairs"]) for e in steps] == [(one.kv_read, one.pairs) for one in loads]
    assert [e["args"]["step"] for e in slices if e["name"] == "submit"] == [plan.step for plan in plans]
    copied = sum(e["args"]["blocks"] for e in slices if e["name"] == "copy")
    assert copied == sum(len(plan.copies) for plan in plans) - _unreported(events, plans)


def test_what_a_rotation_copies_out_is_apart_from_what_was_mirrored_ahead_of_need(tmp_path):
    kv = DuplexCache(10, 40, PAGE)
    play(tmp_path / "trace.json", [[at] * 18 for at in range(6)], kv)
    blocks: dict[int, int] = defaultdict(int)
    for event in json.loads((tmp_path / "trace.json").read_text()):
        if event["name"] == "copy":
            blocks[event["tid"]] += event["args"]["blocks"]
    totals = kv.totals
    assert kv.num_pending == 0
    assert blocks[MIRRORING] == totals.mirrored > 0
    assert blocks[COPIES_OUT] == totals.rotated - totals.rotated_clean > 0
    assert blocks[COPIES_IN] == totals.blocks_in


def _unreported(events: list[Event], plans: list[Any]) -> int:
    """Copies that the last result came too early for."""
    reported = sum(e["args"]["blocks"] for e in events if e.get("name") == "copy")
    left = sum(len(plan.copies) for plan in plans) - reported
    assert 0 <= left <= len(plans[-1].copies)
    return left


def test_a_trace_stops_growing_and_stays_whole(tmp_path):
    path = tmp_path / "trace.json"
    play(path, [[1, 2, 3], [3, 2, 1, 0]], max_events=40)
    events = json.loads(path.read_text())
    assert len(events) <= 40 + 5 and any(e["name"] == "the trace is full" for e in events)
    check_nesting(events)


def test_a_request_that_was_drawn_goes_when_it_is_over(tmp_path):
    """At once: an engine looks for circles so seldom that it would be never."""
    gc.collect()
    gc.disable()
    try:
        tokens = [weakref.ref(sequence.tokens) for sequence in play(tmp_path / "trace.json", [[1, 2, 3], [3, 2]])[0]]
        assert [each() for each in tokens] == [None, None]
    finally:
        gc.enable()


def test_a_trace_may_be_full_at_any_event(tmp_path):
    path, prompts = tmp_path / "trace.json", [[at] * 20 for at in range(6)]
    play(path, prompts)
    events = json.loads(path.read_text())
    assert {COPIES_IN, COPIES_OUT} <= {e["tid"] for e in events if e["name"] == "copy"}
    for most in range(12, len(events)):
        play(path, prompts, max_events=most)
        check_nesting(json.loads(path.read_text()))


def test_a_disk_that_is_full_ends_the_trace_and_not_the_engine(random_llama, capfd):
    config = EngineConfig(model=str(random_llama), kv_tokens=1024, trace="/dev/full")
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        for _ in range(3):
            request = Generate(request_id=new_request_id(), prompt=[5, 6], sampling=sampling)
            assert sum(len(delta.token_ids) for delta in client.generate(request)) == 60
        assert client.health().status == "ok"
    assert capfd.readouterr().err.count("the trace '/dev/full' ends here") == 1


def test_what_cannot_be_written_is_said_before_the_engine_starts(tmp_path):
    with pytest.raises(InvalidRequestError, match="nowhere"):
        launch_engine(EngineConfig(trace=str(tmp_path / "nowhere" / "trace.json")))


def test_an_engine_writes_a_trace_of_its_requests(random_llama, tmp_path):
    path = tmp_path / "trace.json"
    config = EngineConfig(
        model=str(random_llama), kv_tokens=64, dram_tokens=512, max_batch_size=4, policy="lru", trace=str(path)
    )
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    with launch_engine(config) as engine, EngineClient(engine.address) as client:
        streams = [
            client.generate(Generate(request_id=new_request_id(), prompt=[at, 5, 6], sampling=sampling))
            for at in range(2)
        ]
        for stream in streams:
            list(stream)
    events = json.loads(path.read_text())
    check_tracks(events)
    assert len(check_nesting(events)) == 2
    names = {e["name"] for e in events}
    assert {"plan", "submit", "commit", "prefill", "decode", "sequences", "DRAM blocks"} <= names
