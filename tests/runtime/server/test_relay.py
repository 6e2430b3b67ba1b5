"""From deltas to one client's text: whichever way each delta goes, the text is whole, in order, and ends once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from superinfer.errors import EngineDeadError
from superinfer.runtime.protocol import Generate, RequestReport, SamplingParams, SequenceDelta
from superinfer.runtime.server.relay import MERGE_AT, ClientGone, Feed
from superinfer.runtime.text import TextClient, TextDelta, TextRequest
from superinfer.runtime.tokenization import Tokenizer

REPORT = RequestReport(prompt_tokens=1, cached_tokens=0, output_tokens=1, queue_s=0, prefill_s=0, decode_s=0, e2e_s=0)


class Door:
    """Stands for the engine's client: the test says what comes."""

    def __init__(self) -> None:
        self.requests: list[tuple[Generate, Callable[[SequenceDelta | Exception], None]]] = []
        self.cancelled: list[tuple[str, int | None]] = []
        self.released: list[tuple[str, bool]] = []

    async def open(self, request: Generate, sink: Callable[[SequenceDelta | Exception], None]) -> None:
        self.requests.append((request, sink))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        self.cancelled.append((request_id, index))

    def release(self, request_id: str, *, finished: bool) -> None:
        self.released.append((request_id, finished))

    def say(self, request: int, index: int, text: str, *, last: bool = False) -> None:
        asked, sink = self.requests[request]
        ids = [TOKENS[character] for character in text]
        reason: Any = "length" if last else None
        sink(SequenceDelta(
            request_id=asked.request_id, index=index, token_ids=ids, finish_reason=reason,
            report=REPORT if last else None,
        ))  # fmt: skip


TOKENS: dict[str, int] = {}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    found = Tokenizer(str(tiny_checkpoint))
    TOKENS.update({character: found.encode(character)[0] for character in "abcdefgh"})
    return found


class Line:
    """A client's connection that takes what it is given while it is open."""

    def __init__(self, got: list[TextDelta]) -> None:
        self.is_open = True
        self.straight = 0
        self._got = got

    def write(self, deltas: list[TextDelta]) -> None:
        assert self.is_open and deltas
        self.straight += 1
        self._got += deltas


async def follow(feed: Feed, got: list[TextDelta]) -> None:
    while deltas := await feed.get():
        got += deltas
        await asyncio.sleep(0)  # a write that takes its time


SAY = st.tuples(st.just("say"), st.integers(0, 2), st.text("abcdefgh", min_size=1, max_size=3))
STEPS = st.lists(st.one_of(SAY, st.just(("open",)), st.just(("shut",)), st.just(("turn",))), max_size=60)


INTERVALS = st.sampled_from((0.0, 0.001))


# What waits to be read goes first, also where the client keeps up again meanwhile.
@example(steps=[("turn",), ("shut",), ("say", 0, "a"), ("open",), ("say", 0, "b")], interval=0.0)
@given(steps=STEPS, interval=INTERVALS)
def test_text_comes_whole_and_in_order_whatever_the_client_takes_when(
    tokenizer: Tokenizer, steps: Any, interval: float
) -> None:
    async def main() -> None:
        door, got = Door(), list[TextDelta]()
        text = TextClient(door, tokenizer)  # type: ignore[arg-type]
        requests = [TextRequest(prompt=[3], sampling=SamplingParams(n=n)) for n in (2, 1)]
        with Feed(text, requests, eager=True, interval=interval) as feed:
            feed.straight = line = Line(got)
            await feed.start()
            reader = asyncio.create_task(follow(feed, got))
            said = ["", "", ""]
            for step in steps:
                if step[0] == "say":
                    said[step[1]] += step[2]
                    door.say(step[1] // 2, step[1] % 2, step[2])
                elif step[0] == "turn":
                    for _ in range(4):
                        await asyncio.sleep(0)
                else:
                    line.is_open = step[0] == "open"
            for choice in range(3):
                said[choice] += "h"
                door.say(choice // 2, choice % 2, "h", last=True)
            await asyncio.wait_for(reader, 10)
        assert ["".join(d.text for d in got if d.index == choice) for choice in range(3)] == said
        ends = [[d.finish_reason for d in got if d.index == choice] for choice in range(3)]
        assert all(reasons[-1] == "length" and not any(reasons[:-1]) for reasons in ends)
        assert sorted(finished for _, finished in door.released) == [True, True]

    asyncio.run(main())


async def test_deltas_go_straight_once_the_reader_waits(tokenizer: Tokenizer) -> None:
    door, got = Door(), list[TextDelta]()
    with Feed(TextClient(door, tokenizer), [TextRequest(prompt=[3])], eager=True) as feed:  # type: ignore[arg-type]
        feed.straight = line = Line(got)
        await feed.start()
        reader = asyncio.create_task(follow(feed, got))
        await asyncio.sleep(0)
        for turn in range(5):
            for _ in range(3):  # messages that a turn of the loop finds there
                door.say(0, 0, "ab")
            await asyncio.sleep(0)
            assert line.straight == turn + 1, "three are one write"
        assert "".join(d.text for d in got) == "ab" * 15
        door.say(0, 0, "c", last=True)
        await reader
        assert line.straight == 5 and got[-1].finish_reason == "length"


class Timers:
    """Stands for the event loop's: they fire when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.Handle:
        self.set.append((seconds, call))
        return asyncio.Handle(call, (), asyncio.get_running_loop())

    def fire(self) -> None:
        due, self.set = self.set, []
        for _, call in due:
            call()


async def turns(count: int = 5) -> None:
    """Of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_within_an_interval_pieces_are_gathered_and_the_end_is_not_kept_back(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, got, timers = Door(), list[TextDelta](), Timers(monkeypatch)
    two = TextRequest(prompt=[3], sampling=SamplingParams(n=2))
    with Feed(TextClient(door, tokenizer), [two], eager=True, interval=0.02) as feed:  # type: ignore[arg-type]
        await feed.start()
        reader = asyncio.create_task(follow(feed, got))
        for _ in range(2):
            for _ in range(3):
                door.say(0, 0, "ab")
                await turns()
            assert got == [] and [seconds for seconds, _ in timers.set] == [0.02]
            timers.fire()
            await turns()
            assert [d.text for d in got] == ["ababab"]
            got.clear()
        door.say(0, 0, "ab")
        door.say(0, 0, "c", last=True)
        await turns()
        assert [d.text for d in got] == ["abc"]
        door.say(0, 1, "d", last=True)
        await reader
        assert [d.text for d in got] == ["abc", "d"]


async def test_the_engine_keeps_back_what_nobody_wants_yet(tokenizer: Tokenizer) -> None:
    one, two = TextRequest(prompt=[3]), TextRequest(prompt=[3], sampling=SamplingParams(n=2))
    stopped = TextRequest(prompt=[3], stop=("cd",))
    wanted: list[tuple[TextRequest, bool, float, float]] = [
        (one, True, 0.02, 0.02), (one, True, 0.0, 0.0), (one, False, 0.0, math.inf),
        (two, True, 0.02, 0.0), (two, False, 0.0, math.inf),
        (stopped, True, 0.02, 0.0), (stopped, False, 0.0, 0.0),
    ]  # fmt: skip
    for request, eager, interval, kept in wanted:
        door = Door()
        text = TextClient(door, tokenizer)  # type: ignore[arg-type]
        with Feed(text, [request], eager=eager, interval=interval) as feed:
            await feed.start()
            assert door.requests[0][0].interval_s == kept, (request, eager, interval)
    with Feed(text, [one], eager=True, interval=3600.0) as feed:
        await feed.start()
        door.say(1, 0, "ab")  # the engine's interval is over
        assert [d.text for d in await asyncio.wait_for(feed.get(), 10)] == ["ab"]


async def test_what_a_slow_client_has_not_read_is_merged_not_queued(tokenizer: Tokenizer) -> None:
    door = Door()
    with Feed(TextClient(door, tokenizer), [TextRequest(prompt=[3])], eager=True) as feed:  # type: ignore[arg-type]
        await feed.start()
        for _ in range(5000):
            door.say(0, 0, "a")
            assert len(feed._pending) <= MERGE_AT + 2
        assert [(d.text, len(d.token_ids)) for d in await feed.get()] == [("a" * 5000, 5000)]
    assert door.released == [(door.requests[0][0].request_id, False)], "what was left is cancelled"


async def test_a_write_that_fails_ends_its_own_answer_only(tokenizer: Tokenizer) -> None:
    class Broken(Line):
        def write(self, deltas: list[TextDelta]) -> None:
            raise ValueError("no such text")

    door = Door()
    with Feed(TextClient(door, tokenizer), [TextRequest(prompt=[3])], eager=True) as feed:  # type: ignore[arg-type]
        feed.straight = Broken([])
        await feed.start()
        reader = asyncio.create_task(follow(feed, []))
        await asyncio.sleep(0)
        door.say(0, 0, "a")  # raises nothing here, where other answers' deltas follow
        with pytest.raises(ValueError, match="no such text"):
            await reader


async def test_a_stop_string_that_comes_straight_cancels_the_rest(tokenizer: Tokenizer) -> None:
    door, got = Door(), list[TextDelta]()
    asked = TextRequest(prompt=[3], stop=("cd",))
    with Feed(TextClient(door, tokenizer), [asked], eager=True) as feed:  # type: ignore[arg-type]
        feed.straight = Line(got)
        await feed.start()
        reader = asyncio.create_task(follow(feed, got))
        await asyncio.sleep(0)
        for piece in ("ab", "c", "de", "fg"):
            door.say(0, 0, piece)
            await asyncio.sleep(0)
        assert "".join(d.text for d in got) == "ab"
        assert door.cancelled == [(door.requests[0][0].request_id, 0)]
        door.say(0, 0, "", last=True)
        await reader
        assert (got[-1].finish_reason, got[-1].stop) == ("stop", "cd")


async def test_the_engines_death_reaches_a_reader_that_waits(tokenizer: Tokenizer) -> None:
    door = Door()
    with Feed(TextClient(door, tokenizer), [TextRequest(prompt=[3])], eager=True) as feed:  # type: ignore[arg-type]
        feed.straight = Line([])
        await feed.start()
        reader = asyncio.create_task(follow(feed, []))
        await asyncio.sleep(0)
        door.requests[0][1](EngineDeadError("it died"))
        with pytest.raises(EngineDeadError, match="it died"):
            await reader


@pytest.mark.parametrize("interval", [0.0, 3600.0])
async def test_who_has_begun_to_read_gets_what_came_before_an_error(tokenizer: Tokenizer, interval: float) -> None:
    door = Door()
    asked = TextRequest(prompt=[3], sampling=SamplingParams(n=2))
    with Feed(TextClient(door, tokenizer), [asked], eager=True, interval=interval) as feed:  # type: ignore[arg-type]
        await feed.start()
        if interval:
            feed._gathered()  # it is over
        door.say(0, 0, "a")
        assert [d.text for d in await asyncio.wait_for(feed.get(), 10)] == ["a"]
        door.say(0, 1, "b")
        door.say(0, 0, "cd")
        door.requests[0][1](EngineDeadError("it died"))
        assert {d.index: d.text for d in await feed.get()} == {0: "cd", 1: "b"}
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="it died"):
                await feed.get()


@pytest.mark.parametrize(
    ("begins", "ends", "error"),
    [(False, False, EngineDeadError("it died")), (True, True, EngineDeadError("it died")), (True, False, ClientGone())],
    ids=["nothing was given out", "a choice ended", "the client is gone"],
)
async def test_else_the_error_comes_at_once(tokenizer: Tokenizer, begins: bool, ends: bool, error: Exception) -> None:
    """So that it can be the answer's status, or takes the place of an end."""
    door = Door()
    with Feed(TextClient(door, tokenizer), [TextRequest(prompt=[3])], eager=True) as feed:  # type: ignore[arg-type]
        await feed.start()
        door.say(0, 0, "a")
        if begins:
            await feed.get()
            door.say(0, 0, "b", last=ends)
        feed.fail(error)
        with pytest.raises(type(error)):
            await feed.get()
