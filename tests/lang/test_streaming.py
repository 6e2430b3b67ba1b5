"""Streams: text as it comes, from threads and from event loops; and what leaving one early does."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from scripted_client import ScriptedClient

import superinfer as si


@si.function
def chat(s, question="q"):
    s += si.user(question)
    s += si.assistant(si.gen("answer"))
    s += " then " + si.gen("more")


def wait_until(true) -> bool:
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def test_all_text_streams_as_it_is_made(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "abc"
    state = chat.run(stream=True)
    chunks = list(state.text_iter())
    assert "".join(chunks) == state.text() == "<user>q</><assistant>abc</> then abc"
    assert len(chunks) > 6


def test_one_variable_streams_even_before_the_program_has_come_to_it(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.02, lambda prompt: "abc"
    state = chat.run(stream=True)
    assert list(state.text_iter("more")) == ["a", "b", "c"]
    assert "".join(state.text_iter("answer")) == "abc"  # from its beginning, late as we are
    assert list(state.text_iter("absent")) == []


def test_a_variable_of_a_running_program_is_waited_for(model: ScriptedClient) -> None:
    model.token_s = 0.02
    state = chat.run(stream=True)
    assert state["more"] == "ok"
    assert state.get_meta_info("more")["finish_reason"] == "stop"
    with pytest.raises(KeyError, match="ended without variable 'absent'"):
        state["absent"]


def test_a_finished_program_gives_its_text_at_once(model: ScriptedClient) -> None:
    state = chat.run()
    assert list(state.text_iter()) == [state.text()]
    assert list(state.text_iter("answer")) == ["ok"]


def test_the_first_text_does_not_wait_for_the_second(model: ScriptedClient) -> None:
    read: list[str] = []
    model.answer, model.may_go_on = lambda prompt: "x" * 20, lambda: bool(read)
    stream = chat.run(stream=True).text_iter("answer")
    read.append(next(stream))
    assert read[0] + "".join(stream) == "x" * 20


async def test_the_async_iterator_brings_meta_data(model: ScriptedClient) -> None:
    model.answer = lambda prompt: "abc"
    state = chat.run(stream=True)
    seen = [item async for item in state.text_async_iter("answer", return_meta_data=True)]
    assert "".join(text for text, _ in seen) == "abc"
    assert seen[-1][1]["finish_reason"] == "stop"


async def test_astream_yields_the_text_of_both_kinds_of_programs(model: ScriptedClient) -> None:
    @si.function
    async def achat(s, question="q"):
        s += si.user(question)
        s += si.assistant(si.gen("answer"))
        s += " then " + si.gen("more")

    for program in (chat, achat):
        assert "".join([chunk async for chunk in program.astream("q")]) == "<user>q</><assistant>ok</> then ok"
        assert "".join([chunk async for chunk in program.astream("q", var_name="more")]) == "ok"


def test_an_error_ends_the_stream_and_is_raised(model: ScriptedClient) -> None:
    def answer(prompt: str) -> str:
        raise si.QueueFullError("full")

    model.answer = answer
    state = chat.run(stream=True)
    for name in ("answer", None, "absent"):
        with pytest.raises(si.QueueFullError):
            list(state.text_iter(name))


def test_an_exception_of_the_program_ends_the_stream_and_is_raised(model: ScriptedClient) -> None:
    @si.function
    def program(s):
        s += "text"
        raise LookupError("tool")

    state = program.run(stream=True)
    with pytest.raises(LookupError):
        list(state.text_iter())
    assert isinstance(state.error(), LookupError)


def test_leaving_a_stream_early_cancels_the_program(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 500
    state = chat.run(stream=True)
    for _ in state.text_iter("answer"):
        break
    assert wait_until(lambda: model.cancelled and not model.open)
    assert isinstance(state.error(), si.RequestCancelledError)
    with pytest.raises(si.RequestCancelledError):
        state["more"]


def test_a_program_may_stop_looking_at_its_own_stream(model: ScriptedClient) -> None:
    model.token_s, model.answer = 0.005, lambda prompt: "x" * 10

    @si.function
    def program(s):
        s += si.gen("x")
        for _ in s.text_iter("x"):
            break
        return s["x"]

    state = program.run(stream=True)
    assert "".join(state.text_iter()) == "x" * 10
    assert model.cancelled == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_program_that_reads_on_does_not_wait_for_its_own_end(model: ScriptedClient, stream: bool) -> None:
    @si.function
    def program(s):
        s += "a" + si.gen("x")
        (fork,) = s.fork(1)
        fork += "b" + si.gen("y")
        for state, absent in ((s, "y"), (fork, "z")):  # what nobody has begun to make will not come meanwhile
            with pytest.raises(KeyError, match=f"{absent!r} is not a variable"):
                list(state.text_iter(absent))
        return "".join(s.text_iter()), "".join(fork.text_iter()), "".join(fork.text_iter("y"))

    @si.function
    async def aprogram(s):
        s += "a" + si.gen("x")
        with pytest.raises(KeyError, match="'y' is not a variable"):
            [chunk async for chunk in s.text_async_iter("y")]
        return "".join([chunk async for chunk in s.text_async_iter()])

    for one, expected in ((program, ("aok", "aokbok", "ok")), (aprogram, "aok")):
        state = one.run(stream=stream)
        assert await asyncio.to_thread(wait_until, lambda: state.ret_value == expected), state.error()  # noqa: B023


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_closing_astream_cancels_the_program(model: ScriptedClient, asynchronous: bool) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 500

    @si.function
    async def achat(s):
        s += si.gen("answer")
        await s.get("answer")

    stream = (achat if asynchronous else chat).astream(var_name="answer")
    async with contextlib.aclosing(stream):
        async for _ in stream:
            break
    assert await asyncio.to_thread(wait_until, lambda: model.cancelled and not model.open)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_cancelling_arun_cancels_its_requests_and_those_of_its_forks(
    model: ScriptedClient, asynchronous: bool
) -> None:
    model.token_s, model.answer = 0.01, lambda prompt: "x" * 500

    @si.function
    def program(s):
        forks = s.fork(2)
        forks += si.gen("x")
        s += si.gen("y")
        s["y"]

    @si.function
    async def aprogram(s):
        forks = s.fork(2)
        forks += si.gen("x")
        s += si.gen("y")
        await s.get("y")

    task = asyncio.create_task((aprogram if asynchronous else program).arun())
    await asyncio.to_thread(wait_until, lambda: model.open == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(wait_until, lambda: len(model.cancelled) == 3 and not model.open)
