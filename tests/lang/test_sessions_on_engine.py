"""Sessions on a real engine: what turns share, what waits in the second tier, and that cancelling stops at once."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from slow_engine import SlowEngine

import superinfer as si
from superinfer.lang.backend import RuntimeEndpoint
from superinfer.lang.loop import language_loop
from superinfer.runtime.client import AsyncEngineClient
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.launch import EngineProcess, launch_engine
from superinfer.runtime.protocol import Cancel, Message, StatsReport

PAGE = 16


@si.function
def say(s, text):
    s += si.user(text) + si.assistant(si.gen("x", max_tokens=24, temperature=0, ignore_eos=True))


@si.function
async def ramble(s, text, tokens):
    s += si.user(text) + si.assistant(si.gen("x", max_tokens=tokens, temperature=0, ignore_eos=True))
    branches = s.fork(3)
    branches += si.user("And?") + si.assistant(si.gen("y", max_tokens=300, temperature=0, ignore_eos=True))
    await branches.ajoin()


@pytest.fixture(scope="module")
def two_tiers(talking_llama: Path) -> Iterator[EngineProcess]:
    """An engine with room for 1,024 tokens, and for 8,192 in its second tier."""
    config = EngineConfig(
        model=str(talking_llama), kv_tokens=1024, dram_tokens=8192, page_size=PAGE, policy="rota", max_batch_tokens=128,
        max_batch_size=16, threads=1,
    )  # fmt: skip
    with launch_engine(config) as process:
        yield process


def stats(backend: RuntimeEndpoint) -> StatsReport:
    """As the engine answers on the programs' own connection."""
    return language_loop().run(backend.client.client.stats())


@si.function
def other(s, i):
    s += f"{i} " * 100 + si.gen("x", max_tokens=2, ignore_eos=True)


def crowd_out(backend: RuntimeEndpoint) -> None:
    """Others, who fill the engine's first tier twice."""
    states = other.run_batch([(i,) for i in range(10, 20)], num_threads=2, backend=backend)
    assert [state.error() for state in states] == [None] * 10


def test_turns_compute_only_what_is_new(two_tiers: EngineProcess) -> None:
    with RuntimeEndpoint(two_tiers.address) as backend:
        session = si.Session(system="You are patient. " * 10, backend=backend)
        known = 0  # of the answers too, but this model writes tokens that no tokenizer would make of their text
        for turn in range(3):
            meta = say.run(f"Turn {turn}: how are you?", session=session).get_meta_info("x")
            assert known - PAGE <= meta["cached_tokens"] < meta["prompt_tokens"]  # but for the last, unfilled block
            known = meta["prompt_tokens"]
        assert known > 250


def test_a_sessions_kv_waits_in_the_second_tier_and_comes_back_when_asked_for(two_tiers: EngineProcess) -> None:
    with RuntimeEndpoint(two_tiers.address) as backend:
        session = si.Session(system="You wait for your tools. " * 8, backend=backend, idle_s=60.0)
        say.run("one", session=session)
        said = len(backend.encode(session.text(), special=False))
        crowd_out(backend)
        gone = stats(backend)
        session.prefetch()
        fetched = stats(backend)
        assert fetched.tiers.dram_hits - gone.tiers.dram_hits >= said // PAGE - 2  # copied back, not computed again
        state = say.run("two", session=session)
        assert state.get_meta_info("x")["cached_tokens"] >= said - 2 * PAGE
        assert stats(backend).tiers.dram_hits == fetched.tiers.dram_hits  # the turn found all of it there


def test_a_session_survives_its_engine(talking_engine: EngineProcess, fresh_engine: EngineProcess) -> None:
    with RuntimeEndpoint(talking_engine.address) as first, RuntimeEndpoint(fresh_engine.address) as second:
        session = si.Session(backend=second)
        say.run("one", session=session)
        fresh_engine.close()
        with pytest.warns(RuntimeWarning, match="EngineDeadError"):
            assert isinstance(say.run("two", session=session).error(), si.EngineDeadError)
        session.backend = first
        assert say.run("two", session=session).error() is None and session.turns == 2


@pytest.mark.parametrize("as_turn", [False, True])
async def test_cancelling_a_program_stops_its_requests_before_the_engines_next_step(
    slow: SlowEngine, monkeypatch: pytest.MonkeyPatch, as_turn: bool
) -> None:
    """Right behind each Cancel on the wire a GetStats is sent: the engine takes both in before it makes another step,
    so the last answer says what a cancelled program still does there."""
    asked: list[asyncio.Task[StatsReport]] = []
    send_soon = AsyncEngineClient._send_soon

    def and_ask(client: AsyncEngineClient, message: Message) -> None:
        send_soon(client, message)
        if isinstance(message, Cancel):
            asked.append(asyncio.get_running_loop().create_task(client.stats()))

    monkeypatch.setattr(AsyncEngineClient, "_send_soon", and_ask)
    with RuntimeEndpoint(slow.address) as backend:
        session = si.Session(backend=backend) if as_turn else None
        before = await asyncio.to_thread(stats, backend)
        tokens = 600 if as_turn else 3
        task = asyncio.create_task(ramble.arun("x" * 50, tokens, session=session, backend=backend))
        running = before
        while not task.done() and running.running < (3 if not as_turn else 1):  # in its forks, or in its first call
            await asyncio.sleep(0.005)
            running = await asyncio.to_thread(stats, backend)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(30):
            while not asked or not all(one.done() for one in asked):
                await asyncio.sleep(0.005)
    reports = [one.result() for one in asked]
    assert len(reports) >= running.running  # what was sent ahead is taken back too
    assert reports[-1].running == 0 and reports[-1].cancelled - before.cancelled == running.running
    assert reports[-1].steps - reports[0].steps <= 1


@pytest.mark.skipif(
    importlib.util.find_spec("superinfer.runtime.scheduler.returns") is None, reason="the scheduler heeds no keep_s yet"
)
async def test_what_a_tool_call_interrupts_is_back_before_the_tool_is(two_tiers: EngineProcess) -> None:
    """Nobody asks for it: the engine was told with the call before how long tools take."""
    backed = asyncio.Event()

    @si.function
    async def agent(s):
        s += si.user("Call a tool. " * 12) + si.assistant(si.gen("x", max_tokens=8, temperature=0, ignore_eos=True))
        await s.get("x")
        await tool()
        s += si.user("Go on.") + si.assistant(si.gen("y", max_tokens=8, temperature=0, ignore_eos=True))
        return (await s.get("y")), s.get_meta_info("y")["cached_tokens"]

    async def tool() -> None:
        before = await asyncio.to_thread(stats, backend)
        await other_full.arun(backend=backend)  # others take all of the first tier
        while (await asyncio.to_thread(stats, backend)).tiers.bytes_in == before.tiers.bytes_in:
            await asyncio.sleep(0.05)  # until the test's time limit
        backed.set()

    @si.function
    async def other_full(s):
        s += "z" * 950 + si.gen("x", max_tokens=2, ignore_eos=True)

    with RuntimeEndpoint(two_tiers.address) as backend:
        session = si.Session(backend=backend, tool_s=4.0)
        state = await agent.arun(session=session)
        assert backed.is_set() and state.ret_value[1] > 130
