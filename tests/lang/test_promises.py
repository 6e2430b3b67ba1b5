"""SLOs and deadlines: inherited, sent as what is left, measured, reported; and what happens when they are missed."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
from scripted_client import ScriptedClient, make_report

import superinfer as si
from superinfer.lang.promise import SPENT_DEADLINE, Promises
from superinfer.lang.report import CallWatch


def test_the_nearest_slo_wins_field_by_field_and_deadlines_take_the_minimum(model: ScriptedClient) -> None:
    @si.function(slo=si.SLO(ttft=5.0, tbt=0.5, deadline=50.0))
    def program(s):
        s += si.gen("plain")
        with s.slo(si.SLO(tbt=0.1, weight=3.0)):
            s += si.gen("block")
            s += si.gen("call", slo=si.SLO(ttft=0.2, deadline=90.0))
        s += si.gen("after")

    program.run(slo=si.SLO(deadline=40.0))
    plain, block, call, after = (r.slo for r in model.requests)
    assert plain == after == si.SLO(ttft=5.0, tbt=0.5, deadline=40.0)
    assert block == si.SLO(ttft=5.0, tbt=0.1, deadline=40.0, weight=3.0)
    assert call == si.SLO(ttft=0.2, tbt=0.1, deadline=40.0, weight=3.0)


def test_each_call_is_sent_what_the_program_has_left(model: ScriptedClient) -> None:
    @si.function(deadline=10.0)
    def program(s):
        s += si.gen("first")
        s["first"]
        time.sleep(0.2)
        s += si.gen("second", slo=si.SLO(ttft=1.0))
        s += si.gen("short", slo=si.SLO(deadline=0.5))

    began = time.monotonic()
    program.run(deadline=5.0)
    first, second, short = (r.slo for r in model.requests)
    assert first is not None and second is not None and short is not None
    gone = [came - began for came in model.came]
    assert 5.0 - gone[0] <= first.deadline <= 5.0
    assert 5.0 - gone[1] <= second.deadline <= first.deadline - 0.2
    assert second.ttft == 1.0
    assert short.deadline == 0.5


def test_without_promises_no_slo_is_sent(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += si.gen("x")

    report = program.run().slo_report()
    assert model.requests[0].slo is None
    assert (report.met, report.rows[0].met, report.program.met) == (None, None, None)


def test_forks_inherit_the_deadline_and_the_block(model: ScriptedClient) -> None:
    @si.function(deadline=9.0)
    def program(s):
        with s.slo(si.SLO(tbt=0.3)):
            forks = s.fork(2)
        forks += si.gen("x")
        forks += si.select("y", ["a", "b"])
        forks.join()

    began = time.monotonic()
    report = program.run().slo_report()
    sent = [r.slo for r in model.requests] + [slo for _, _, slo in model.scored]
    assert len(sent) >= 4
    for slo, came in zip(sent, model.came + model.scored_came, strict=True):
        assert slo.tbt == 0.3 and 9 - (came - began) <= slo.deadline <= 9
    assert sorted(row.path for row in report.rows) == [("fork[0]",), ("fork[0]",), ("fork[1]",), ("fork[1]",)]


def test_a_block_deadline_is_for_all_calls_in_it(model: ScriptedClient) -> None:
    @si.function(deadline=100.0)
    def program(s):
        with s.slo(deadline=2.0):
            s += si.gen("x")
            s["x"]
            time.sleep(0.1)
            s += si.gen("y")
        s += si.gen("z")

    began = time.monotonic()
    program.run()
    x, y, z = (r.slo.deadline for r in model.requests)
    assert 2.0 - (model.came[0] - began) <= x <= 2.0 and y <= x - 0.1 and z > 50


def test_time_left_is_exact_on_a_clock_of_ones_own() -> None:
    promises = Promises().within(si.SLO(deadline=30.0, on_miss="raise"), 8.0, now=100.0)
    assert promises.for_call(None, now=103.0).slo == si.SLO(deadline=5.0, on_miss="raise")
    assert promises.for_call(si.SLO(deadline=1.0), now=103.0).slo.deadline == 1.0
    inner = promises.within(None, 2.0, now=103.0)
    assert inner.for_call(None, now=104.0).slo.deadline == 1.0
    assert inner.within(None, 60.0, now=103.0).due == 105.0  # an inner deadline cannot outlive the outer one
    late = inner.for_call(None, now=105.0)
    assert late.spent and late.slo.deadline == SPENT_DEADLINE


@pytest.mark.parametrize("deadline", [0, -1.0, math.nan, math.inf, "8", True])
def test_a_wrong_deadline_is_refused_by_value(model: ScriptedClient, deadline) -> None:
    with pytest.raises(si.InvalidRequestError, match="deadline="):
        si.function(deadline=deadline)(lambda s: None)
    with pytest.raises(si.InvalidRequestError, match="deadline="):
        si.function(lambda s: None).run(deadline=deadline)


def test_a_wrong_slo_is_refused_by_value(model: ScriptedClient) -> None:
    with pytest.raises(ValueError, match="ttft=-1"):
        si.SLO(ttft=-1)
    for refused in (
        lambda: si.function(slo="fast")(lambda s: None),
        lambda: si.function(lambda s: None).run(slo="fast"),
        lambda: si.gen("x", slo="fast"),
        lambda: si.select("x", ["a"], slo="fast"),
    ):
        with pytest.raises(si.InvalidRequestError, match="slo='fast' is not an SLO"):
            refused()


# ------------------------------------------------------------------------------------------------ nothing left


def late_program(on_miss: str) -> si.Function:
    @si.function(deadline=0.03, slo=si.SLO(on_miss=on_miss))
    def program(s):
        time.sleep(0.05)
        s += "p" + si.gen("x")
        s += si.select("y", ["a", "b"])

    return program


def test_finish_sends_a_late_call_and_counts_it_late(model: ScriptedClient) -> None:
    state = late_program("finish").run()
    assert (state["x"], state["y"]) == ("ok", "a")
    assert model.requests[0].slo.deadline == SPENT_DEADLINE
    report = state.slo_report()
    assert [(row.call, row.met, row.why) for row in report.rows] == [("x", False, "budget"), ("y", False, "budget")]
    assert report.met is False and report.program.met is False


def test_truncate_does_not_send_a_late_call(model: ScriptedClient) -> None:
    state = late_program("truncate").run()
    assert (state["x"], state["y"], state.text()) == ("", "", "p")
    assert state.get_meta_info("x")["finish_reason"] == "deadline"
    assert model.requests == [] and model.scored == []
    assert [row.finish_reason for row in state.slo_report().rows] == ["deadline", "deadline"]


def test_raise_makes_a_late_call_an_error(model: ScriptedClient) -> None:
    with pytest.warns(RuntimeWarning, match="DeadlineMissedError"):
        state = late_program("raise").run()
    with pytest.raises(si.DeadlineMissedError, match="no time left for call 'x'"):
        state["x"]
    assert model.requests == []
    assert state.slo_report().rows[0].why == "budget"


# ------------------------------------------------------------------------------------------------ the report


def test_the_report_tells_what_was_measured(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.03, lambda prompt: "abcd"
    model.report = make_report(queue_s=0.01, prefill_s=0.02, decode_s=0.09, e2e_s=0.12, preempted_s=0.004, met=True)

    @si.function(deadline=20.0)
    def program(s):
        s += si.gen("x", slo=si.SLO(ttft=5.0))

    began = time.monotonic()
    report = program.run().slo_report()
    (row,) = report.rows
    assert 0.03 <= row.ttft_s <= row.e2e_s and row.e2e_s >= 0.15 and 0.03 <= row.max_tbt_s < row.e2e_s
    assert (row.queue_s, row.prefill_s, row.decode_s, row.preempted_s) == (0.01, 0.02, 0.09, 0.004)
    assert (row.met, row.why, row.output_tokens, report.met) == (True, "", 4, True)
    assert row.slo.ttft == 5.0 and 20.0 - (model.came[0] - began) <= row.slo.deadline <= 20.0
    assert report.program.finished and report.program.elapsed_s >= row.e2e_s


def test_the_table_shows_where_the_time_went(model: ScriptedClient) -> None:
    model.token_s = 0.03
    model.report = make_report(
        queue_s=0.5, prefill_s=0.02, rotated_s=0.25, copy_wait_s=0.01, decode_s=0.22, e2e_s=1.0, met=False,
        lateness_s=0.4, why="queue",
    )  # fmt: skip

    @si.function
    def program(s):
        s += si.gen("x", slo=si.SLO(ttft=0.0001))

    report = program.run().slo_report()
    (row,) = report.rows
    assert (row.rotated_s, row.copy_wait_s, row.why) == (0.25, 0.01, "queue")
    assert row.client_s == pytest.approx(max(0.0, row.e2e_s - 1.0))  # it counts from when a request may have come
    head, line, _ = str(report).splitlines()
    shown = dict(zip(re.split(r"  +", head), re.split(r"  +", line), strict=False))
    assert (shown["queue"], shown["rotated"], shown["copy wait"]) == ("500 ms", "250 ms", "10 ms")


def test_the_last_run_can_be_traced(model: ScriptedClient, tmp_path) -> None:
    @si.function(deadline=20.0)
    def program(s):
        s += si.gen("first", slo=si.SLO(ttft=5.0))
        for branch in s.fork(2):
            branch += si.gen("branch")
        s += si.gen("last")

    assert program.last_trace is None
    report = program.run().slo_report()
    events = json.loads(program.last_trace.save(tmp_path / "trace.json").read_text())["traceEvents"]
    calls = {(e["tid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert [name for _, name in sorted(calls)] == ["program", "first", "last", "branch", "branch"]
    for row in report.rows:
        (found,) = [e for e in calls.values() if e["ts"] == pytest.approx(row.started_s * 1e6, abs=1)]
        assert found["name"] == row.call and found["dur"] == pytest.approx(row.e2e_s * 1e6, abs=1)
        assert calls[(0, "program")]["dur"] >= found["ts"] + found["dur"]
    first = next(e for e in calls.values() if e["name"] == "first")
    assert first["args"]["slo"]["ttft"] == 5.0 and first["args"]["met"] is True
    with pytest.raises(si.InvalidRequestError, match="nowhere"):
        program.last_trace.save(tmp_path / "nowhere" / "trace.json")


def test_late_is_explained_by_the_engine_else_laid_at_the_clients_door(model: ScriptedClient) -> None:
    model.token_s = 0.03

    @si.function
    def program(s):
        s += si.gen("x", slo=si.SLO(ttft=0.001))

    model.report = make_report(met=False, why="queued")
    assert program.run().slo_report().rows[0].why == "queued"
    model.report = make_report(met=True)
    row = program.run().slo_report().rows[0]
    assert (row.met, row.why) == (False, "client")


def test_late_by_the_promise_is_explained_though_the_engine_kept_the_plan_it_was_sent(model: ScriptedClient) -> None:
    model.token_s = 1.3  # longer than the promise, which leaves time for a machine that stands still before the call
    model.report = make_report(queue_s=50.0, decode_s=10.0, e2e_s=60.0, met=True, deadline_met=True, lateness_s=-2.0)

    @si.function(deadline=2.5)
    def program(s):
        s += si.gen("x") + si.gen("y")

    program.trace()
    row = program.run().slo_report().rows[0]
    assert row.planned_s is not None and (row.met, row.why) == (False, "queue")


def test_the_report_prints_as_an_aligned_table(model: ScriptedClient) -> None:
    @si.function(deadline=20.0)
    def program(s):
        s += si.gen("answer", slo=si.SLO(ttft=5.0))
        s += si.gen()

    text = str(program.run().slo_report())
    head, answer, unnamed, total = text.splitlines()
    assert head.split()[:2] == ["call", "promised"] and head.endswith("why late")
    assert answer.startswith("answer") and "ttft 5.00 s, deadline" in answer
    assert unnamed.startswith("gen ")
    assert total.startswith("= program") and "deadline 20.00 s" in total and total.rstrip().endswith("yes")
    assert answer.index("yes") == total.index("yes")


async def test_an_async_program_may_ask_for_its_report_on_the_way(model: ScriptedClient) -> None:
    @si.function(deadline=5.0)
    async def program(s):
        s += si.gen("x")
        await s.get("x")
        return s.slo_report()

    early = (await program.arun()).ret_value
    assert [row.call for row in early.rows] == ["x"] and not early.program.finished


def test_what_the_engine_has_cut_off_at_its_deadline_is_late_however_soon_it_is_here() -> None:
    """The engine counts a request from when it may have come, which is before it was sent, perhaps."""
    watch = CallWatch("x", (), si.SLO(deadline=60.0))
    watch.tokens(0, 3)
    watch.finished(0, make_report(e2e_s=60.0, met=False, lateness_s=0.0, why="decode"))
    assert watch.report("stop").met is True
    row = watch.report("deadline")
    assert row.met is False and row.why == "decode"
