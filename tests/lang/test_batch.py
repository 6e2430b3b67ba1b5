"""Many programs at once: order, errors, threads, iterators."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
from scripted_client import ScriptedClient

import superinfer as si


@si.function
def program(s, item):
    s += f"item {item}:"
    if item == 3:
        raise ValueError("tool 3")
    s += si.gen("x")
    s["x"]


@si.function
async def aprogram(s, item):
    s += f"item {item}:"
    if item == 3:
        raise ValueError("tool 3")
    s += si.gen("x")
    await s.get("x")


def answer(prompt: str) -> str:
    if "item 5" in prompt:
        raise si.QueueFullError("full")
    return prompt[5:-1]


@pytest.mark.parametrize("kind", [program, aprogram])
@pytest.mark.parametrize("num_threads", ["auto", 1, 3])
def test_states_come_in_order_and_failing_items_keep_their_errors(model: ScriptedClient, kind, num_threads) -> None:
    model.answer = answer
    states = kind.run_batch([{"item": i} for i in range(8)], num_threads=num_threads)
    assert [s["x"] for i, s in enumerate(states) if i not in (3, 5)] == ["0", "1", "2", "4", "6", "7"]
    assert [type(s.error()) for s in states if s.error()] == [ValueError, si.QueueFullError]
    for i, error in ((3, ValueError), (5, si.QueueFullError)):
        with pytest.raises(error):
            states[i]["x"]


@pytest.mark.parametrize("kind", [program, aprogram])
def test_num_threads_bounds_how_many_run_at_once(model: ScriptedClient, kind) -> None:
    model.token_s = 0.01
    kind.run_batch([(10 + i,) for i in range(9)], num_threads=3)
    assert model.most_open == 3


def _leaves(i: int) -> None:
    if i == 1:
        sys.exit(7)
    if i == 2:
        raise asyncio.CancelledError  # of a task that it awaited, perhaps
    if i == 3:
        raise KeyboardInterrupt


@si.function
def leaving(s, i):
    s += f"item {i}:" + si.gen("x", max_tokens=3000)
    _leaves(i)


@si.function
async def aleaving(s, i):
    s += f"item {i}:" + si.gen("x", max_tokens=3000)
    _leaves(i)


async def _here(program: si.lang.program.Function, items: list[tuple[int]]) -> list[si.ProgramState]:
    return [state async for state in program.arun_batch(items)]


RUNS = {
    "threads": lambda items: leaving.run_batch(items),
    "tasks": lambda items: aleaving.run_batch(items),
    "threads, async": lambda items: asyncio.run(_here(leaving, items)),
    "tasks, async": lambda items: asyncio.run(_here(aleaving, items)),
}


@pytest.mark.parametrize("way", RUNS)
def test_an_item_that_exits_or_cancels_itself_harms_no_other(model: ScriptedClient, way: str) -> None:
    states = RUNS[way]([(i,) for i in (0, 1, 2, 4)])
    assert [states[at]["x"] for at in (0, 3)] == ["ok", "ok"]
    assert isinstance(states[1].error(), RuntimeError) and "called sys.exit(7)" in str(states[1].error())
    assert isinstance(states[2].error(), si.RequestCancelledError)


@pytest.mark.parametrize("way", RUNS)
def test_a_keyboard_interrupt_in_an_item_ends_the_batch_at_once(model: ScriptedClient, way: str) -> None:
    model.token_s, model.answer = 0.005, lambda prompt: "x" * 3000
    with pytest.raises(KeyboardInterrupt):
        RUNS[way]([(i,) for i in (0, 4, 5, 3)])
    _wait_until(lambda: model.open == 0)
    assert not model.ended  # though the items before it would have gone on for 15 s


@pytest.mark.parametrize("progress_bar", [False, True])
@pytest.mark.parametrize("kind", [leaving, aleaving])
def test_ctrl_c_ends_a_batch_and_cancels_what_runs(
    model: ScriptedClient, monkeypatch: pytest.MonkeyPatch, kind, progress_bar: bool
) -> None:
    model.token_s, model.answer = 0.005, lambda prompt: "x" * 3000
    batch, over, lost = [(4,)] * 20, threading.Event(), threading.Event()

    def hook(told: sys.UnraisableHookArgs) -> None:
        """Python loses what comes while a weak reference's callback runs, and says so: a person presses again."""
        if told.exc_type is KeyboardInterrupt:
            lost.set()
        else:
            sys.__unraisablehook__(told)

    monkeypatch.setattr(sys, "unraisablehook", hook)

    def press() -> None:
        _wait_until(lambda: model.open == 3)
        lost.set()
        while not over.wait(0.05):
            if lost.is_set():
                lost.clear()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        kind.run_batch(batch, num_threads=3, progress_bar=progress_bar)
    over.set()
    thread.join()
    _wait_until(lambda: model.open == 0)
    assert not model.ended and len(model.requests) < len(batch)


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    assert holds()


def test_items_may_be_tuples_and_an_empty_batch_is_empty(model: ScriptedClient) -> None:
    assert [s.text() for s in program.run_batch([(1,), [2]])] == ["item 1:ok", "item 2:ok"]
    assert program.run_batch([]) == []


def test_options_hold_for_every_item_and_each_has_its_own_deadline(model: ScriptedClient) -> None:
    model.token_s = 0.05
    states = program.run_batch([(10,), (11,), (12,)], num_threads=1, temperature=0, deadline=60.0)
    assert all(r.sampling.temperature == 0 for r in model.requests)
    for at in (1, 2):  # it began about when the one before it had ended, which took 0.15 s
        assert model.requests[at].slo.deadline >= 60.0 - (model.came[at] - model.ended[at - 1]) - 0.1
    assert all(s.slo_report().met for s in states)


def test_wrong_items_are_refused_before_anything_runs(model: ScriptedClient) -> None:
    for batch, shown in (
        ([{"item": 1}, {"thing": 2}], "item 1 of the batch: .*'item'"),
        ([(1, 2)], "item 0"),
        (["ab"], "item 0 of the batch is 'ab'"),
        ("ab", "list of dicts"),
    ):
        with pytest.raises(si.InvalidRequestError, match=shown):
            program.run_batch(batch)
    with pytest.raises(si.InvalidRequestError, match="num_threads=0"):
        program.run_batch([(1,)], num_threads=0)
    with pytest.raises(si.InvalidRequestError, match="no option 'colour'"):
        program.run_batch([(1,)], colour="red")
    assert model.requests == []


def test_a_batch_inside_an_async_program_says_which_twin_to_use(model: ScriptedClient) -> None:
    @si.function
    async def outer(s):
        with pytest.raises(RuntimeError, match=r"use arun_batch\(\)"):
            aprogram.run_batch([(1,)])
        return [state["x"] async for state in aprogram.arun_batch([(1,), (2,)])]

    assert outer.run().ret_value == ["ok", "ok"]


def test_the_progress_bar_changes_nothing(model: ScriptedClient, capsys) -> None:
    assert [s["x"] for s in program.run_batch([(1,), (2,)], progress_bar=True)] == ["ok", "ok"]
    assert "program" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [program, aprogram])
def test_generator_style_yields_early_and_leaving_cancels_the_rest(model: ScriptedClient, kind) -> None:
    model.token_s, model.answer = 0.005, lambda prompt: "x" * (1 if "item 0" in prompt else 3000)
    states = kind.run_batch([(i,) for i in (0, 10, 11)], generator_style=True)
    assert next(states)["x"] == "x"
    end = time.monotonic() + 30
    while model.open < 2 and time.monotonic() < end:  # the others have begun
        time.sleep(0.005)
    states.close()
    end = time.monotonic() + 30
    while model.open and time.monotonic() < end:
        time.sleep(0.005)
    assert model.open == 0 and len(model.cancelled) == 2


@pytest.mark.parametrize("kind", [program, aprogram])
async def test_arun_batch_yields_in_order_with_bounded_concurrency(model: ScriptedClient, kind) -> None:
    model.answer, model.token_s = answer, 0.01
    states = [s async for s in kind.arun_batch([(i,) for i in range(8)], concurrency=2)]
    assert [str(s.error() or s["x"]) for s in states] == ["0", "1", "2", "tool 3", "4", "full", "6", "7"]
    assert model.most_open == 2


async def test_200_async_programs_need_no_threads_of_their_own(model: ScriptedClient) -> None:
    model.may_begin = lambda: model.most_open == 200
    before = threading.active_count()
    tasks = [asyncio.create_task(aprogram.arun(100 + i)) for i in range(200)]
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, threading.active_count())
        await asyncio.sleep(0.02)
    assert all(task.result()["x"] == "ok" for task in tasks)
    assert model.most_open == 200
    assert most <= before + 1  # the language's loop, where it was not running yet


def test_a_batch_of_async_programs_needs_no_threads_either(model: ScriptedClient) -> None:
    model.may_begin = lambda: model.most_open == 300
    before = threading.active_count()
    states = aprogram.run_batch([(100 + i,) for i in range(300)])
    assert len(states) == 300 and model.most_open == 300
    assert threading.active_count() <= before + 1
