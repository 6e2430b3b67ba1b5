"""Variables in the making, and text that grows: written on the language's loop, read from any thread or loop."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from superinfer.lang.callgraph import Call
from superinfer.lang.loop import language_loop, on_language_loop
from superinfer.lang.outcome import Outcome
from superinfer.lang.unknown import as_text

T = TypeVar("T")
Meta = Any  # dict of one continuation; list of dicts where gen(n=...) made several


@dataclass(frozen=True)
class Chunk:
    """New text, and what was known of its call then."""

    text: str
    meta: Meta = None


@dataclass(frozen=True)
class End:
    """No more text. `error`: what ended it."""

    error: BaseException | None = None


END = End()
Listener = Callable[[Chunk | End], object]


class Feed:
    """Text that grows. Every listener gets all of it: what is there at once, the rest as it comes, then an End.

    Belongs to the language's loop; other threads read through `read` and `aread`.
    """

    __slots__ = ("_end", "_listeners", "_meta", "_text")

    def __init__(self) -> None:
        self._text: list[str] | None = None
        self._meta: Meta = None
        self._end: End | None = None
        self._listeners: dict[object, Listener] | None = None

    def push(self, text: str, meta: Meta = None) -> None:
        """Add text."""
        if self._end is not None:
            return
        if self._text is None:
            self._text = []
        self._text.append(text)
        self._meta = meta
        for listener in list((self._listeners or {}).values()):
            listener(Chunk(text, meta))

    def close(self, error: BaseException | None = None) -> None:
        """End it; later calls change nothing."""
        if self._end is not None:
            return
        self._end = END if error is None else End(error)
        for listener in list((self._listeners or {}).values()):
            listener(self._end)
        self._listeners = None

    def listen(self, key: object, listener: Listener) -> None:
        """Call `listener` with everything, from the beginning."""
        if self._text:
            listener(Chunk("".join(self._text), self._meta))
        if self._end is not None:
            listener(self._end)
        else:
            if self._listeners is None:
                self._listeners = {}
            self._listeners[key] = listener

    def ignore(self, key: object) -> None:
        """Stop calling the listener of `key`."""
        if self._listeners is not None:
            self._listeners.pop(key, None)

    @property
    def is_read(self) -> bool:
        """Whether anybody listens now."""
        return bool(self._listeners)

    @property
    def is_empty(self) -> bool:
        """Whether no text has come yet."""
        return not self._text


def read(feed: Feed, abandoned: Callable[[], object]) -> Iterator[Chunk]:
    """The chunks, for a synchronous reader. Raises what ended the text. `abandoned` is called if it leaves early."""
    if on_language_loop():
        raise RuntimeError("text_iter() would block the event loop; use text_async_iter() in an async program")
    loop, key = language_loop().loop, object()
    items: queue.SimpleQueue[Chunk | End] = queue.SimpleQueue()
    loop.call_soon_threadsafe(feed.listen, key, items.put)
    ended = False
    try:
        while True:
            item = items.get()
            if isinstance(item, End):
                ended = True
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        loop.call_soon_threadsafe(feed.ignore, key)
        if not ended:
            abandoned()


async def aread(feed: Feed, abandoned: Callable[[], object]) -> AsyncIterator[Chunk]:
    """Async twin of `read`, on the caller's loop."""
    loop, here, key = language_loop().loop, asyncio.get_running_loop(), object()
    items: asyncio.Queue[Chunk | End] = asyncio.Queue()

    def pass_on(item: Chunk | End) -> None:
        if not here.is_closed():
            here.call_soon_threadsafe(items.put_nowait, item)

    loop.call_soon_threadsafe(feed.listen, key, pass_on)
    ended = False
    try:
        while True:
            item = await items.get()
            if isinstance(item, End):
                ended = True
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        loop.call_soon_threadsafe(feed.ignore, key)
        if not ended:
            abandoned()


class Variable:
    """A name's value once its call is done, its text as it grows, and what is known of the call."""

    __slots__ = ("call", "feed", "meta", "outcome", "reasoning")

    def __init__(self) -> None:
        self.feed = Feed()
        self.meta: Meta = None
        self.outcome: Outcome[Any] = Outcome()
        self.call: Call | None = None  # that makes it, once that has begun
        self.reasoning: Variable | None = None  # what the model thought before it said this, where that is told apart

    @classmethod
    def of(cls, value: Any, meta: Meta = None) -> Variable:
        """A variable that has its value."""
        variable = cls()
        variable.set(value, meta)
        return variable

    @property
    def done(self) -> bool:
        return self.outcome.done

    def set(self, value: Any, meta: Meta = None) -> None:
        """Give it its value. What was not streamed becomes its text."""
        self.meta = meta
        if self.feed.is_empty and isinstance(value, str) and (text := as_text(value)):
            self.feed.push(text, meta)
        self.feed.close()
        self.outcome.set(value)

    def fail(self, error: BaseException) -> None:
        """Whoever reads it gets `error`, unless it has its value."""
        self.feed.close(error)
        self.outcome.fail(error)
        if self.reasoning is not None:
            self.reasoning.fail(error)

    def never(self, name: str, error: BaseException | None) -> None:
        """The program has ended without it: there is no text, and who asks for the value gets `error` or KeyError."""
        self.feed.close(error)
        self.fail(error or KeyError(f"the program ended without variable {name!r}"))
