"""Sessions: turns that go on from each other, tools that run at the same time, and what the engine is told of both."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest
from scripted_client import ScriptedClient

import superinfer as si
from superinfer.lang.history import History
from superinfer.lang.tool_run import MAX_TOOL_THREADS


def call(name: str, **arguments: str) -> str:
    shown = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{shown}}}}}</tool_call>'


def agent(prompt: str) -> str:
    """Asks for the price of what was asked, and says it."""
    if prompt.endswith("</><assistant>") and "<tool>" in prompt.rpartition("<user>")[2]:
        return "It is " + prompt.rpartition("<tool>")[2].partition("<")[0]
    return call("price", item=prompt.rpartition("<user>")[2].partition("<")[0])


def price(item: str) -> str:
    """What an item costs."""
    return {"lamp": "$9", "chair": "$40"}[item]


@si.function
def say(s, text):
    s += si.user(text) + si.assistant(si.gen("x"))


# ------------------------------------------------------------------------------------------------ turns


def test_each_turn_goes_on_from_what_was_said_before(model: ScriptedClient) -> None:
    session = si.Session(system="Be brief.")
    say.run("one", session=session)
    state = say.run("two", session=session)
    assert [request.prompt for request in model.requests] == [
        "<system>Be brief.</><user>one</><assistant>",
        "<system>Be brief.</><user>one</><assistant>ok</><user>two</><assistant>",
    ]
    assert state.messages() == session.messages() and session.turns == 2
    assert session.text() == state.text()
    assert {request.program for request in model.requests} == {session.id}


def test_variables_of_earlier_turns_can_be_read(model: ScriptedClient) -> None:
    @si.function
    def first(s):
        s += si.user("a") + si.assistant(si.gen("plan"))
        s["number"] = 7

    @si.function
    def second(s):
        return s["plan"], s["number"], s.get_meta_info("plan")["finish_reason"]

    session = si.Session()
    first.run(session=session)
    assert second.run(session=session).ret_value == ("ok", 7, "stop")


async def test_all_ways_to_run_a_program_make_a_turn(model: ScriptedClient) -> None:
    @si.function
    async def asay(s, text):
        s += si.user(text) + si.assistant(si.gen("x"))

    session = si.Session()
    for program in (say, asay):
        await program.arun("a", session=session)
        chunks = [chunk async for chunk in program.astream("b", session=session, var_name="x")]
        assert "".join(chunks) == "ok"
        await ended(session)
        state = await asyncio.to_thread(lambda program=program: program.run("c", session=session, stream=True))
        assert await asyncio.to_thread(lambda state=state: state["x"]) == "ok"
        await ended(session)
    assert [m["content"] for m in session.messages() if m["role"] == "user"] == ["a", "b", "c"] * 2


async def ended(session: si.Session) -> None:
    end = time.monotonic() + 30
    while "in a turn" in repr(session) and time.monotonic() < end:
        await asyncio.sleep(0.005)


def test_a_turn_that_fails_leaves_the_session_as_it_was(model: ScriptedClient) -> None:
    session = si.Session()
    say.run("one", session=session)
    before = session.messages()

    @si.function
    def raises(s):
        s += si.user("x") + si.assistant(si.gen("x"))
        s.sync()
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        raises.run(session=session)

    model.answer = refuse
    with pytest.warns(RuntimeWarning, match="full"):
        say.run("two", session=session)

    @si.function
    def half(s):
        s += si.user_begin() + "never ended"

    with pytest.raises(si.InvalidRequestError, match="ends inside a user message"):
        half.run(session=session)
    assert session.messages() == before and session.turns == 1
    model.answer = lambda prompt: "well"
    assert say.run("two", session=session)["x"] == "well"


def refuse(prompt: str) -> str:
    raise si.QueueFullError("full")


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_a_cancelled_turn_leaves_the_session_as_it_was(model: ScriptedClient, asynchronous: bool) -> None:
    model.token_s, model.answer = 0.02, lambda prompt: "x" * 500

    @si.function
    async def asay(s, text):
        s += si.user(text) + si.assistant(si.gen("x"))
        await s.get("x")

    session = si.Session()
    task = asyncio.create_task((asay if asynchronous else say).arun("one", session=session))
    while not model.open:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ended(session)
    model.token_s, model.answer = 0.0, lambda prompt: "ok"
    await say.arun("two", session=session)
    assert [m["content"] for m in session.messages()] == ["two", "ok"]
    assert model.open == 0 and len(model.cancelled) == 1


async def test_one_turn_at_a_time(model: ScriptedClient) -> None:
    refused = asyncio.Event()
    model.may_begin = refused.is_set
    session = si.Session()
    first = asyncio.create_task(say.arun("one", session=session))
    while not model.open:
        await asyncio.sleep(0.005)
    with pytest.raises(si.InvalidRequestError, match="still running"):
        await say.arun("two", session=session)
    with pytest.raises(si.InvalidRequestError, match="still running"):
        await session.aask("three")
    refused.set()
    await first
    with pytest.raises(si.InvalidRequestError, match="come one after the other"):
        say.run_batch([("a",), ("b",)], session=session)
    assert session.turns == 1


def test_a_wrong_argument_does_not_keep_the_session_busy(model: ScriptedClient) -> None:
    session = si.Session()
    for run in (lambda: say.run(session=session), lambda: asyncio.run(say.arun(session=session))):
        with pytest.raises(si.InvalidRequestError, match="missing"):
            run()
    assert say.run("one", session=session)["x"] == "ok"
    with pytest.raises(si.InvalidRequestError, match="session='abc' is not a Session"):
        say.run("one", session="abc")


def test_a_closed_session_says_so_and_its_messages_go_on_elsewhere(model: ScriptedClient) -> None:
    with si.Session(system="S") as session:
        say.run("one", session=session)
    session.close()
    with pytest.raises(si.InvalidRequestError, match="closed"):
        say.run("two", session=session)
    again = si.Session(messages=session.messages())
    say.run("two", session=again)
    assert model.requests[-1].prompt == "<system>S</><user>one</><assistant>ok</><user>two</><assistant>"


def test_a_fork_begins_with_what_was_said_and_goes_its_own_way(model: ScriptedClient) -> None:
    model.answer = agent
    session = si.Session(tools=[price], deadline=5.0)
    session.ask("lamp")
    twin = session.fork()
    assert twin.ask("chair").text == "It is $40"
    assert session.turns == 1 and len(session.messages()) == 4 and len(twin.messages()) == 8
    assert twin.messages()[:4] == session.messages()
    assert twin.deadline == 5.0 and twin.id != session.id


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 is .*robot"),
        ({"messages": [{"role": "user"}]}, "message 0"),
        ({"messages": ["hi"]}, "message 0 is 'hi'"),
        ({"tools": [price, price]}, "two tools are named 'price'"),
        ({"tools": [{"type": "function"}]}, "is not a Python function"),
        ({"tool_s": -1.0}, "tool_s=-1.0"),
        ({"idle_s": float("nan")}, "idle_s=nan"),
        ({"tool_timeout": "soon"}, "tool_timeout='soon'"),
        ({"deadline": 0}, "deadline=0"),
        ({"on_tool_error": "ignore"}, "on_error='ignore'"),
        ({"max_rounds": 0}, "max_rounds=0"),
        ({"history": 5}, "history=5"),
        ({"tools": price}, "tools=.*must be a list of functions"),
    ],
)
def test_wrong_values_are_refused_by_name(arguments, shown: str) -> None:
    with pytest.raises(si.InvalidRequestError, match=shown):
        si.Session(**arguments)


def test_a_turn_says_text_and_has_one_answer(model: ScriptedClient) -> None:
    session = si.Session()
    with pytest.raises(si.InvalidRequestError, match=r"ask\(None\)"):
        session.ask(None)  # type: ignore[arg-type]
    with pytest.raises(si.InvalidRequestError, match="n=2"):
        session.ask("hi", n=2)
    assert model.requests == [] and session.ask("hi").text == "ok"


# ------------------------------------------------------------------------------------------------ tools


def test_a_model_calls_tools_until_it_answers_in_words(model: ScriptedClient) -> None:
    model.answer = agent
    session = si.Session(system="S", tools=[price])
    reply = session.ask("lamp", temperature=0)
    assert reply.text == "It is $9"
    assert [(r.call.name, r.call.arguments, r.text, r.value) for r in reply.tools] == [
        ("price", {"item": "lamp"}, "$9", "$9")
    ]
    assert [m["role"] for m in session.messages()] == ["system", "user", "assistant", "tool", "assistant"]
    assert model.requests[0].prompt.startswith("[tools price]<system>S</>")
    assert len(reply.state.slo_report().rows) == 2 and model.requests[0].sampling.temperature == 0
    assert session.ask("chair").text == "It is $40"


async def test_all_calls_of_an_answer_run_at_the_same_time_and_results_keep_their_order(model: ScriptedClient) -> None:
    together, both = threading.Barrier(2), asyncio.Barrier(2)

    def slow(item: str) -> str:
        """Waits for its twin."""
        together.wait(60)
        return f"slow {item}"

    async def aslow(item: str) -> dict[str, str]:
        """Waits for its twin, on the loop of who asked."""
        assert asyncio.get_running_loop() is here
        await both.wait()
        return {"item": item}

    here = asyncio.get_running_loop()
    calls = [call(name, item=item) for name, item in (("slow", "a"), ("aslow", "b"), ("slow", "c"), ("aslow", "d"))]
    model.answer = lambda prompt: "done" if "<tool>" in prompt else " ".join(calls)
    reply = await si.Session(tools=[slow, aslow], tool_timeout=60.0).aask("go", max_new_tokens=999)
    assert [result.text for result in reply.tools] == ["slow a", '{"item": "b"}', "slow c", '{"item": "d"}']
    assert reply.text == "done"
    told = model.requests[1].prompt.partition("<tool>")[2]
    assert told == 'slow a</><tool>{"item": "b"}</><tool>slow c</><tool>{"item": "d"}</><assistant>'


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (call("nothing"), "error: there is no tool 'nothing'; there are price"),
        (call("price", thing="x"), "error: price: missing a required argument: 'item'; it takes (item: str)"),
        (call("price", item="moon"), "error: KeyError: 'moon'"),
        ("<tool_call>{not json}</tool_call>", "error: the model wrote a tool call that cannot be read"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model_or_raised(model: ScriptedClient, made: str, told: str) -> None:
    model.answer = lambda prompt: "sorry" if "<tool>" in prompt else made
    session = si.Session(tools=[price])
    assert session.ask("x").text == "sorry"
    (message,) = [m for m in session.messages() if m["role"] == "tool"]
    assert message["content"].startswith(told.replace("(item: str)", "(item: 'str')")) or told in message["content"]
    with pytest.raises((si.OutputError, KeyError)):
        si.Session(tools=[price], on_tool_error="raise").ask("x")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tool_that_stops_iterating_or_exits_has_failed_and_no_more(model: ScriptedClient, asynchronous: bool) -> None:
    def first(item: str) -> str:
        """The first item."""
        return next(iter(item))

    async def afirst(item: str) -> str:
        """The first item."""
        return next(iter(item))

    def leave() -> None:
        """Leaves."""
        sys.exit("usage")

    async def aleave() -> None:
        """Leaves."""
        sys.exit("usage")

    tools = [afirst, aleave] if asynchronous else [first, leave]
    made = call(tools[0].__name__, item="") + call(tools[1].__name__)
    model.answer = lambda prompt: "sorry" if "<tool>" in prompt else made
    reply = asyncio.run(asyncio.wait_for(si.Session(tools=tools).aask("x", max_new_tokens=999), 10))
    assert reply.text == "sorry" and [type(result.error) for result in reply.tools] == [RuntimeError, SystemExit]
    assert reply.tools[1].text == "error: SystemExit: usage"
    with pytest.raises(SystemExit, match="usage"):
        si.call_tools([si.ToolCall(tools[1].__name__, {})], tools, on_error="raise")
    assert (
        si.Session(tools=tools).ask("x", max_new_tokens=999).text == "sorry"
    )  # what all programs of the process run on lives on


async def test_a_tool_that_takes_too_long_is_given_up(model: ScriptedClient) -> None:
    given_up = asyncio.Event()

    async def forever() -> None:
        """Waits."""
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    model.answer = lambda prompt: "sorry" if "<tool>" in prompt else call("forever")
    session = si.Session(tools=[forever], tool_timeout=0.05)
    reply = await session.aask("x")
    assert reply.tools[0].text == "error: TimeoutError: forever took longer than 0.05 s" and given_up.is_set()
    assert isinstance(reply.tools[0].error, TimeoutError)


async def test_cancelling_a_turn_cancels_its_tools(model: ScriptedClient) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        """Waits."""
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    model.answer = lambda prompt: call("wait")
    session = si.Session(tools=[wait])
    task = asyncio.create_task(session.aask("x"))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert cancelled.is_set() and session.messages() == [] and session.turns == 0


def test_a_model_that_only_calls_tools_is_stopped(model: ScriptedClient) -> None:
    model.answer = lambda prompt: call("price", item="lamp")
    session = si.Session(tools=[price], max_rounds=3)
    with pytest.raises(si.OutputError, match="3 times in a row"):
        session.ask("x")
    assert len(model.requests) == 3 and session.messages() == []


def test_a_program_of_ones_own_may_call_tools_too(model: ScriptedClient) -> None:
    async def aprice(item: str) -> str:
        """The same, asynchronous."""
        return price(item)

    @si.function
    def program(s, item):
        s += si.tools([aprice])
        s += si.user(item) + si.assistant(si.gen("x"))
        for result in si.call_tools(si.tool_calls(s["x"]), [aprice]):
            s += si.tool(result.text)

    model.answer = lambda prompt: call("aprice", item="lamp")
    assert program.run("lamp").messages()[-1] == {"role": "tool", "content": "$9"}


async def test_threads_for_tools_are_bounded_however_many_sessions_there_are(model: ScriptedClient) -> None:
    most = 0

    def block(item: str) -> str:
        """Counts the threads."""
        nonlocal most
        most = max(most, sum(t.name.startswith("superinfer-tool") for t in threading.enumerate()))
        time.sleep(0.002)
        return item

    model.answer = lambda prompt: "ok" if "<tool>" in prompt else call("block", item="x") * 2
    replies = await asyncio.gather(*(si.Session(tools=[block]).aask("x", max_new_tokens=999) for _ in range(300)))
    assert len(replies) == 300 and all(len(reply.tools) == 2 for reply in replies)
    assert 0 < most <= MAX_TOOL_THREADS


# ------------------------------------------------------------------------------------------------ what is sent


def test_keep_s_is_given_first_and_learnt_then(model: ScriptedClient) -> None:
    def slow_price(item: str) -> str:
        """Takes a while."""
        time.sleep(0.2)
        return "$9"

    model.answer = lambda prompt: agent(prompt).replace('"price"', '"slow_price"')
    history = History()
    session = si.Session(tools=[slow_price], history=history, tool_s=7.0, idle_s=30.0)
    session.ask("lamp")
    assert [request.hints.keep_s for request in model.requests] == [7.0, 7.0]
    session.ask("lamp")  # what comes after a call is known now: a tool after the first, a turn after the second
    third, fourth = (request.hints for request in model.requests[2:])
    assert 0.15 < third.keep_s < 7.0 and fourth.keep_s < 7.0 and fourth.expected_tokens > 0
    fresh = si.Session(tools=[slow_price], history=history, tool_s=7.0, idle_s=30.0)
    fresh.ask("lamp")
    assert 0.15 < model.requests[4].hints.keep_s < 7.0  # of all sessions of that name and history


def test_sessions_that_end_after_a_turn_teach_that_nothing_follows(model: ScriptedClient) -> None:
    history = History()
    for _ in range(3):
        with si.Session(history=history, idle_s=30.0) as session:
            session.ask("x")
    assert [request.hints and request.hints.keep_s for request in model.requests] == [30.0, None, None]


def test_sessions_that_begin_alike_share_the_group_of_their_first_call(model: ScriptedClient) -> None:
    for system in ("A", "A", "B", None):
        session = si.Session(system=system, history=History())
        session.ask("x")
        session.ask("y")
    groups = [request.hints.group if request.hints else "" for request in model.requests]
    assert groups[0] == groups[2] != groups[4] and groups[0] and groups[4]
    assert groups[1::2] == [""] * 4 and groups[6] == ""


def test_promises_of_a_session_hold_for_each_turn(model: ScriptedClient) -> None:
    session = si.Session(deadline=5.0, slo=si.SLO(ttft=1.0), slo_class="agents", history=History())
    for _ in range(2):
        reply = session.ask("x", deadline=9.0)
        assert reply.state.slo_report().program.deadline_s == 5.0 and reply.state.slo_report().met
    for request in model.requests:
        assert request.slo.ttft == 1.0 and 4.0 < request.slo.deadline <= 5.0 and request.slo_class == "agents"


def test_a_select_passes_on_how_long_its_prompt_is_wanted(model: ScriptedClient) -> None:
    @si.function
    def choose(s):
        s += si.user("Which?") + si.assistant(si.select("x", ["a", "b"]))

    hinted = []
    score = model.score

    async def watched(*args, **options):
        hinted.append(options["hints"])
        return await score(*args, **options)

    model.score = watched  # type: ignore[method-assign]
    choose.run(session=si.Session(idle_s=3.0, history=History()))
    assert [hints.keep_s for hints in hinted] == [3.0, 3.0] and len({hints.group for hints in hinted}) == 1


def test_prefetch_asks_for_what_was_said(model: ScriptedClient) -> None:
    session = si.Session(system="S")
    session.prefetch()
    say.run("one", session=session)
    asyncio.run(session.aprefetch())

    @si.function
    async def another(s):
        await session.aprefetch()

    another.run()
    first, _, second, third = model.requests
    assert (first.prompt, first.sampling.max_tokens) == ("<system>S</>", 1)
    assert second.prompt == third.prompt == "<system>S</><user>one</><assistant>ok</>"


def test_a_sessions_own_backend_is_used(model: ScriptedClient) -> None:
    from superinfer.lang.backend import TextBackend

    other = ScriptedClient()
    session = si.Session(backend=TextBackend(other))  # type: ignore[arg-type]
    session.ask("x")
    assert len(other.requests) == 1 and not model.requests
    session.backend = None  # its engine is gone, say
    session.ask("y")
    assert model.requests[0].prompt == "<user>x</><assistant>ok</><user>y</><assistant>"
