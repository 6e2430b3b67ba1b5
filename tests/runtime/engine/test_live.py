"""GetLive: what an engine says of its unfinished sequences, and of promises by class."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from slow_engine import slow_engine

from superinfer.errors import InvalidRequestError
from superinfer.runtime.client import EngineClient
from superinfer.runtime.engine.attainment import Attainment
from superinfer.runtime.engine.live import live_report
from superinfer.runtime.launch import EngineProcess
from superinfer.runtime.protocol import Generate, GetLive, SamplingParams
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.slo import SLO


def test_an_engine_tells_how_many_are_in_each_state_and_shows_some_of_each(tiny_checkpoint: Path) -> None:
    request = Generate(
        request_id="many",
        prompt=[5, 6, 7],
        sampling=SamplingParams(max_tokens=900, n=40, ignore_eos=True),
        slo=SLO(ttft=60, tbt=1),
        slo_class="steady",
        program="p1",
    )
    with (
        slow_engine(tiny_checkpoint) as engine,
        EngineClient(engine.address) as client,
        EngineClient(engine.address) as other,
    ):
        reader = threading.Thread(target=lambda: list(client.generate(request)), daemon=True)
        reader.start()
        deadline = time.monotonic() + 20
        while (report := other.live(10)).computing < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        client.cancel("many")
        reader.join(10)
        assert (report.computing, report.waiting, report.omitted) == (16, 24, 30)
        assert len(report.requests) == 10 and {r.state for r in report.requests} == {"computing", "waiting"}
        one = report.requests[0]
        assert (one.request_id, one.slo_class, one.program, one.prompt_tokens) == ("many", "steady", "p1", 3)
        assert one.slack_s is not None and 0 < one.slack_s < 61 + one.output_tokens
        assert other.live().requests == []


def test_promises_are_counted_by_class(engine: EngineProcess) -> None:
    with EngineClient(engine.address) as client:
        for name, slo in (("a", SLO(ttft=60)), ("a", SLO(ttft=1e-6)), ("a", None), ("", SLO(deadline=60))):
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            before = client.stats()
            request = Generate(request_id="r", prompt=[5], sampling=sampling, slo=slo, slo_class=name)
            list(client.generate(request))
        stats = client.stats()
    found = stats.classes
    assert (found["a"].requests, found["a"].missed, found["a"].met) == (3, 1, 1)
    assert found["default"].met >= 1
    assert stats.prefill_tokens == before.prefill_tokens + 1


def test_a_limit_out_of_range_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidRequestError, match="limit=1001"):
        GetLive(limit=1001)


def test_classes_are_bounded() -> None:
    counts = Attainment()
    for at in range(300):
        counts.refused(f"class {at}", 1)
    found = counts.report()
    assert len(found) == 257 and found["others"].refused == 44


def test_a_report_on_4000_takes_less_than_2_ms() -> None:
    slo = SLO(ttft=1, tbt=0.05)
    live = [Sequence(id=at, prompt=[1] * 8, arrival=at / 1000, max_tokens=64, slo=slo) for at in range(4000)]
    for at in range(64):
        live[at].slot = at
    took = []
    for _ in range(20):
        began = time.thread_time()
        report = live_report(GetLive(limit=400), live, 5.0)
        took.append(time.thread_time() - began)
    assert len(report.requests) == 400 and report.omitted == 3600 and report.computing == 64
    assert min(took) < 0.002, took
