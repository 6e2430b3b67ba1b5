"""The demo's overload: planned from a measured speed, judged by the one judge, drawn as it was."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superinfer.cli.overload import REQUESTS, RESIDENT, Ask, Outcome, PolicyRun, Speed, plan_overload
from superinfer.cli.overload_picture import BROKEN, COLOURS, KEPT, picture
from superinfer.cli.overload_view import speed_changes
from superinfer.runtime.slo import SLO, TokenTimeline

Run = Callable[..., tuple[int, str, str]]


def plan(speed: Speed, seconds: float = 10.0, max_model_len: int = 2048):
    return plan_overload(speed, 4096, seconds=seconds, page_size=16, max_model_len=max_model_len)


@pytest.mark.parametrize("slow", [0.2, 1.0, 8.0], ids=["fast", "as here", "slow"])
def test_it_is_an_overload_on_any_machine(slow):
    overload = plan(Speed(prefill_s=0.35e-3 * slow, step_s=20e-3 * slow, alone_s=6e-3 * slow))
    wanted = sum(len(ask.prompt) + ask.output for ask in overload.asks)
    assert len(overload.asks) == REQUESTS
    assert wanted > 3 * overload.kv_tokens and overload.dram_tokens > wanted
    assert overload.kv_tokens >= max(len(ask.prompt) + ask.output for ask in overload.asks)
    assert overload.slo.tbt > 20e-3 * slow, "the pace leaves a step room for more requests than fit"
    work = sum(len(a.prompt) * 0.35e-3 * slow + a.output * 20e-3 * slow / RESIDENT for a in overload.asks)
    last_due = overload.asks[0].at + overload.slo.ttft + overload.slo.tbt * overload.asks[0].output
    assert work == pytest.approx(overload.seconds, rel=0.1) and overload.seconds < 1.3 * last_due
    assert (overload.seconds < 12) == (slow < 8)
    assert plan(Speed(0.35e-3 * slow, 20e-3 * slow, 6e-3 * slow)) == overload


def test_requests_fit_a_short_context():
    overload = plan(Speed(1e-6, 1e-4, 1e-4), max_model_len=256)
    assert max(len(ask.prompt) + ask.output for ask in overload.asks) <= 256


def outcome(times: list[float], at: float = 1.0, finished: bool = True) -> Outcome:
    found = Outcome(Ask(at, [1], 3), TokenTimeline(SLO(ttft=1.0, tbt=0.1)))
    for time in times:
        found.timeline.tokens(1, time)
    if finished:
        found.finished = times[-1]
    return found


def test_a_promise_is_broken_from_when_its_next_token_is_overdue():
    waiting = outcome([], finished=False)
    assert not waiting.broken(0.5) and not waiting.broken(1.9) and waiting.broken(2.1)
    streaming = outcome([0.5, 0.6], finished=False)  # the third token is due 1.2 s after the arrival at 1.0
    assert not streaming.broken(2.1) and streaming.broken(2.3)
    assert not outcome([0.5, 0.6]).broken(99.0) and outcome([0.5, 1.6]).broken(99.0)


def test_a_machine_whose_speed_changed_is_told_of():
    overload = plan(Speed(1e-4, 1e-2, 4e-3))
    for after, says in ((5e-3, ""), (6e-3, "4.0 ms before, 4.0 ms after fcfs, 6.0 ms after rota")):
        runs = [PolicyRun(policy, (), 1.0, 0, alone_s) for policy, alone_s in (("fcfs", 4e-3), ("rota", after))]
        warning = speed_changes(overload, runs)
        assert says in warning and bool(warning) == bool(says)


def test_the_picture_has_every_request_stage_and_figure():
    kept, late = outcome([0.5, 0.6, 0.7]), outcome([2.5, 2.6, 2.7])
    kept.stages = [("queue", 1.0, 1.2), ("prefill", 1.2, 1.5), ("decode", 1.5, 1.7)]
    late.stages = [("queue", 1.0, 1.4), ("prefill", 1.4, 1.5), ("rotated out", 1.5, 3.2), ("decode", 3.2, 3.7)]
    run = PolicyRun("some <policy>", (kept, late), 3.7, 1, 4e-3)
    root = ET.fromstring(picture(plan(Speed(1e-4, 1e-2, 4e-3)), [run, run]))
    colours = [node.get("fill") for node in root.iter() if node.tag.endswith("rect")]
    for stage in ("queue", "prefill", "decode", "rotated out"):
        expected = sum(s[0] == stage for o in (kept, late) for s in o.stages) * 2 + 1  # two panels and the legend
        assert colours.count(COLOURS[stage]) == expected
    texts = [(node.text, node.get("fill")) for node in root.iter() if node.tag.endswith("text")]
    assert texts.count(("✓", KEPT)) == texts.count(("✗", BROKEN)) == 2
    assert sum("some <policy>: first token in time 50%, every token in time 50%" in (t or "") for t, _ in texts) == 2


@pytest.mark.slow
def test_the_demo_ends_with_both_figures_and_a_picture(
    start: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
):
    path = tmp_path / "demo.svg"
    tiny = ("--model", str(tiny_checkpoint), "--load-format", "dummy", "--device", "cpu", "--threads", "1")
    command = start("demo", *tiny, "--overload", "0.5", "--against", "lru", "--picture", str(path))
    status, out, err = command.end(200)
    assert status == 0, err
    table = out[out.index("The same overload under two policies") :]
    lines = [line.split() for line in table.splitlines() if line.strip().startswith(("fcfs", "lru"))]
    assert [line[0] for line in lines] == ["fcfs", "lru"]
    for line in lines:
        assert line[1].endswith("%") and line[2].endswith("%")
    drawn = path.read_text()
    for _, ttft_kept, kept, *_ in lines:
        assert f"first token in time {ttft_kept}, every token in time {kept}" in drawn
    assert drawn.count("✓") + drawn.count("✗") == 2 * REQUESTS
    assert str(path) in out.replace("\n", "")


def test_options_that_cannot_be_are_refused_before_anything_runs(run: Run, tmp_path: Path):
    for arguments, named in (
        (("--overload", "-1"), "overload=-1.0"),
        (("--against", "astrology"), "'astrology'"),
        (("--picture", str(tmp_path / "nowhere" / "x.svg")), "nowhere"),
    ):
        status, _, err = run("demo", *arguments)
        assert status == 2 and named in err and "Traceback" not in err
