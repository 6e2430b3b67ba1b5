"""Deadlines that plan: traced, learnt, split along the longest way; and never a different output for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_client import ScriptedClient, make_report

import superinfer as si
from superinfer.lang.callgraph import Call, CallGraph
from superinfer.lang.planner import Estimate, share


@si.function(deadline=10.0)
def support(s, ticket):
    s += si.user(ticket) + si.assistant(si.gen("plan", max_tokens=40))
    branches = s.fork(2)
    for i, branch in enumerate(branches):
        branch += si.user(f"Part {i}?") + si.assistant(si.gen("note", max_tokens=20))
    s += si.user("\n".join(b["note"] for b in branches))
    s += si.assistant(si.gen("answer", max_tokens=40))


def fresh(program: si.Function) -> si.Function:
    """The same program, having learnt nothing."""
    return si.function(deadline=program.deadline)(program.func)


def is_part_of_what_is_left(model: ScriptedClient, at: int, began: float, part: float, deadline: float = 10.0) -> bool:
    """Whether the deadline of call `at` is `part` of what its program had left when it was sent: no less than when the
    call came, and no more than when the one before it had come. The program started somewhen between `began` and when
    its first call came."""
    first, before = model.came[0], model.came[max(at - 1, 0)]
    least, most = deadline - (model.came[at] - began), deadline - (before - first)
    return part * least <= model.requests[at].slo.deadline <= part * most * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------ tracing


def test_a_trace_shows_which_calls_come_after_which_and_sends_nothing(model: ScriptedClient) -> None:
    graph = support.trace("My lamp is broken.")
    assert [(c.site, c.after, c.max_tokens) for c in graph.calls] == [
        ("plan", (), 40), ("fork/note", (0,), 20), ("fork/note", (0,), 20), ("answer", (0, 1, 2), 40),
    ]  # fmt: skip
    assert graph.complete and model.requests == []
    assert "answer  (≤ 40 tokens) after 0, 1, 2" in str(graph)


def test_a_join_and_an_append_are_followed_too(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        forks = s.fork(2)
        forks += si.gen("x")
        forks.join("concate_and_append")
        s += si.gen("y")
        copies = s.fork(2)
        copies += si.gen("z")
        s += si.gen("meanwhile")

    calls = program.trace().calls
    assert [(c.name, set(c.after)) for c in calls[:3]] == [("x", set()), ("x", set()), ("y", {0, 1})]
    assert sorted((c.name, c.after[-1]) for c in calls[3:]) == [("meanwhile", 2), ("z", 2), ("z", 2)]


def test_an_async_program_is_traced_alike(model: ScriptedClient) -> None:
    @si.function
    async def program(s, q):
        s += q + si.gen("a")
        forks = s.fork(2)
        forks += si.gen("b")
        await forks.ajoin()
        s += f"{(await s.get('b'))[0]}" + si.gen("c")

    assert [(c.name, set(c.after)) for c in program.trace().calls][-1] == ("c", {0, 1, 2})


@pytest.mark.parametrize(
    "look",
    [
        lambda text: "x" in text, lambda text: text == "x", bool, len, lambda text: text.split(), lambda text: text[0],
        lambda text: list(text), json.loads, int, si.tool_calls, lambda text: {text: 1}, lambda text: text < "x",
    ],
)  # fmt: skip
def test_a_trace_stops_where_the_program_looks_into_a_text(model: ScriptedClient, look) -> None:
    called = []

    @si.function
    def program(s):
        s += si.gen("x")
        look(s["x"])
        called.append("tool")
        s += si.gen("never")

    graph = program.trace()
    assert [c.name for c in graph.calls] == ["x"] and not graph.complete and called == []
    assert "x" in graph.stopped or "raises" in graph.stopped


def test_what_is_only_passed_on_does_not_stop_a_trace(model: ScriptedClient) -> None:
    @si.function
    def program(s, topic):
        s += "About " + topic + f" and {topic}: " + si.gen("x")
        s += s["x"]
        s += s["x"] + "!" + si.gen("y", n=2)
        s["z"] = s["y"][0]
        s += ", ".join(s["y"]) + si.select("w", ["a", "b"])
        s += s["z"] + si.gen("end")
        return s["w"]

    assert program.trace().complete
    assert [c.name for c in program.trace().calls] == ["x", "y", "w", "end"]


def test_an_error_before_anything_is_read_is_the_programs_own(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        program.trace()


def test_a_loop_that_never_ends_without_a_model_ends_in_a_trace(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        while True:
            s += si.gen("x")
            s.sync()

    assert "more than 1000 calls" in program.trace().stopped


# ------------------------------------------------------------------------------------------------ the budget


def test_before_anything_is_known_every_call_is_sent_all_that_is_left(model: ScriptedClient) -> None:
    began = time.monotonic()
    fresh(support).run("t")
    assert all(is_part_of_what_is_left(model, at, began, 1) for at in (0, 1, 3))
    assert all(row is None for row in [r.hints and r.hints.expected_tokens for r in model.requests])


def test_a_program_that_calls_itself_without_end_cannot_be_planned(model: ScriptedClient) -> None:
    @si.function
    def program(s, text):
        s += text + si.gen("x", max_tokens=4)
        program(s, text)

    @si.function
    async def later(s, text):
        s += text + si.gen("x", max_tokens=4)
        await later(s, text)

    @si.function
    def forked(s, text):
        (branch,) = s.fork(1)
        branch += text + si.gen("x", max_tokens=4)
        forked(branch, text)

    for endless in (program, later, forked):
        with pytest.raises(si.InvalidRequestError, match=r"calls itself \d\d+ deep.* give it an end") as told:
            endless.plan("a text", deadline=5.0)
        assert f"program {endless.name} " in str(told.value)
        assert len(told.traceback) < 10


def test_a_program_that_only_a_models_answer_keeps_from_calling_itself_is_planned_as_far_as_it_is_seen(
    model: ScriptedClient,
) -> None:
    @si.function
    def refine(s, draft):
        s += draft + si.gen("better", max_tokens=4)
        with contextlib.suppress(Exception):
            if s["better"] == draft:
                return
        refine(s, s["better"])

    plan = refine.plan("a draft", deadline=5.0)
    assert not plan.complete and len(plan.rows) > 10
    assert re.match(r"it calls itself \d\d+ deep", plan.stopped)


def test_a_trace_splits_the_deadline_by_max_tokens_along_the_longest_way(model: ScriptedClient) -> None:
    program = fresh(support)
    program.trace("t")
    began = time.monotonic()
    program.run("t")
    assert is_part_of_what_is_left(model, 0, began, 40 / 100)
    # Hardly any of the 4 s were used: what is left is split again among the rest.
    assert is_part_of_what_is_left(model, 1, began, 20 / 60)
    assert model.requests[2].slo.deadline <= 10 * 20 / 60
    assert is_part_of_what_is_left(model, 3, began, 1)


def test_a_call_is_worth_its_share_of_the_work_that_its_program_has_left(model: ScriptedClient) -> None:
    program = fresh(support)
    program.trace("t")
    program.run("t", slo=si.SLO(weight=8.0))
    # Of 120 tokens 40 are the plan's; of the 80 that follow 20 each note's; the answer is all that is left then.
    assert [r.slo.weight for r in model.requests] == pytest.approx([8 * 40 / 120, 8 * 20 / 80, 8 * 20 / 80, 8])
    # From now on by what the calls have cost: output tokens, and a fifth of each prompt token that was computed.
    costs = [len("ok") + len(r.prompt) / 5 for r in model.requests]
    model.requests.clear()
    model.token_s = 0.01
    program.run("t", slo=si.SLO(weight=8.0))
    # And each is the bearer of what follows it: all of it, or its part where it follows others too.
    notes, answer = costs[1] + costs[2], costs[3]
    expected = [8.0, *(8 * (cost + answer / 2) / (notes + answer) for cost in costs[1:3])]
    assert [r.slo.weight for r in model.requests[:3]] == pytest.approx(expected, rel=0.3)
    assert model.requests[3].slo.weight == pytest.approx(8.0, rel=0.01)


@given(
    times=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(0, 100)), min_size=1, max_size=9),
)
def test_shares_are_those_of_a_count_over_all_calls(times) -> None:
    graph = CallGraph("p")
    for at, (begun, took, cost) in enumerate(sorted(times)):
        graph.calls.append(Call(at, "", "", (), (), begun=begun, ended=begun + took, cost=cost))
    shares = graph.shares([call.cost for call in graph.calls], [0.0] * len(graph.calls))
    for call, found in zip(graph.calls, shares, strict=True):
        rest = sum(c.cost for c in graph.calls if c.ended >= call.begun)
        assert found == pytest.approx(call.cost / rest if call.cost else 1.0, rel=1e-6)
        assert 0 < found <= 1


def test_a_run_teaches_what_must_follow_each_call(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 10
    program = fresh(support)
    for _ in range(2):
        program.run("t")
    model.requests.clear()
    state = program.run("t", deadline=20.0)
    plan, *notes, answer = (r.slo.deadline for r in model.requests)
    # Each call takes 0.11 s or more; two must follow the plan, one each note, none the answer.
    learnt = program.history.program("support")
    tails = [learnt.sites[name].tail for name in ("plan", "fork/note", "answer")]
    assert tails[0] > tails[1] > tails[2] >= 0 and tails[0] > 0.2
    assert plan < 20.0 - 0.2
    assert all(note < 20.0 - 0.2 for note in notes)  # 0.1 s have gone, 0.1 s must follow
    assert answer < 19.8
    assert model.requests[0].hints.expected_tokens == pytest.approx(10)
    report = state.slo_report()
    assert [row.planned_s is not None for row in report.rows[:3]] == [True] * 3
    assert report.rows[0].slo.deadline > plan  # judged by the promise, not by the plan
    assert "planned" in str(report)


def test_an_agents_turns_are_planned_by_what_earlier_runs_took_from_there_on(model: ScriptedClient) -> None:
    model.token_s = 0.01

    @si.function(deadline=5.0)
    def agent(s):
        for turn in range(3):
            s += f"{turn}" + si.gen("thought")
            time.sleep(0.05 if s["thought"] else 0)  # a tool

    agent.run()
    sites = agent.history.program("agent").sites
    assert list(sites) == ["thought", "thought#2", "thought#3"]
    tails = [site.tail for site in sites.values()]
    assert tails[0] > tails[1] + 0.05 > tails[2] + 0.1 >= 0.15
    assert 0.05 <= sites["thought"].gap < tails[0] - tails[1]  # the tool, without the call after it
    agent.run()
    assert [r.hints.keep_s is not None for r in model.requests[3:]] == [True, True, False]


def test_the_work_of_a_call_is_counted_without_its_waiting(model: ScriptedClient) -> None:
    model.token_s = 0.05
    model.report = make_report(queue_s=0.06, rotated_s=0.02)

    @si.function(deadline=5.0)
    def program(s):
        s += si.gen("x")

    (row,) = program.run().slo_report().rows
    assert program.history.site("program", "x").work == pytest.approx(row.e2e_s - 0.08, abs=1e-3)


def test_a_program_that_cannot_be_in_time_any_more_yields_to_others(model: ScriptedClient) -> None:
    model.token_s = 0.05
    program = fresh(support)
    program.run("t")
    model.requests.clear()
    state = program.run("t", deadline=0.2)
    assert all(r.slo.deadline > 60 and r.slo.on_miss == "finish" for r in model.requests[:1])
    assert state["answer"] == "ok" and state.slo_report().program.met is False


def test_a_planned_call_that_the_engine_took_without_its_promise_says_so(model: ScriptedClient) -> None:
    model.token_s = 0.05
    model.report = make_report(e2e_s=2.0, decode_s=1.998, met=False, deadline_met=False, why="overload", degraded=True)
    program = fresh(support)
    program.trace("t")
    row = program.run("t", deadline=0.1).slo_report().rows[0]
    assert row.planned_s is not None
    assert (row.met, row.why, row.degraded) == (False, "overload", True)


def test_siblings_of_a_fork_share_a_group_and_others_have_none(model: ScriptedClient) -> None:
    fresh(support).run("t")
    groups = [r.hints.group if r.hints else "" for r in model.requests]
    assert groups[0] == groups[3] == "" and groups[1] == groups[2] != ""


@pytest.mark.parametrize("on_miss", ["truncate", "raise"])
def test_a_plan_cuts_nothing_short_but_the_true_deadline_does(model: ScriptedClient, on_miss: str) -> None:
    @si.function(deadline=3.0, slo=si.SLO(on_miss=on_miss))
    def program(s):
        s += "a" + si.gen("x", max_tokens=10) + "b" + si.gen("y", max_tokens=90)

    def may_go_on() -> bool:
        """ "x" does when its part of the deadline, a tenth, has passed; "y" never does."""
        return len(model.requests) == 1 and time.monotonic() > model.came[0] + model.requests[0].slo.deadline

    program.trace()
    model.may_go_on, model.answer = may_go_on, lambda prompt: "x" * (5 if prompt == "a" else 90)
    state = program.run() if on_miss == "truncate" else None
    if state is None:
        with pytest.warns(RuntimeWarning, match="DeadlineMissedError"):
            state = program.run()
    assert model.requests[0].slo.deadline <= 0.3 and model.requests[0].slo.on_miss == "finish"
    assert state["x"] == "x" * 5  # longer than planned
    assert state.slo_report().program.elapsed_s > 2.9
    if on_miss == "truncate":
        # All that was there by the deadline, which is nothing where this process stood still until it had passed.
        assert len(state["y"]) == sum(model.given[1:]) < 90
        assert state.get_meta_info("y")["finish_reason"] == "deadline"
    assert sum(model.given[1:]) < 90 and len(model.cancelled) == len(model.requests) - 1


def test_a_call_refused_for_its_planned_deadline_is_sent_again_with_the_true_one(model: ScriptedClient) -> None:
    program = fresh(support)
    program.trace("t")

    def refuse(prompt: str) -> str:
        if model.requests[-1].slo.deadline < 7:
            raise si.OverloadedError("not within that")
        return "ok"

    model.answer = refuse
    state = program.run("t", slo=si.SLO(deadline=9.5))
    assert state["answer"] == "ok" and state.error() is None
    assert model.requests[0].slo.deadline < 5 < model.requests[1].slo.deadline
    model.answer = lambda prompt: (_ for _ in ()).throw(si.OverloadedError("never"))
    with pytest.raises(si.OverloadedError, match="never"):
        program.run("t")


def test_planning_can_be_left_off_for_a_run(model: ScriptedClient) -> None:
    program = fresh(support)
    program.trace("t")
    began = time.monotonic()
    program.run("t", plan=False)
    assert all(is_part_of_what_is_left(model, at, began, 1) for at in (0, 1, 3))
    assert program.history.program("support") is None


def test_outputs_are_the_same_with_and_without_a_plan(model: ScriptedClient) -> None:
    model.answer = lambda prompt: f"{len(prompt)}"
    planned, plain = fresh(support), fresh(support)
    planned.trace("t")
    texts = {planned.run("t").text() for _ in range(3)} | {plain.run("t", plan=False).text()}
    assert len(texts) == 1


def test_a_run_that_fails_or_is_cut_short_teaches_nothing(model: ScriptedClient) -> None:
    @si.function(deadline=5.0)
    def program(s, fail):
        s += "p" + si.gen("x")
        if fail:
            raise ValueError("tool")
        s += si.gen("y", slo=si.SLO(on_miss="truncate"))

    with pytest.raises(ValueError):
        program.run(True)
    program.run(False, deadline=1e-6)
    assert program.history.program("program") is None
    program.run(False)
    assert program.history.program("program").runs == 1


@given(
    left=st.floats(1e-3, 1e3), own=st.floats(1e-4, 1e3), tail=st.floats(0, 1e3), more=st.floats(0, 1e3),
    seconds=st.booleans(),
)  # fmt: skip
def test_a_share_is_above_nothing_at_most_all_and_grows_with_what_is_left(left, own, tail, more, seconds) -> None:
    estimate = Estimate(own, tail, seconds)
    assert 0 < share(left, estimate) <= left * (1 + 1e-9)
    assert share(left + more, estimate) >= share(left, estimate) * (1 - 1e-9)
    if seconds and left >= own + tail:
        assert share(left, estimate) >= own * (1 - 1e-9)


@given(st.data())
def test_the_longest_way_is_that_of_a_search_over_all_ways(data) -> None:
    count = data.draw(st.integers(1, 8))
    after = [data.draw(st.sets(st.integers(0, i - 1)) if i else st.just(set())) for i in range(count)]
    own = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    lag = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    calls = [Call(i, f"c{i}", f"c{i}", (), tuple(before)) for i, before in enumerate(after)]

    def longest(i: int) -> float:
        return max((lag[j] + own[j] + longest(j) for j in range(count) if i in after[j]), default=0.5)

    tails = CallGraph("p", calls).longest(own, lag, 0.5)
    assert tails == pytest.approx([longest(i) for i in range(count)])


# ------------------------------------------------------------------------------------------------ what-if


def test_a_plan_shows_budgets_and_says_what_cannot_be_kept(model: ScriptedClient) -> None:
    program = fresh(support)
    unknown = program.plan("t")
    assert unknown.feasible is None and unknown.needs_s is None
    assert [row.budget_s for row in unknown.rows] == pytest.approx([4, 2, 2, 4])
    assert "No run has been seen yet" in str(unknown)

    model.token_s, model.answer = 0.01, lambda prompt: "x" * 10
    took = program.run("t").slo_report().program.elapsed_s
    model.requests.clear()
    fine, hopeless = program.plan("t", deadline=60.0), program.plan("t", deadline=0.1)
    assert model.requests == []
    assert fine.feasible and 0.3 < fine.needs_s <= took and fine.complete
    assert [row.critical for row in fine.rows].count(True) >= 3
    assert fine.rows[0].due_s < fine.rows[1].due_s < fine.rows[3].due_s <= 60.0
    assert fine.rows[3].after == (0, 1, 2)
    assert hopeless.feasible is False
    assert hopeless.infeasible[0].startswith("The program's deadline of 100 ms cannot be kept: it needs ")
    assert hopeless.infeasible[0] in str(hopeless)


def test_a_plan_names_the_call_whose_own_deadline_cannot_be_kept(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 10

    @si.function
    def program(s):
        s += si.gen("x") + si.gen("short", slo=si.SLO(deadline=0.02))

    program.run()
    (sentence,) = program.plan().infeasible
    assert "20 ms of call 'short' cannot be kept" in sentence


def test_the_plan_of_a_program_that_depends_on_data_goes_by_earlier_runs(model: ScriptedClient) -> None:
    model.token_s = 0.01

    @si.function
    def program(s):
        s += si.gen("first")
        if "ok" in s["first"]:
            s += si.gen("second")

    program.run()
    plan = program.plan(deadline=0.001)
    assert not plan.complete and "looks into 'first' (contains)" in plan.stopped
    assert [(row.call, row.after) for row in plan.rows] == [("first", ()), ("second", None)]
    assert plan.needs_s > 0.04 and "it needs at least" in plan.infeasible[0]


def test_what_was_learnt_is_kept_in_a_file(model: ScriptedClient, tmp_path) -> None:
    path = tmp_path / "learnt.json"
    first = si.function(deadline=5.0, history=path)(support.func)
    first.run("t")
    first.history.save()
    again = si.function(deadline=5.0, history=si.History(str(path)))(support.func)
    assert again.history.program("support") == first.history.program("support")
    assert again.plan("t").needs_s is not None
    path.write_text("{]")
    with pytest.raises(si.InvalidRequestError, match=r"learnt.json.*delete it"):
        si.History(path)


def test_programs_and_sessions_that_name_one_file_learn_in_it_together(model: ScriptedClient, tmp_path) -> None:
    path = tmp_path / "learnt.json"
    program = si.function(deadline=5.0, history=path)(support.func)
    session = si.Session(name="desk", history=str(path))
    program.run("t")
    session.ask("hello")
    assert program.history is session.history
    program.history.save()
    assert {"support", "desk"} <= set(json.loads(path.read_text())["programs"])


def test_of_what_is_learnt_in_files_nothing_stays_when_nobody_has_it(model: ScriptedClient, tmp_path) -> None:
    path, began = tmp_path / "learnt.json", time.monotonic()
    for number in range(3):
        with si.Session(name=f"desk {number}", history=path) as session:
            session.ask("hello")
        history = weakref.ref(session.history)
        del session
        while history() is not None and time.monotonic() < began + 60:  # the loop's thread may not be done with it
            gc.collect()
            time.sleep(0.001)
        assert history() is None
    assert set(json.loads(path.read_text())["programs"]) == {f"desk {number}" for number in range(3)}


def test_processes_that_share_a_history_file_leave_each_others_programs_in_it(
    model: ScriptedClient, tmp_path: Path
) -> None:
    path = tmp_path / "learnt.json"

    def other(s):
        s += "o" + si.gen("x")

    for first in (support, other):  # and whoever writes last
        mine, theirs = si.History(path), si.History(path)  # as in two processes, both begun before either has written
        si.function(deadline=5.0, history=mine)(support.func).run("t")
        si.function(deadline=5.0, history=theirs)(other).run()
        for history in (mine, theirs) if first is support else (theirs, mine):
            history.save()
        again = si.History(path)
        assert again.program("support") == mine.program("support")
        assert again.program("other") == theirs.program("other")
        path.unlink()


def test_a_program_that_is_compiled_or_bound_plans_with_what_was_learnt(model: ScriptedClient) -> None:
    compiled = fresh(support).compile()
    began = time.monotonic()
    compiled.bind(ticket="t").run()
    assert is_part_of_what_is_left(model, 0, began, 40 / 100)
    assert compiled.history.program("support").runs == 1


def test_the_constant_beginning_of_a_program_is_cached(model: ScriptedClient) -> None:
    @si.function
    def chat(s, q):
        s += si.system("Always the same.") + si.user("Q: " + q) + si.assistant(si.gen("x"))

    chat.cache()
    (request,) = model.requests
    assert request.prompt == "<system>Always the same.</><user>Q: " and request.sampling.max_tokens == 1
    with pytest.raises(si.UnsupportedError, match="nothing to cache"):
        si.function(lambda s, q: s.__iadd__(q)).cache()


def test_a_class_of_slo_is_sent_with_every_call(model: ScriptedClient) -> None:
    @si.function(slo_class="chat")
    async def program(s):
        s += si.gen("x")

    asyncio.run(program.arun())
    assert model.requests[0].slo_class == "chat"


def test_what_follows_several_calls_is_shared_by_them_so_that_all_is_counted_once() -> None:
    graph = CallGraph("p")
    after = [(), (0,), (0,), (1, 2), (3,)]
    for at, before in enumerate(after):
        graph.calls.append(Call(at, "", "", (), before))
    rests = graph.rests([1.0, 2.0, 4.0, 8.0, 16.0])
    assert rests == [30.0, 12.0, 12.0, 16.0, 0.0]


def test_the_engine_is_told_what_must_follow_a_call(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 10
    program = fresh(support)
    program.run("t")
    model.requests.clear()
    program.run("t", deadline=60.0)
    plan, *notes, answer = (r.hints for r in model.requests)
    assert plan.rest_tokens > notes[0].rest_tokens > answer.rest_tokens == 0
    assert plan.rest_s > notes[0].rest_s > answer.rest_s == 0
    assert [hints.follows for hints in (plan, *notes, answer)] == [False, True, True, True]


def test_while_nothing_is_learnt_the_engine_is_told_that_a_programs_deadline_is_not_for_one_call(
    model: ScriptedClient,
) -> None:
    @si.function
    def program(s, own=None):
        s += "p" + si.gen("x", slo=si.SLO(deadline=own) if own else None)
        s += "q" + si.gen("y")

    def told(**options) -> list[bool]:
        before = len(model.requests)
        program.run(**options)
        return [r.hints is not None and r.hints.may_go_on for r in model.requests[before:]]

    assert told(plan=False) == [False, False]  # no deadline
    assert told(plan=False, deadline=60.0) == [True, True]
    assert told(plan=False, deadline=60.0, own=1.0) == [False, True]  # its own
    fresh = si.function(program.func)
    before = len(model.requests)
    fresh.run(deadline=60.0)
    fresh.run(deadline=60.0)
    assert [r.hints.may_go_on for r in model.requests[before:]] == [True, True, False, False]
    traced = si.function(program.func).compile()
    before = len(model.requests)
    traced.run(deadline=60.0)
    assert [r.hints is not None and r.hints.may_go_on for r in model.requests[before:]] == [True, False]
